"""The check before every step: are an optimizer's tensors as the plan found them, and where are they now?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import compress
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtensors import is_dtensor, local_tensors
from ..extension import load_extension
from ..fields import STATE_KEYS, State
from ..layout import address_of, is_plain, probes
from .snapshot import Form, Snapshot


class Found(NamedTuple):
    """What a step needs of the tensors that it found.

    Attributes:
        addresses: int64 on the host, for each parameter: where its gradient's memory starts; 0 where there is
            none, never 0 where there is one, if only an empty one. The next check may write to it.
        version: Equal in two steps of a plan only if the addresses are; None: not known.
        present: A byte for each parameter: whether it has a gradient.
        grads: The gradient of each parameter, of DTensors the local one; None where there is none. Kernels
            run without the GIL: as long as these are held, no other thread can free what they read. None:
            `stepped` holds them, and nobody needs them as objects.
        stepped: The parameters that have a gradient, and the local tensors of DTensors among them: autograd
            may have saved either. Or a capsule that holds them.
        moved: If parameters or state are elsewhere: an int64 for each of their tensors, as in
            `Snapshot.addresses`.
    """

    addresses: Tensor
    version: int | None
    present: bytes
    grads: Sequence[Tensor | None] | None
    stepped: Any
    moved: bytes | None

    @classmethod
    def of(cls, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Found:
        """Of parameters of any type and their gradients, local ones of DTensors."""
        addresses = [0 if g is None else address_of(g) or 1 for g in grads]
        stepped = list(compress(params, addresses))
        stepped += local_tensors(filter(is_dtensor, stepped))
        table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        return cls(table, None, bytes(map(bool, addresses)), grads, stepped, None)

    def count_changes(self) -> None:
        """Tell autograd that the parameters that have a gradient were changed."""
        if isinstance(self.stepped, list):
            torch.autograd.graph.increment_version(self.stepped)
        else:
            _extension().count_changes(self.stepped)


def _extension() -> ModuleType:
    extension = load_extension()
    if isinstance(extension, str):
        raise RuntimeError(extension)
    return extension


class Guard:
    """Tells whether an optimizer's tensors are as they were, by one call into C++ (csrc/python/guard.h).

    It keeps none of them alive: what is moved away or left out is freed.

    Args:
        params: All parameters.
        grads: What the gradient of each looks like; None: it must have none.
        snapshot: Where and how the tensors are.
        by_objects: Whether gradients are needed as objects: Python makes one for each new gradient.

    Raises:
        RuntimeError: There is no extension, or it cannot check these tensors; `Snapshot.matches` can.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Form | None],
        snapshot: Snapshot,
        *,
        by_objects: bool = False,
    ) -> None:
        self._extension = _extension()
        types = {form.type for form in snapshot.forms} | {form.type for form in grads if form is not None}
        if not all(map(is_plain, types)):
            raise RuntimeError("a tensor is of a type with functions of its own")
        sample = functools.cache(lambda dtype, device: torch.empty(0, dtype=dtype, device=device))
        described = {
            g: (sample(g.dtype, g.device), g.shape, g.stride, g.key[6], g.type)
            for g in set(grads)
            if g is not None
        }
        expected = tuple(None if g is None else described[g] for g in grads)
        self._addresses = torch.zeros(max(1, len(params)), dtype=torch.int64, device="cpu")
        try:
            self._recorded = self._extension.make_guard(
                Tensor,
                tuple(params),
                expected,
                tuple(snapshot.known),
                STATE_KEYS,
                probes(),
                self._addresses.data_ptr(),
                by_objects,
            )
        except AttributeError as error:  # no DLPack
            raise RuntimeError(str(error)) from error

    def check(self, params: list[list[Tensor]], state: State) -> Found | None:
        """Look for every tensor.

        Args:
            params: The parameters of each group now.
            state: The optimizer's state now.

        Returns:
            What was found; None if anything but addresses has changed, or if this check cannot tell.
        """
        found = self._extension.check_guard(self._recorded, params, state)
        return None if found is None else Found(self._addresses, *found)

    def move(self, addresses: bytes) -> None:
        """Expect tensors at these addresses from now on, as `check` found them."""
        self._extension.move_guard(self._recorded, addresses)
