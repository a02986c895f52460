"""What depends on the kind of device: CUDA graphs, copies that do not wait, numbers for kernels."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

# The kinds of devices that kernels are written for.
KINDS = ("cpu", "cuda")
NO_GPU = "torch sees no CUDA device"


def is_gpu(device: torch.device) -> bool:
    """Whether a device is one that the CUDA and Triton kernels are for."""
    return device.type == "cuda"


def has_gpu() -> bool:
    """Whether torch sees such a device."""
    return torch.cuda.is_available()


@functools.cache
def has_graphs() -> bool:
    """Whether this torch is built for devices whose work can be captured in graphs."""
    return torch.accelerator.current_accelerator() is not None


def gpu_names() -> list[str]:
    """What they are called."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


def refusal_of_runtime(version: str) -> str | None:
    """Why the GPUs here cannot be reached through a CUDA runtime; None: they can, or torch does not say.

    Args:
        version: That of the runtime, such as "13.0". It asks for a driver of its major version, or a newer
            one, whichever CUDA torch was built with.
    """
    if torch.version.hip is not None:
        return f"the extension was built with CUDA {version}, this torch with ROCm"
    driver_version = getattr(torch._C, "_cuda_getDriverVersion", None)
    served: int = driver_version() if driver_version else 0  # 12040 for CUDA 12.4
    if 0 < served // 1000 < int(version.partition(".")[0]):
        return (
            f"the extension was built with CUDA {version}, the driver serves CUDA {served // 1000}."
            f"{served % 1000 // 10}: update the driver, or build with CUDA {served // 1000}"
        )
    return None


def multiprocessors_of(device: int) -> int:
    """The number of multiprocessors of a GPU."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def on_gpu(device: int) -> AbstractContextManager[None]:
    """Makes a GPU the current one."""
    current: AbstractContextManager[None] = torch.cuda.device(device)
    return current


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the device is being captured into a CUDA graph."""
    return is_gpu(device) and torch.cuda.is_current_stream_capturing()


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


def scalar_on(device: torch.device, value: Any, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A number, or one element on any device, as a 0-dim tensor on this one; None: None.

    Without a copy from the host, which would synchronise.
    """
    if value is None:
        return None
    if isinstance(value, Tensor) and (is_gpu(value.device) or value.device.type == device.type):
        return value.to(device, dtype).reshape(())
    return torch.full((), float(value), dtype=dtype, device=device)
