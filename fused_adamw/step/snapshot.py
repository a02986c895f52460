"""Snapshots: where and how an optimizer's tensors are, without keeping any of them alive."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..extension import load_extension
from ..fields import STATE_KEYS, State
from ..layout import address_of, dispatch_keys, is_dense, is_plain, probes

_STATE_KEYS = frozenset(STATE_KEYS)
_Key = tuple[Any, ...]
_NOWHERE: tuple[int, Mapping[str, int]] = (0, {})


class Form:
    """What a plan relies on beside a tensor's address; of a DTensor, that of its local tensor.

    Attributes:
        key: All of it, comparable: type, dtype, device, layout, shape, strides, dispatch keys, and how a
            DTensor is placed.
        type: The type of the tensor.
        dtype: Its dtype.
        device: Its device.
        shape: Its shape.
        stride: Its strides.
        numel: Its number of elements.
        is_copyable: Whether its values may be copied to plain memory: not of a subclass, sparse or the like.
        is_plain: Whether its memory may be read directly: not conjugate or the like either.
        is_dense: Whether its elements fill their memory without holes or overlap.
        is_inference: Whether it was made in inference mode.
        needs_memory: Whether it has elements, which must be somewhere.
    """

    __slots__ = (
        "device",
        "dtype",
        "is_copyable",
        "is_dense",
        "is_inference",
        "is_plain",
        "key",
        "needs_memory",
        "numel",
        "shape",
        "stride",
        "type",
    )

    def __init__(self, key: _Key, t: Tensor) -> None:
        self.key = key
        self.type, self.dtype, self.device, layout, self.shape, self.stride, _, _ = key
        self.numel = t.numel()
        self.is_copyable = is_plain(self.type) and layout is torch.strided and not t.is_nested
        self.is_plain = self.is_copyable and not (t.is_neg() or t.is_conj() or t._is_zerotensor())
        self.is_dense = self.is_plain and is_dense(self.shape, self.stride)
        self.is_inference = t.is_inference()
        self.needs_memory = self.is_plain and self.numel > 0 and self.device.type != "meta"

    @property
    def span(self) -> int:
        """The bytes from its address on that it fills; 0 if it is not plain and dense."""
        return self.numel * self.dtype.itemsize if self.is_dense else 0

    def of_grad(self, dtype: torch.dtype | None = None) -> Form:
        """The form of a new gradient that is laid out as this parameter, of its dtype or of another one."""
        _, own_dtype, device, layout, shape, stride, _, spec = self.key
        dtype = dtype or own_dtype
        with torch.inference_mode(False):
            keys = dispatch_keys(torch.empty(0, dtype=dtype, device=device))
            like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return Form((Tensor, dtype, device, layout, shape, stride, keys, spec), like)


class Forms:
    """Gives tensors of the same form the same object, so that what follows from it is worked out once."""

    def __init__(self) -> None:
        self._known: dict[_Key, Form] = {}

    def survey(self, tensors: Sequence[Tensor]) -> tuple[list[Form], array[int]]:
        """The forms of many tensors, and their addresses; of DTensors, those of the local tensors."""
        extension = load_extension()
        if not isinstance(extension, str) and all(map(is_plain, set(map(type, tensors)))):
            try:
                addresses, firsts = extension.survey(Tensor, list(tensors), probes())
            except (AttributeError, RuntimeError):  # no DLPack, or none that can describe these tensors
                pass
            else:
                positions = array("q", firsts)
                forms = {first: self(tensors[first]) for first in set(positions)}
                return list(map(forms.__getitem__, positions)), array("q", addresses)
        addresses = array("q", [address_of(getattr(t, "_local_tensor", t)) for t in tensors])
        return list(map(self, tensors)), addresses

    def __call__(self, t: Tensor) -> Form:
        """The form of a tensor."""
        local = getattr(t, "_local_tensor", t)
        shape, stride = ((), ()) if local.is_nested else (local.shape, local.stride())
        key = (
            type(local),
            local.dtype,
            local.device,
            local.layout,
            shape,
            stride,
            dispatch_keys(local),
            getattr(t, "_spec", None),
        )
        form = self._known.get(key)
        if form is None:
            form = self._known[key] = Form(key, local)
        return form


class Snapshot:
    """The parameters, the state and the gradients of an optimizer.

    Parameters are known by their id: another one in the place of one that died is no change if all else that
    a plan relies on is the same.

    Args:
        params: All parameters.
        grads: Their gradients, local ones of DTensors.
        state: `Optimizer.state`.

    Attributes:
        ids: Of all parameters.
        known: For each parameter that has state, in its order: the parameter, then name and value of the
            tensors that a step reads, until `forget`.
        forms: Of the tensors of the state, in its order, then of the parameters.
        addresses: Where they are, in the same order.
        grads: The form of each gradient; None where there is none.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], state: State) -> None:
        forms = Forms()
        self.ids = list(map(id, params))
        own = set(self.ids)
        self.known: list[tuple[Any, ...]] = []
        tensors: list[Tensor] = []
        names_of: dict[tuple[str, ...], dict[str, int]] = {}
        self._places: dict[int, tuple[int, dict[str, int]]] = {}
        for p, of_p in state.items():
            if id(p) not in own or not (type(of_p) is dict or isinstance(of_p, Mapping)):
                continue
            found: list[Any] = [p]
            for name, value in of_p.items():
                if name in _STATE_KEYS and isinstance(value, Tensor):
                    found += (name, value)
            self.known.append(tuple(found))
            names = tuple(found[1::2])
            if names not in names_of:
                names_of[names] = {name: i for i, name in enumerate(names)}
            self._places[id(p)] = (len(tensors), names_of[names])
            tensors += found[2::2]
        tensors += params
        present = [g for g in grads if g is not None]
        of_all, addresses = forms.survey([*tensors, *present])
        self.forms, self.addresses = of_all[: len(tensors)], addresses[: len(tensors)]
        of_grads = iter(of_all[len(tensors) :])
        self.grads = [None if g is None else next(of_grads) for g in grads]
        self._lacks_memory = 0 in addresses and any(
            form.needs_memory and not address for form, address in zip(of_all, addresses, strict=True)
        )

    def places(self, slot: int) -> tuple[int, Mapping[str, int]]:
        """Where `forms` has the tensors of a parameter's state: a position to add to that of each by name."""
        return self._places.get(self.ids[slot], _NOWHERE)

    def form(self, slot: int) -> Form:
        """The form of a parameter."""
        return self.forms[slot - len(self.ids)]

    def kind(self, slot: int, state: object) -> tuple[object, ...] | None:
        """What checks of a parameter depend on; None: on more than a snapshot knows.

        Args:
            slot: The parameter's position.
            state: Its state.
        """
        p, grad = self.form(slot), self.grads[slot]
        start, names = self.places(slot)
        is_known = isinstance(state, dict) and state.keys() == names.keys()
        is_plain = p.is_plain and (grad is None or grad.is_plain)
        if self._lacks_memory or not is_known or not is_plain:
            return None
        return (p, grad, *names, *self.forms[start : start + len(names)])

    def forget(self) -> None:
        """Let go of all tensors."""
        self.known = []

    def matches(self, expected: Snapshot, grads: Sequence[Form | None]) -> bool:
        """Whether this is as expected, except for where tensors are.

        Args:
            expected: An earlier snapshot.
            grads: What gradients must look like where they are present; None: there must be none.
        """
        return (
            self.ids == expected.ids
            and list(self._places.items()) == list(expected._places.items())
            and _same(self.forms, expected.forms)
            and not self._lacks_memory
            and all(
                found is None or (known is not None and found.key == known.key)
                for found, known in zip(self.grads, grads, strict=True)
            )
        )


def _same(a: Iterable[Form], b: Iterable[Form]) -> bool:
    return [form.key for form in a] == [form.key for form in b]
