"""Where tensors are in memory and how they are laid out, and the guard that notices when that changes."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .distributed import is_dtensor, local_tensors
from .extension import load_extension

# `Optimizer.state`: a step reads only what it holds for the optimizer's own parameters, under `STATE_KEYS`.
# Whatever else users keep there is theirs.
State = Mapping[Any, Any]
# The last one is there with amsgrad only.
STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

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
    """Where a tensor's memory starts; 0 if it has none, or none of its own, as wrapper subclasses."""
    try:
        return 0 if isinstance(t, FakeTensor) else t.data_ptr()
    except RuntimeError:
        return 0


def lacks_memory(t: Tensor) -> bool:
    """Whether the memory of a plain tensor was taken away, as by `untyped_storage().resize_(0)`."""
    if type(t) not in PLAIN or t.layout is not torch.strided or t.device.type == "meta" or t._is_zerotensor():
        return False
    return t.numel() > 0 and address_of(t) == 0


def is_bound_to_inference(t: Tensor) -> bool:
    """Whether a tensor may be written to in inference mode alone: it was made there, and has no version.

    A parameter whose `.data` was made there keeps the version that it had, and stays writable.
    """
    if not t.is_inference():
        return False
    try:
        return t._version < 0
    except RuntimeError:
        return True


def dispatch_keys(t: Tensor) -> int:
    """The keys by which torch's dispatcher knows a tensor, as the bits of an int64.

    They tell a conjugate or negated view, a tensor made in inference mode, a wrapper and the like from a
    plain tensor with the same address, dtype and layout.
    """
    keys: int = torch._C._dispatch_keys(t).raw_repr()
    return keys - (keys >> 63 << 64)


class Gradients(NamedTuple):
    """The gradients of a step.

    Attributes:
        addresses: An int64 for each parameter: where its gradient's memory starts; 0 where there is none,
            never 0 where there is one, if only an empty one.
        tensors: The gradient of each parameter, of DTensors the local one; None where there is none. Kernels
            run without the GIL: as long as these are held, no other thread can free what they read.
        stepped: The parameters that have a gradient, and the local tensors of DTensors among them: autograd
            may have saved either.
    """

    addresses: bytes
    tensors: Sequence[Tensor | None]
    stepped: Sequence[Tensor]

    @classmethod
    def of(cls, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Gradients:
        """Those of parameters of any type; of DTensors, the local gradients."""
        addresses = array("q", [0 if g is None else address_of(g) or 1 for g in grads])
        stepped = list(compress(params, addresses))
        return cls(addresses.tobytes(), grads, stepped + local_tensors(filter(is_dtensor, stepped)))


class Tensors(NamedTuple):
    """What an optimizer holds when it steps.

    Attributes:
        groups: Its `param_groups`.
        state: Its state.
        grads: The gradients of all parameters, of DTensors the local ones.
    """

    groups: Sequence[Mapping[str, Any]]
    state: State
    grads: Sequence[Tensor | None]


class Guard:
    """Tells whether an optimizer's tensors are still where and as they were.

    Of DTensors, the local tensors and how they are placed are compared. It keeps neither parameters nor their
    state alive: what is moved away or left out is freed. Parameters are known by their id: another one in the
    place of one that died is no change if all else that a plan relies on is the same.

    Args:
        params: All parameters.
        grads: For each of them a tensor with the layout of its gradient, on its device or a meta tensor;
            None: it must have no gradient.
        state: `Optimizer.state`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        state: State,
    ) -> None:
        self._ids = list(map(id, params))  # weak references would keep users from torch.utils.swap_tensors
        known = state_tensors(params, state)
        self._keys = _keys(known)
        tensors = [*params, *_values(known)]
        self._addresses = list(map(address_of, local_tensors(tensors)))
        self._descriptions = list(map(_description, tensors))
        self._grads = [
            None if g is None else _expected(g, p.device) for p, g in zip(params, grads, strict=True)
        ]
        self._native = self._native_guard(params, known)

    def check(self, params: list[list[Tensor]], state: State) -> Gradients | None:
        """Check by one call into C++ (csrc/python/guard.h), which returns the gradients.

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
        if list(map(id, params)) != self._ids:
            return False
        known = state_tensors(params, state)
        if _keys(known) != self._keys:
            return False
        tensors = [*params, *_values(known)]
        return (
            list(map(address_of, local_tensors(tensors))) == self._addresses
            and list(map(_description, tensors)) == self._descriptions
            and all(
                grad is None or (not lacks_memory(grad) and _description(grad) == expected)
                for grad, expected in zip(grads, self._grads, strict=True)
            )
        )

    def _native_guard(
        self, params: Sequence[Tensor], known: Sequence[tuple[Tensor, dict[str, Tensor]]]
    ) -> Callable[[list[list[Tensor]], State], tuple[bytes, list[Tensor | None], list[Tensor]] | None] | None:
        """The check in C++; None where there is no extension, or it cannot check these tensors."""
        extension = load_extension()
        tensors = local_tensors([*params, *_values(known)])
        if isinstance(extension, str) or any(type(t) not in PLAIN for t in tensors):
            return None
        sample = functools.cache(lambda dtype, device: torch.empty(0, dtype=dtype, device=device))
        expected = tuple(
            None if g is None else (sample(g.dtype, g.device), g.shape, g.stride, g.keys) for g in self._grads
        )
        state = tuple((p, *(x for pair in s.items() for x in pair)) for p, s in known)
        try:
            guard = extension.make_guard(Tensor, tuple(params), expected, state, _probes())
        except (AttributeError, RuntimeError):  # no DLPack, or none that can describe these tensors
            return None
        return functools.partial(extension.check_guard, guard)


def is_counted(state: State, p: Tensor) -> bool:
    """Whether the state has a step count of a parameter: it has had a gradient."""
    of_p = state.get(p)
    return isinstance(of_p, Mapping) and "step" in of_p


def state_tensors(params: Iterable[Tensor], state: State) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The parameters that have state, in its order, each with the tensors there that a step reads."""
    own = set(map(id, params))
    return [
        (p, {key: value for key, value in s.items() if key in _STATE_KEYS and isinstance(value, Tensor)})
        for p, s in state.items()
        if id(p) in own and isinstance(s, Mapping)
    ]


_STATE_KEYS = frozenset(STATE_KEYS)


class _Description(NamedTuple):
    """What a plan relies on beside a tensor's address."""

    type: type
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    shape: tuple[int, ...] | None  # None for nested tensors, which are refused where they have a gradient
    stride: tuple[int, ...]
    keys: int
    spec: Any  # how a DTensor is placed; the rest is that of its local tensor


def _description(t: Tensor) -> _Description:
    local = local_tensors([t])[0]
    shape, stride = (None, ()) if local.is_nested else (tuple(local.shape), local.stride())
    keys, spec = dispatch_keys(local), getattr(t, "_spec", None)
    return _Description(type(local), local.dtype, local.device, local.layout, shape, stride, keys, spec)


def _expected(grad: Tensor, device: torch.device) -> _Description:
    """The description of a gradient, even if only a meta tensor shows its layout."""
    found = _description(grad)
    if grad.device.type == device.type:
        return found
    with torch.inference_mode(False):
        return found._replace(
            device=device, keys=dispatch_keys(torch.empty(0, dtype=grad.dtype, device=device))
        )


def _keys(known: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> list[tuple[int, list[str]]]:
    return [(id(p), list(s)) for p, s in known]


def _values(known: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> list[Tensor]:
    return [value for _, s in known for value in s.values()]


@functools.cache
def _probes() -> tuple[tuple[Tensor, int], ...]:
    """Tensors that differ in their dispatch keys, which show the guard in C++ where those are kept."""
    with torch.inference_mode():
        born_in_inference = torch.zeros(1, device="cpu")
    with torch.inference_mode(False):
        plain = torch.zeros(1, dtype=torch.complex64, device="cpu")
        tensors = (plain, plain.conj(), plain.conj().imag, torch.zeros((), device="cpu"), born_in_inference)
        return tuple((t, dispatch_keys(t)) for t in tensors)
