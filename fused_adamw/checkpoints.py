"""Saved parameter groups and state, and how they fit the live ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class NamedGroup(dict[str, Any]):
    """A parameter group whose names do not turn up when its keys are iterated.

    torch.distributed.checkpoint looks every key that it meets in a group up in a flattened checkpoint; those
    of optimizers without names have no `param_names`, and names are nothing that it has to load.
    """

    def __iter__(self) -> Iterator[str]:
        return (key for key in super().__iter__() if key != "param_names")


def without_foreign_names(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group, without `param_names` if it lists parameters by name.

    torch.distributed.checkpoint does, having paired them by name; the `param_names` are then those of the
    group that the options came from.
    """
    if any(isinstance(param, str) for param in group["params"]):
        return {key: value for key, value in group.items() if key != "param_names"}
    return group


def completed(saved: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """A saved group, with the live group's value for every option that it does not have."""
    if "lr" not in saved:
        warnings.warn(
            f"the checkpoint has no options for a group of {len(live['params'])} parameters, which keeps its "
            "own: torch.distributed.checkpoint gives the options of a saved group to one group alone. Save "
            "with flatten_optimizer_state_dict=True to give them to every parameter.",
            stacklevel=2,
        )
    options = {key: value for key, value in live.items() if key not in ("params", "param_names")}
    return {**options, **saved}


def own_step(step: Any, p: Tensor) -> Tensor:
    """A step count shared with nobody, in the form of torch's fused optimizers: 0-dim float32 beside `p`."""
    return torch.as_tensor(step, dtype=torch.float32, device=p.device).detach().reshape(()).clone()
