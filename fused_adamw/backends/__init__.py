"""Which backends exist, which can run here and why not; picks one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from ..device import KINDS, NO_GPU, has_gpu, is_gpu
from . import native, reference

__all__ = [
    "BACKENDS",
    "BackendStatus",
    "available_backends",
    "build_info",
    "check_backend",
    "kernels_for",
    "reference",
]

build_info = native.build_info


def _triton() -> ModuleType | str:
    """The Triton backend, imported only when it is asked for; or why there is none."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        return importlib.import_module(".triton", __name__)
    except ImportError as error:
        return f"triton does not load ({error})"


class _Kernels(NamedTuple):
    load: Callable[[], ModuleType | str]  # a module as step.protocols.KernelBackend, or why there is none
    is_automatic_on_cpu: bool


# The backends that have kernels; "auto" takes the first one that can run.
_KERNELS = {
    "native": _Kernels(lambda: native, True),
    "triton": _Kernels(_triton, False),  # on the CPU it only interprets
}
BACKENDS = ("auto", *_KERNELS, "reference")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can step parameters of a device here.

    Attributes:
        backend: Its name, as `backend=` takes it.
        device: The kind of device: "cpu" or "cuda".
        reason: Why it cannot; None: it can.
    """

    backend: str
    device: str
    reason: str | None

    @property
    def available(self) -> bool:
        """Whether it can run."""
        return self.reason is None


def unavailable_reason(backend: str, device: torch.device) -> str | None:
    """None if `backend` can step parameters on `device`, else the reason."""
    if backend == "reference":
        return None
    module = _KERNELS[backend].load()
    if isinstance(module, str):
        return module
    reason: str | None = module.unavailable_reason(device)
    return reason


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(map(repr, BACKENDS))}")


def kernels_for(backend: str, device: torch.device) -> ModuleType | None:
    """The kernels that serve a device, None for the reference.

    Raises:
        RuntimeError: `backend` cannot run on `device`; says why, and what can.
    """
    if backend == "auto":
        names = [n for n, kernels in _KERNELS.items() if device.type != "cpu" or kernels.is_automatic_on_cpu]
        backend = next((name for name in names if unavailable_reason(name, device) is None), "reference")
    if backend == "reference":
        return None
    if reason := unavailable_reason(backend, device):
        usable = [name for name in BACKENDS[1:] if unavailable_reason(name, device) is None]
        raise RuntimeError(
            f"backend {backend!r} cannot run on {device}: {reason}. Available: {', '.join(usable)}"
        )
    module = _KERNELS[backend].load()
    assert not isinstance(module, str)
    return module


def available_backends() -> list[BackendStatus]:
    """Every backend on every kind of device: whether it can run here and, if not, why.

    Returns:
        One entry per backend and kind of device, in the order in which `backend="auto"` tries them.
    """
    devices = list(map(torch.device, KINDS))
    return [
        BackendStatus(backend, device.type, _status(backend, device))
        for backend in BACKENDS[1:]
        for device in devices
    ]


def _status(backend: str, device: torch.device) -> str | None:
    if is_gpu(device) and not has_gpu():
        built = native.build_info().get("cuda_archs") if backend == "native" else None
        return NO_GPU + (f" (built for {built})" if built else "")
    return unavailable_reason(backend, device)
