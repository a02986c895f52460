"""Where tensors are in memory and how they are laid out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@functools.cache
def is_plain(kind: type) -> bool:
    """Whether kernels may read the memory of tensors of a type directly.

    Of parameters they may, and of subclasses without a `__torch_function__` or `__torch_dispatch__` of their
    own: these change nothing of what torch does.
    """

    def behaviour(kind: Any, name: str) -> object:
        function = getattr(kind, name)
        return getattr(function, "__func__", function)

    functions = [behaviour(each, "__torch_function__") for each in (kind, Tensor, nn.Parameter)]
    dispatch, of_tensors = (behaviour(each, "__torch_dispatch__") for each in (kind, Tensor))
    return functions[0] in functions[1:] and dispatch is of_tensors


def same_layout(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether one flat index names the same element under both strides; dimensions of size 1 do not count."""
    return a == b or all(x == y for size, x, y in zip(shape, a, b, strict=True) if size > 1)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill their memory without holes or overlap, in whatever order of dimensions."""
    if 0 in shape:
        return True
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Spans:
    """Pieces of memory that may be moved, but keep their sizes.

    Args:
        sizes: Bytes of each; 0: it is left out.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._positions = torch.tensor([i for i, size in enumerate(sizes) if size], device="cpu")
        self._sizes = torch.tensor([size for size in sizes if size], dtype=torch.int64, device="cpu")

    def overlapping(self, starts: Tensor) -> set[int]:
        """Positions of those that share bytes with another one, starting at these addresses, int64 (n,)."""
        if not len(self._positions):
            return set()
        begin, order = starts[self._positions].sort()
        end = begin + self._sizes[order]
        if torch.all(begin[1:] >= end[:-1]):
            return set()
        end, last = end.cummax(0)  # of those before, the one that reaches furthest
        hits = begin[1:] < end[:-1]
        found = torch.cat([order[1:][hits], order[last[:-1][hits]]])
        return set(self._positions[found].tolist())


def address_of(t: Tensor) -> int:
    """Where a tensor's memory starts; 0 if it has none, or none of its own, as wrapper subclasses."""
    try:
        return 0 if isinstance(t, FakeTensor) else t.data_ptr()
    except RuntimeError:
        return 0


def lacks_memory(t: Tensor) -> bool:
    """Whether the memory of a plain tensor was taken away, as by `untyped_storage().resize_(0)`."""
    if (
        not is_plain(type(t))
        or t.layout is not torch.strided
        or t.device.type == "meta"
        or t._is_zerotensor()
    ):
        return False
    return t.numel() > 0 and address_of(t) == 0


def dispatch_keys(t: Tensor) -> int:
    """The keys by which torch's dispatcher knows a tensor, as the bits of an int64.

    They tell a conjugate or negated view, a tensor made in inference mode, a wrapper and the like from a
    plain tensor with the same address, dtype and layout.
    """
    keys: int = torch._C._dispatch_keys(t).raw_repr()
    return keys - (keys >> 63 << 64)


@functools.cache
def probes() -> tuple[tuple[Tensor, int], ...]:
    """Tensors that differ in all that C++ reads of tensors, which show it where that is kept.

    Returns:
        Each with its dispatch keys.
    """
    with torch.inference_mode():
        born_in_inference = torch.zeros(1, device="cpu")
    with torch.inference_mode(False):
        plain = torch.zeros(1, dtype=torch.complex64, device="cpu")
        far = torch.zeros(99, device="cpu")[77:80]
        tensors = [plain, plain.conj(), plain.conj().imag, torch.zeros((), device="cpu"), born_in_inference]
        tensors += [far, far.double(), far.bfloat16(), far.half(), torch.zeros(3, 2, 4, device="cpu")]
        tensors += [torch.zeros(3, device="meta")]
        return tuple((t, dispatch_keys(t)) for t in tensors)
