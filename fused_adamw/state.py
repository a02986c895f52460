"""The optimizer's state of one parameter: torch's keys, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distributed import local_tensors
from .memory import address_of

# The last one is there with amsgrad only.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def moment_dtype(p: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's moments; `state_dtype` does not apply to complex parameters."""
    return state_dtype if state_dtype is not None and p.is_floating_point() else p.dtype


def complete_state(
    state: dict[str, Any], p: Tensor, amsgrad: bool, state_dtype: torch.dtype | None, steps: set[int]
) -> None:
    """Add what a parameter's state lacks, and replace a step count that kernels could not advance.

    Args:
        state: The parameter's state, which is changed.
        p: The parameter.
        amsgrad: Whether there is a `max_exp_avg_sq`.
        state_dtype: Dtype of new moments; None: the parameter's.
        steps: Addresses of the step counts of other parameters, to which this one is added: a shared count
            would be advanced several times.
    """
    (step,) = local_tensors([state.get("step", 0.0)])
    if not (
        isinstance(step, Tensor)
        and step.dim() == 0
        and step.dtype == torch.float32
        and step.device == p.device
        and address_of(step) not in steps
    ):
        state["step"] = _own_step(step, p)
    steps.add(address_of(state["step"]))
    for key in MOMENTS[: 3 if amsgrad else 2]:
        if key not in state:
            dtype = moment_dtype(p, state_dtype)
            state[key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def copied_state(saved: Mapping[str, Any], p: Tensor, state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies of a saved step count and moments, laid out as the parameter is."""
    state = {}
    if "step" in saved:
        state["step"] = _own_step(saved["step"], p)
    for key in MOMENTS:
        if isinstance(value := saved.get(key), Tensor):
            dtype = moment_dtype(p, state_dtype)
            moment = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format)
            state[key] = moment.copy_(value)
    return state


def _own_step(step: Any, p: Tensor) -> Tensor:
    """A step count shared with nobody, in the form of torch's fused optimizers: 0-dim float32 beside `p`."""
    if isinstance(step, Tensor):
        return step.detach().to(p.device, torch.float32).reshape(()).clone()
    return torch.full((), float(step), dtype=torch.float32, device=p.device)  # a copy would synchronise
