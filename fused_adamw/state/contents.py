"""The optimizer's state of one parameter: torch's keys, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dtensors import local_tensors
from ..fields import MOMENTS, State


def moment_dtype(p: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's moments; `state_dtype` does not apply to complex parameters."""
    return state_dtype if state_dtype is not None and p.is_floating_point() else p.dtype


def new_moment(p: Tensor, state_dtype: torch.dtype | None) -> Tensor:
    """Zeros laid out as the parameter is; the one place where moments are made.

    Tensor subclasses make them as their `zeros_like` does, as in torch; those that only override functions
    (`__torch_function__`) get plain tensors, which any program can load.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return torch.zeros_like(
            p, dtype=moment_dtype(p, state_dtype), memory_format=torch.preserve_format, requires_grad=False
        )


def new_step(p: Tensor, value: Any = None) -> Tensor:
    """A step count in the form of torch's fused optimizers: 0-dim float32 beside `p`."""
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    if value is None:
        return step
    (value,) = local_tensors([value])
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(value, Tensor):
            step.copy_(value.detach().reshape(()))
        else:
            step.fill_(float(value))
    return step


def missing_state(
    state: Mapping[str, Any], p: Tensor, amsgrad: bool, state_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """What a parameter's state lacks before the next step.

    A step count is replaced only where it is no tensor on the parameter's device: others may count with it.

    Args:
        state: The parameter's state; it is not changed.
        p: The parameter.
        amsgrad: Whether there is a `max_exp_avg_sq`.
        state_dtype: Dtype of new moments; None: the parameter's.
    """
    missing = {}
    step = state.get("step")
    if not isinstance(step, Tensor) or step.device != p.device:
        missing["step"] = new_step(p, step)
    for key in MOMENTS[: 3 if amsgrad else 2]:
        if key not in state:
            missing[key] = new_moment(p, state_dtype)
    return missing


def copied_state(saved: Mapping[str, Any], p: Tensor, state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies of a saved step count and moments, made as for the first step."""
    state = {}
    if "step" in saved:
        state["step"] = new_step(p, saved["step"])
    for key in MOMENTS:
        if isinstance(value := saved.get(key), Tensor):
            state[key] = new_moment(p, state_dtype)
            with torch._C.DisableTorchFunctionSubclass():
                state[key].copy_(value)
    return state


def is_counted(state: State, p: Tensor) -> bool:
    """Whether the state has a step count of a parameter: it has had a gradient."""
    of_p = state.get(p)
    return isinstance(of_p, Mapping) and "step" in of_p
