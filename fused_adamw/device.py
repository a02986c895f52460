"""What depends on the kind of device: CUDA graphs, copies that do not wait, numbers for kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the device is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DeviceTable:
    """Copies host tables to a device without waiting for it.

    The allocator of pinned memory keeps a staging buffer untouched until its copy is done. A captured graph
    repeats the copy at every replay, so its staging buffer is kept. Pinned memory cannot be allocated during
    a capture: each upload outside of one leaves a spare buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare: Tensor | None = None
        self._kept: list[Tensor] = []

    def upload(self, table: Tensor) -> Tensor:
        """Return a copy of `table` on the device; on the CPU, the table itself."""
        if self.device.type == "cpu":
            return table
        if not is_capturing(self.device):
            if self._spare is None:
                self._spare = torch.empty_like(table, pin_memory=True)
            return table.pin_memory().to(self.device, non_blocking=True)
        if self._spare is None:
            raise RuntimeError("run a step of the optimizer without capture before each capture")
        staging, self._spare = self._spare.copy_(table), None
        self._kept.append(staging)
        return staging.to(self.device, non_blocking=True)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64
