"""Where tensors are in memory and how they are laid out, and the guard that notices when that changes."""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .distributed import local_tensors
from .extension import load_extension

State = Mapping[Tensor, Mapping[str, object]]

# Types that are nothing but their memory.
PLAIN = (Tensor, nn.Parameter)


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


def overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """Positions of the plain, dense tensors that share memory with another one."""
    spans = [
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i)
        for i, t in enumerate(tensors)
        if type(t) in PLAIN and t.numel() and is_dense(t)
    ]
    found: set[int] = set()
    last_end, last = 0, -1
    for start, end, i in sorted(spans):
        if start < last_end:
            found |= {last, i}
        if end > last_end:
            last_end, last = end, i
    return found


def address_of(t: Tensor) -> int:
    """Where a tensor's memory starts; an identity for what has no memory of its own."""
    try:
        return id(t) if isinstance(t, FakeTensor) else t.data_ptr()
    except RuntimeError:
        return id(t)


def lacks_memory(t: Tensor) -> bool:
    """Whether the memory of a plain tensor was taken away, as by `untyped_storage().resize_(0)`."""
    is_plain = type(t) in PLAIN and t.layout is torch.strided and t.device.type != "meta"
    return is_plain and t.numel() > 0 and t.data_ptr() == 0


def same_objects(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


class Gradients(NamedTuple):
    """The gradients of a step.

    Attributes:
        addresses: An int64 for each parameter: where its gradient's memory starts; 0 where there is none,
            never 0 where there is one, if only an empty one.
        tensors: The gradient of each parameter, of DTensors the local one; None where there is none. Kernels
            run without the GIL: as long as these are held, no other thread can free what they read.
    """

    addresses: bytes
    tensors: Sequence[Tensor | None]

    @classmethod
    def of(cls, grads: Sequence[Tensor | None]) -> Gradients:
        """These, of any type."""
        addresses = array("q", [0 if g is None else address_of(g) or 1 for g in grads])
        return cls(addresses.tobytes(), grads)


class Guard:
    """Tells whether an optimizer's tensors are still where and as they were.

    Of DTensors, the local tensors are compared. It keeps the parameters alive, but not their state: moments
    that are moved away, to save memory, are freed.

    Args:
        params: All parameters.
        grads: For each of them a tensor with the layout of its gradient; None: it must have no gradient.
        state: `Optimizer.state`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        state: State,
    ) -> None:
        self._params = tuple(params)
        self._keys = _keys(state)
        tensors = local_tensors([*params, *_tensors(state)])
        self._addresses = list(map(address_of, tensors))
        self._columns = _columns(tensors)
        self._has_grad = [grad is not None for grad in grads]
        self._grad_columns = _columns([p if g is None else g for p, g in zip(params, grads, strict=True)])
        self._native = self._native_guard(grads, state, tensors)

    def check(self, params: list[list[Tensor]], state: State) -> Gradients | None:
        """Check by one call into C++ (csrc/guard.h), which returns the gradients.

        Args:
            params: The parameters of each group now.
            state: The optimizer's state now.

        Returns:
            None if anything else has changed, or if this check cannot tell; then `matches` can.
        """
        found = None if self._native is None else self._native(params, state)
        return None if found is None else Gradients(*found)

    def matches(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], state: State) -> bool:
        """Whether parameters and state are unchanged, and gradients have the recorded layouts.

        Args:
            params: All parameters now.
            grads: Their gradients now, local ones of DTensors.
            state: The optimizer's state now.
        """
        if not same_objects(params, self._params) or _keys(state) != self._keys:
            return False
        tensors = local_tensors([*params, *_tensors(state)])
        is_there = [grad is not None for grad in grads]
        present = [grad for grad in grads if grad is not None]
        return (
            list(map(address_of, tensors)) == self._addresses
            and _columns(tensors) == self._columns
            and not any(there > known for there, known in zip(is_there, self._has_grad, strict=True))
            and not any(map(lacks_memory, present))
            and _columns(present) == [list(compress(column, is_there)) for column in self._grad_columns]
        )

    def _native_guard(
        self, grads: Sequence[Tensor | None], state: State, tensors: Sequence[Tensor]
    ) -> Callable[[list[list[Tensor]], State], tuple[bytes, list[Tensor | None]] | None] | None:
        """The check in C++; None where there is no extension, or it cannot check these `tensors`."""
        extension = load_extension()
        if isinstance(extension, str) or any(type(t) not in PLAIN for t in tensors):
            return None
        sample = functools.cache(lambda dtype, device: torch.empty(0, dtype=dtype, device=device))
        expected = tuple(
            None if g is None else (sample(g.dtype, p.device), tuple(g.shape), g.stride())
            for p, g in zip(self._params, grads, strict=True)
        )
        nested = tuple(
            (p, *(x for name, v in s.items() for x in (name, v if isinstance(v, Tensor) else None)))
            for p, s in state.items()
        )
        try:
            guard = extension.make_guard(Tensor, self._params, expected, nested)
        except (AttributeError, RuntimeError):  # no DLPack, or none that can describe these tensors
            return None
        return functools.partial(extension.check_guard, guard)


def _keys(state: State) -> list[tuple[int, list[tuple[str, bool]]]]:
    """Which parameters have state, and under which names it has tensors. Kernels read nothing else of it."""
    return [(id(p), [(name, isinstance(v, Tensor)) for name, v in s.items()]) for p, s in state.items()]


def _tensors(state: State) -> list[Tensor]:
    return [v for s in state.values() for v in s.values() if isinstance(v, Tensor)]


def _columns(tensors: Sequence[Tensor]) -> list[Sequence[object]]:
    """What kernels rely on beside the addresses of tensors, and the types of the tensors."""
    return [
        list(map(type, tensors)),
        [t.dtype for t in tensors],
        [t.layout for t in tensors],
        [t.shape for t in tensors],
        list(map(Tensor.stride, tensors)),
        list(map(Tensor.is_neg, tensors)),
    ]
