"""What a step asks of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..formats import Formats
from ..tables import Entry, Hyper, StepInputs, Tables


class KernelBackend(Protocol):
    """Kernels that walk the tables: `native` and `triton`."""

    def supports(self, device: torch.device, formats: Formats) -> bool:
        """Whether kernels can step a parameter that is kept so, with its gradient and moments."""

    def chunk_size(self, device: torch.device, numel: int) -> int:
        """Elements per chunk that suit the device and the number of elements in all."""

    def max_host_hypers(self, device: torch.device) -> int:
        """Up to how many hyper rows may stay in host memory."""

    def sum_of_squares(self, tables: Tables, chunks: Tensor, out: Tensor) -> None:
        """Write the sum of squares of the gradients in these chunks of the tables to `out`."""

    def update(self, tables: Tables, inputs: StepInputs) -> None:
        """Step every row that has a gradient."""


class ReferenceBackend(Protocol):
    """Plain PyTorch on lists of tensors."""

    def sum_of_squares(self, grads: Sequence[Tensor], out: Tensor) -> list[Tensor]:
        """Write the sum of squares of all gradients to `out`; returns that of each."""

    def update(
        self,
        entries: Sequence[Entry],
        grads: Sequence[Tensor],
        hypers: Sequence[Hyper],
        inputs: StepInputs,
        stats: Sequence[Tensor] | None = None,
    ) -> None:
        """Step every entry."""

    def rehearse(
        self, entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
    ) -> None:
        """Raise what `update` would raise; change nothing."""
