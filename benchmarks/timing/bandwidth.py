"""What the memory of the machine gives: by a copy, and by the traffic of AdamW without its arithmetic."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .interleaved import time_steps


@dataclass(frozen=True)
class Bandwidth:
    """Bytes read plus bytes written, per second.

    Attributes:
        copy: `Tensor.copy_`, one read and one write: memcpy, or a device-to-device copy.
        stream: Four reads and three writes, as in the update of AdamW; None: it was not measured.
    """

    copy: float
    stream: float | None


@functools.cache
def _stream_library() -> ctypes.CDLL:
    source = Path(__file__).with_name("stream.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "stream.so")
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


def _stream(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    if p.device.type == "cuda":
        from .stream_triton import stream

        stream(p, g, m, v)
    else:
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in (p, g, m, v)]
        _stream_library().stream(*addresses, ctypes.c_size_t(p.numel()), torch.get_num_threads())


def _seconds(step: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The best of some rounds."""
    step()
    return min(time_steps(step, 1, device)[1] for _ in range(rounds))


def bandwidth(
    device: torch.device, numel: int | None = None, *, stream: bool = True, rounds: int = 5
) -> Bandwidth:
    """Measure the bandwidth, with the CPU threads torch uses now.

    The memory that this takes is given back to the device.

    Args:
        device: Whose memory.
        numel: Values per tensor, a multiple of 4096; by default far more than any cache holds.
        stream: Whether to measure the stream, which takes a compiler on a CPU and Triton on a GPU.
        rounds: How often; the best counts.
    """
    numel = numel or (1 << 29 if device.type == "cuda" else 1 << 24)
    tensors = [torch.rand(numel, device=device) for _ in range(4)]
    nbytes = tensors[0].numel() * tensors[0].element_size()
    try:
        copying = _seconds(functools.partial(tensors[0].copy_, tensors[1]), device, rounds)
        streaming = _seconds(functools.partial(_stream, *tensors), device, rounds) if stream else None
    finally:
        tensors.clear()
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # otherwise torch's allocator keeps it
    return Bandwidth(2 * nbytes / copying, streaming and 7 * nbytes / streaming)
