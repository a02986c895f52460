"""The pretend GPU from Python: its log of operations, and when they run."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

is_active = "PRETEND_GPU" in os.environ
_kept: list[object] = []  # what graphs may call at any later time


def _library() -> ctypes.PyDLL:
    # PyDLL: under the GIL, so that Python work that a stream has waiting can run.
    (path,) = Path(os.environ["PRETEND_GPU"]).glob("libcudart.so.*[0-9]")
    library = ctypes.PyDLL(str(path))
    library.pretend_gpu_log_size.restype = ctypes.c_size_t
    library.pretend_gpu_log_entry.restype = ctypes.c_char_p
    library.pretend_gpu_log_entry.argtypes = [ctypes.c_size_t]
    library.pretend_gpu_call.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return library


if is_active:
    library = _library()


def watch_blocks() -> None:
    """From now on know which blocks torch's allocator has given out."""
    ctypes.CDLL(str(Path(os.environ["PRETEND_GPU"]) / "blocks.so")).watch_blocks()


def note(entry: str) -> None:
    """Add a line to the log."""
    library.pretend_gpu_note(entry.encode())


def run_everything() -> None:
    """Let all streams do what they have waiting."""
    library.pretend_gpu_synchronize()


def without_owner(t: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory, which does not keep it: it dangles once `t` is gone."""
    as_cuda_array = type("CudaArray", (), {"__cuda_array_interface__": t.__cuda_array_interface__})()
    return torch.as_tensor(as_cuda_array, device=t.device)


def bytes_at(address: int, count: int) -> bytes:
    """What device memory holds, in use or not."""
    return ctypes.string_at(address, count)


def enqueue(stream: int, name: str, work: Callable[[], None]) -> None:
    """Append work to a stream, or to the graph that it is captured into."""
    function = ctypes.CFUNCTYPE(None)(work)
    _kept.append(function)
    library.pretend_gpu_call(stream, name.encode(), ctypes.cast(function, ctypes.c_void_p))


@contextlib.contextmanager
def operations() -> Iterator[list[str]]:
    """Record what is asked of the GPU inside the context.

    Yields:
        A list, filled when the context ends: "launch KERNEL", "operator NAME" (a kernel of torch),
        "copy BYTES pinned to device", "fill BYTES", "synchronize ...", "allocate ...", "event", "replay";
        after "captured" what goes into a graph, after "replayed" what it does.
    """
    recorded: list[str] = []
    library.pretend_gpu_set_logging(True)
    try:
        yield recorded
    finally:
        count = library.pretend_gpu_log_size()
        recorded += [library.pretend_gpu_log_entry(i).decode() for i in range(count)]
        library.pretend_gpu_set_logging(False)
