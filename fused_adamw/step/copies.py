"""Copies of gradients that kernels cannot read where they are: laid out as their parameters, for one step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .guard import Found
from .members import Member


class GradCopies:
    """Copies gradients into the layout of their parameters.

    The copies are not kept after a step: they would take memory in forward and backward too, where most of it
    is needed.

    Args:
        members: The parameters that kernels step.

    Attributes:
        layouts: Slot to the form of the copy, for each gradient that has to be copied.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        layouts = {member.slot: member.kind.grad_copy for member in members}
        self.layouts = {slot: layout for slot, layout in layouts.items() if layout is not None}

    def within(self, found: Found) -> Found:
        """Put copies in the place of gradients that kernels cannot read; the gradients are not changed.

        Args:
            found: The gradients; as objects, if any are to be copied.
        """
        grads = list(found.grads or ())
        present = [slot for slot in self.layouts if grads[slot] is not None]
        if not present:
            return found
        copies = []
        for slot in present:
            form, grad = self.layouts[slot], grads[slot]
            assert grad is not None
            copy = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=form.device)
            copies.append(copy.copy_(grad).data_ptr() or 1)
            grads[slot] = copy
        places, table = (torch.tensor(n, dtype=torch.int64, device="cpu") for n in (present, copies))
        addresses = found.addresses.index_copy(0, places, table)  # the next check writes to that of `found`
        return found._replace(addresses=addresses, version=None, grads=grads)
