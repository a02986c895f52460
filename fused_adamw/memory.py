"""What a kernel takes for granted of a tensor: where its memory is, and how it is laid out."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .extension import load_extension

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


def any_fake(tensors: Iterable[Tensor]) -> bool:
    """Whether some are of a FakeTensorMode: asking those for their memory warns."""
    return any(isinstance(t, FakeTensor) for t in tensors)


def addresses_of(tensors: Sequence[Tensor], *, fake: bool = False) -> list[int]:
    """Where each tensor's memory starts. `fake` tells whether some may be fake."""
    try:
        return list(map(address_of if fake else Tensor.data_ptr, tensors))
    except RuntimeError:
        return list(map(address_of, tensors))


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
        if self._guards is not None and self._guards.check(*tensors):
            return True
        is_there = [t is not None for t in tensors]
        present = [t for t in tensors if t is not None]
        return _columns(present) == [list(compress(column, is_there)) for column in self._columns]


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


def grad_addresses_of(grads: Sequence[Tensor | None], *, fake: bool = False) -> list[int]:
    """Addresses of gradients: 0 where there is none, never 0 where there is one, if only an empty one."""
    try:
        addresses = list(map(address_of if fake else Tensor.data_ptr, grads))  # type: ignore[arg-type]
    except (AttributeError, TypeError, RuntimeError):  # some are absent, or have no memory of their own
        return [0 if g is None else address_of(g) or 1 for g in grads]
    return addresses if all(addresses) else [address or 1 for address in addresses]


class StateSnapshot:
    """An optimizer's state as it was: which objects it held, and where and what its tensors were.

    The tensors are held in C++, so that one call compares them all. Nobody swaps what is inside them, which
    `torch.utils.swap_tensors` refuses for a tensor that others hold; of parameters it may be asked.

    Args:
        state: `Optimizer.state`.
        held: From tensors to those that kernels read of them: the local tensors of DTensors.
    """

    def __init__(
        self,
        state: Mapping[Tensor, Mapping[str, object]],
        held: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
    ) -> None:
        self._objects = tuple(
            x if isinstance(x, Tensor) else None for p, s in state.items() for x in (p, *s.values())
        )
        tensors = [v for s in state.values() for v in s.values() if isinstance(v, Tensor)]
        local = held(tensors)
        # What stands for another tensor may come to stand for a third.
        self._stand_ins = [t for t, mine in zip(tensors, local, strict=True) if t is not mine]
        self._held = held
        self._held_then = held(self._stand_ins)
        extension = load_extension()
        self._same_state = _same_state if isinstance(extension, str) else extension.same_state
        plain = all(type(t) is Tensor and t.layout is torch.strided for t in local)
        if isinstance(extension, str) or not plain:
            self._are_unmoved = _watch_in_python(local)
        else:
            objects = [i for t in local for i in (t._cdata, t.untyped_storage()._cdata)]
            watch = torch.ops.fused_adamw.watch(local, objects)
            weakref.finalize(self, extension.unwatch, watch).atexit = False
            self._are_unmoved = functools.partial(extension.is_unmoved, watch)

    def matches(self, state: Mapping[Tensor, Mapping[str, object]]) -> bool:
        """Whether the state holds the same tensors, each with the same address, dtype, shape and strides."""
        return bool(
            self._same_state(state, self._objects)
            and same_objects(self._held(self._stand_ins), self._held_then)
            and self._are_unmoved()
        )


def _same_state(state: Mapping[Tensor, Mapping[str, object]], objects: Sequence[object]) -> bool:
    """csrc/same_state.h, where there is no extension."""
    found = [x for p, s in state.items() for x in (p, *s.values())]
    return len(found) == len(objects) and all(
        y is None or x is y for x, y in zip(found, objects, strict=True)
    )


def _watch_in_python(tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """Watch of csrc/bindings.cpp, for tensors of any type and where there is no extension."""
    fake = any_fake(tensors)
    addresses, columns = addresses_of(tensors, fake=fake), _columns(tensors)
    return lambda: addresses_of(tensors, fake=fake) == addresses and _columns(tensors) == columns
