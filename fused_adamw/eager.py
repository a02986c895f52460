"""What surrounds each step: hooks, profilers, torch.compile. Where none of them is there it takes no time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C import _set_grad_enabled
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo
from torch.autograd import profiler
from torch.optim import optimizer as torch_optimizer

_Step = TypeVar("_Step", bound=Callable[..., Any])


def eager(step: _Step) -> _Step:
    """Make a step run without gradients, and never inside a graph that torch.compile builds.

    Kernels take addresses, which traced tensors do not have.
    """
    outside = _disable_dynamo(torch.no_grad()(step))

    @functools.wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        # The wrapper takes longer than some steps: it is left out where this thread compiles nothing.
        if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:
            return outside(*args, **kwargs)
        # As torch.no_grad, whose ten calls in Python take longer than some steps, too.
        was_enabled = torch.is_grad_enabled()
        _set_grad_enabled(False)
        try:
            return step(*args, **kwargs)
        finally:
            _set_grad_enabled(was_enabled)

    return run  # type: ignore[return-value]


class EagerHooks(torch.optim.Optimizer):
    """Calls the hooks of a step as torch does, and names the step only where a profiler is running."""

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `step`, as torch asks for it; torch's own names the step even where nobody listens."""
        as_torch = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            optimizer = args[0]
            is_watched = (
                torch.compiler.is_compiling()
                or profiler._is_profiler_enabled
                or torch._C._autograd._profiler_enabled()
                or optimizer._optimizer_step_pre_hooks
                or optimizer._optimizer_step_post_hooks
                or torch_optimizer._global_optimizer_pre_hooks
                or torch_optimizer._global_optimizer_post_hooks
            )
            if is_watched:
                return as_torch(*args, **kwargs)
            result = func(*args, **kwargs)
            optimizer._optimizer_step_code()
            return result

        return wrapper
