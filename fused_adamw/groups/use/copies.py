"""Copies of models whose tensors are replaced, also of models that refuse to be copied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..places import Located, class_of
from .labels import tensors_in


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor: its shape is that of the whole, its values are not."""
    return hasattr(tensor, "device_mesh")


def copies_of_tensors(
    model: nn.Module, located: Sequence[Located], make: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """Copy every tensor of a model, also those in plain attributes: they may refuse to copy themselves."""
    memo: dict[int, Tensor] = {}
    held = [item.param for item in located]
    for module in model.modules():
        held += [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        held += [t for key, value in vars(module).items() if key[0] != "_" for t in tensors_in(value)]
    for tensor in held:
        if id(tensor) not in memo:
            memo[id(tensor)] = make(tensor)
    return memo


def copy_of(model: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """Copy a model with other tensors.

    `fully_shard` forbids copies and makes modules gather their shards. Those modules are copied as the class
    that they had before, without its hooks.

    Args:
        model: The model.
        tensors: What replaces each tensor, by `id`.
    """
    memo: dict[int, Any] = dict(tensors)
    sharded = [
        module for module in model.modules() if class_of(module) is not type(module) and _is_fsdp(module)
    ]
    for module in sharded:
        memo[id(module)] = object.__new__(class_of(module))
    for module in sharded:
        kept = {key: value for key, value in vars(module).items() if not key.startswith("__composable_api")}
        kept |= {key: _without_its_hooks(value) for key, value in kept.items() if key.endswith("_hooks")}
        vars(memo[id(module)]).update(copy.deepcopy(kept, memo))
    made: nn.Module = copy.deepcopy(model, memo)
    return made


def _is_fsdp(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _without_its_hooks(hooks: Any) -> Any:
    if not isinstance(hooks, dict):  # none of that kind
        return hooks
    own = [(key, h) for key, h in hooks.items() if not h.__module__.startswith("torch.distributed.")]
    return type(hooks)(own)
