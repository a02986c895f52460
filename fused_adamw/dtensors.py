"""DTensors: the local part of each, and how it is placed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_dtensor(t: object) -> bool:
    """Whether `t` is a DTensor. There are none before their module, which takes a second, is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local_tensors(values: Iterable[Any]) -> list[Any]:
    """The values, but the local tensor (not a copy) of each DTensor."""
    return [getattr(value, "_local_tensor", value) for value in values]  # to_local() takes 50 times as long


def local_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """The local gradients, each placed as its parameter is.

    As in torch's optimizers, a gradient with other placements is redistributed, which is a collective of its
    mesh. A Partial gradient, of which every process has an addend, is summed by it. `grads` is not changed.

    Returns:
        A local tensor for each gradient; None if one does not fit, as `misplacement` and `is_partial` tell.
    """
    placed = list(grads)
    for slot, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            continue
        spec, expected = getattr(grad, "_spec", None), getattr(p, "_spec", None)
        if spec is expected:  # both plain, or from FSDP2
            continue
        if spec is None or expected is None or spec.mesh != expected.mesh or spec.shape != expected.shape:
            return None
        if spec.placements != expected.placements:
            if is_partial(p):
                return None
            placed[slot] = grad.redistribute(placements=expected.placements)  # type: ignore[attr-defined]
    local: list[Tensor | None] = local_tensors(placed)
    if not set(map(type, local)) <= {Tensor, NoneType}:
        from torch.distributed._functional_collectives import AsyncCollectiveTensor

        local = [t.wait() if isinstance(t, AsyncCollectiveTensor) else t for t in local]
    return local


def misplacement(t: Tensor, p: Tensor, can_move: bool) -> str | None:
    """None if `t` is distributed as its parameter is, or can be; otherwise what is wrong.

    Args:
        t: A gradient or a moment.
        p: The parameter.
        can_move: Whether other placements on the same mesh are acceptable.
    """
    spec, expected = getattr(t, "_spec", None), getattr(p, "_spec", None)
    if (spec is None) != (expected is None):
        return f"is {_described(spec)}, the parameter {_described(expected)}"
    if spec is None or expected is None or (spec.mesh == expected.mesh and can_move):
        return None
    if spec.mesh != expected.mesh or spec.placements != expected.placements:
        return f"is {_described(spec)}, expected {_described(expected)} like the parameter"
    return None


def _described(spec: Any) -> str:
    return "a plain tensor" if spec is None else f"a DTensor {spec.placements} on {spec.mesh}"


def is_partial(p: Tensor) -> bool:
    """Whether processes hold addends of a DTensor, not its values."""
    spec: Any = getattr(p, "_spec", None)
    return spec is not None and any(placement.is_partial() for placement in spec.placements)


def wrapped(local: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A local tensor as this process's part of a DTensor that is placed as another one is.

    Args:
        local: This process's part.
        like: Says where the whole is, and how it is placed; a plain tensor: the local tensor is all of it.
        shape: Of the whole, which is contiguous; None: it has the shape and strides of `like`.
    """
    spec: Any = getattr(like, "_spec", None)
    if spec is None:
        return local
    from torch.distributed.tensor import DTensor

    stride = spec.stride if shape is None else torch.empty(tuple(shape), device="meta").stride()
    shape = spec.shape if shape is None else torch.Size(shape)
    whole: Tensor = DTensor.from_local(
        local, spec.mesh, spec.placements, run_check=False, shape=shape, stride=stride
    )
    return whole


def start_in_whole(spec: Any) -> list[int] | None:
    """Where this process's part of a DTensor starts in the whole tensor, in each dimension.

    Args:
        spec: The DTensor's `_spec`.

    Returns:
        None if its indices in a dimension do not follow each other.
    """
    start, coordinate = [], spec.mesh.get_coordinate() or [0] * spec.mesh.ndim
    for dim, size in enumerate(spec.shape):
        index = torch.arange(size, device="cpu").view([-1 if d == dim else 1 for d in range(spec.ndim)])
        for part, parts, placement in zip(coordinate, spec.mesh.shape, spec.placements, strict=True):
            if getattr(placement, "dim", None) == dim:
                index = placement._split_tensor(index, parts, with_padding=False)[0][part]
        places = index.flatten().tolist()
        if places != list(range(places[0], places[0] + len(places)) if places else ()):
            return None
        start.append(places[0] if places else 0)
    return start


def is_flattened(p: Tensor) -> bool:
    """Whether FSDP1 shards `p`, or sharded what it was made of: its type and shape do not tell."""
    return bool(getattr(p, "_fsdp_flattened", False))


def is_fsdp2(module: object) -> bool:
    """Whether FSDP2 shards the parameters of a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def has_peers() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def full_tensor(t: Tensor) -> Tensor:
    """The whole of a DTensor, which is a collective; any other tensor itself."""
    whole: Tensor = t.full_tensor() if is_dtensor(t) else t  # type: ignore[attr-defined]
    return whole
