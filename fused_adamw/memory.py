"""What a kernel takes for granted of a tensor: where its memory is, and how it is laid out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import compress
from typing import Any

from torch import Tensor


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether one flat index names the same element in both, whatever the strides of size-1 dimensions."""
    return a.shape == b.shape and all(
        x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1
    )


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory without holes or overlap, in whatever order of dimensions."""
    if t.numel() == 0 or t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _address(t: Tensor) -> int:
    """Where a tensor's memory starts; an identity for what has no memory of its own."""
    try:
        return t.data_ptr()
    except RuntimeError:
        return id(t)


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:
        return list(map(_address, tensors))


def same_objects(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


class Metadata:
    """What kernels take for granted of tensors beside addresses: type, dtype, layout, shape and strides.

    Args:
        tensors: As they are now; None stands for an absent gradient.
        expected: Where a tensor is absent, one like it.
    """

    def __init__(self, tensors: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
        self._columns = _columns([e if t is None else t for t, e in zip(tensors, expected, strict=True)])
        present = [t for t in tensors if t is not None]
        self._guards = _guards(present) if len(present) == len(tensors) else None

    def match(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether every tensor that is present looks as it did, or as it was expected to."""
        present = [t for t in tensors if t is not None]
        if len(present) < len(tensors):
            is_there = [t is not None for t in tensors]
            return _columns(present) == [list(compress(column, is_there)) for column in self._columns]
        if self._guards is not None:
            return bool(self._guards.check(*present))
        return _columns(present) == self._columns


def _columns(tensors: Sequence[Tensor]) -> list[Sequence[object]]:
    return [
        list(map(type, tensors)),
        [t.dtype for t in tensors],
        [t.layout for t in tensors],
        [t.shape for t in tensors],
        list(map(Tensor.stride, tensors)),
    ]


def _guards(tensors: Sequence[Tensor]) -> Any:
    """Dynamo's check of the same things, in one call into C++ for all tensors; None where torch has none."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except (ImportError, TypeError, RuntimeError, NotImplementedError):
        return None


def grad_addresses_of(grads: Sequence[Tensor | None]) -> list[int]:
    """Addresses of gradients: 0 where there is none, never 0 where there is one, if only an empty one."""
    try:
        return [0 if g is None else g.data_ptr() or 1 for g in grads]
    except RuntimeError:
        return [0 if g is None else _address(g) for g in grads]
