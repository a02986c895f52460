"""Running one forward pass of a model for its operators, and leaving the model as it was.

A copy runs, in evaluation mode, on fake tensors: no arithmetic is done and no memory spent on values. Where
values decide which way the model goes, a second copy with values runs instead.
"""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ..places import Located, unwrap
from .copies import copies_of_tensors, copy_of, is_sharded
from .labels import Uses, tensors_in
from .watch import Watcher


def observe(model: nn.Module, located: Sequence[Located], example_inputs: Any) -> Uses:
    """Watch which operators use the parameters of a model.

    Args:
        model: The model, wrapped or not. Nothing of it changes: a copy runs.
        located: The parameters to watch.
        example_inputs: A tensor, a tuple or list of positional arguments, or a mapping of keyword ones.

    Returns:
        What the forward pass did with each parameter, by `id`.

    Raises:
        Exception: Whatever the forward pass raises with values, or the copy.
    """
    inner = unwrap(model)
    on_meta = any(item.param.is_meta for item in located)
    with _undisturbed():
        try:
            return _run_fake(inner, located, example_inputs)
        except Exception:
            if on_meta:  # there are no values to run with
                raise
        return _run_real(inner, located, example_inputs)


def _run_fake(inner: nn.Module, located: Sequence[Located], example_inputs: Any) -> Uses:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        if not (tensor.is_meta or is_sharded(tensor)):
            return mode.from_tensor(tensor)
        with mode:  # what a forward pass makes itself is on the CPU
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    memo = copies_of_tensors(inner, located, fake)
    made = copy_of(inner, memo)
    with mode:
        return _run(made, {id(item.param): memo[id(item.param)] for item in located}, example_inputs, fake)


def _run_real(inner: nn.Module, located: Sequence[Located], example_inputs: Any) -> Uses:
    def same(tensor: Tensor) -> Tensor:
        if is_sharded(tensor):
            raise RuntimeError("it depends on values, of which a sharded model has only a part here")
        made = tensor.detach().clone()
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    memo = copies_of_tensors(inner, located, same)
    made = copy_of(inner, memo)
    return _run(made, {id(item.param): memo[id(item.param)] for item in located}, example_inputs, same)


def _run(
    made: nn.Module, parameters: Mapping[int, Tensor], example_inputs: Any, make: Callable[[Tensor], Tensor]
) -> Uses:
    inputs = tree_map_only(Tensor, make, example_inputs)
    args, kwargs = _arguments(inputs)
    made.eval()
    for module in made.modules():  # a module that converts itself would swap the tensors that are watched
        vars(module)["_apply"] = lambda fn, recurse=True, module=module: module
    watcher = Watcher(parameters, list(tensors_in(inputs)))
    with watcher:
        output = made(*args, **kwargs)
    return watcher.finish(output)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep random numbers and global switches as they are, and compiled modules from being compiled."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it prints what is caught here
    fastpath, disabled = torch.backends.mha.get_fastpath_enabled(), log.disabled
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        warnings.simplefilter("ignore")
        log.disabled = True
        torch.backends.mha.set_fastpath_enabled(False)  # one operator that hides all others
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            log.disabled = disabled
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
