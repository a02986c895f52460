"""What a kernel takes for granted of a tensor: where its memory is, and how it is laid out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import compress

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
    """What kernels take for granted of tensors, beside their addresses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.columns: list[Sequence[object]] = [
            [t.dtype for t in tensors],
            [t.layout for t in tensors],
            [t.shape for t in tensors],
            list(map(Tensor.stride, tensors)),
        ]

    def where(self, selected: Sequence[bool]) -> Metadata:
        """Of some of the tensors."""
        part = Metadata([])
        part.columns = [list(compress(column, selected)) for column in self.columns]
        return part


def grad_addresses_of(grads: Sequence[Tensor | None]) -> list[int]:
    """Addresses of gradients: 0 where there is none, never 0 where there is one, if only an empty one."""
    try:
        return [0 if g is None else g.data_ptr() or 1 for g in grads]
    except RuntimeError:
        return [0 if g is None else _address(g) for g in grads]
