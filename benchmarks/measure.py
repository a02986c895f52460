"""Time: steps of several optimizers in turn, and what the memory of the machine gives."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

BLOCKS = 3  # the machine is noisy: medians are taken of each third of the rounds


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use so many CPU threads; None: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_steps(step: Callable[[], object], n: int, device: torch.device) -> float:
    """Seconds per step of n back-to-back steps, by the wall clock, until the device has finished the last."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / n


def time_on_device(step: Callable[[], object], n: int) -> float:
    """Seconds per step of n back-to-back steps between two CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / n


@dataclass
class Heat:
    """Contestants whose steps are timed in turn, so that a disturbance meets all of them.

    Attributes:
        steps: What to time, by name.
        device: Where it runs.
        before: Run before each contestant's turn, outside the time.
        seconds: Per step, one entry per round.
    """

    steps: dict[str, Callable[[], object]]
    device: torch.device
    before: Callable[[], object] = lambda: None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def turn(self, name: str, n: int = 1) -> None:
        """Time one contestant: n steps, after an untimed one that brings code and small tensors to mind."""
        self.ready(name)
        self.seconds.setdefault(name, []).append(time_steps(self.steps[name], n, self.device))

    def ready(self, name: str) -> None:
        """What precedes the timed steps of a turn."""
        self.before()
        self.steps[name]()
        self.before()

    def run(self, seconds: float, least_rounds: int = BLOCKS, batch_seconds: float = 0.0) -> None:
        """Run rounds for about so many seconds; a turn lasts at least `batch_seconds`."""
        batches = {}
        for name, step in self.steps.items():
            once = max(time_steps(step, 1, self.device) for _ in range(2))
            batches[name] = max(1, int(batch_seconds / max(once, 1e-7)))
        deadline = time.perf_counter() + seconds
        rounds = 0
        while rounds < least_rounds or time.perf_counter() < deadline:
            for name, n in batches.items():
                self.turn(name, n)
            rounds += 1


def block_medians(seconds: Sequence[float]) -> list[float]:
    """The median of each third of the rounds."""
    size = max(1, len(seconds) // BLOCKS)
    return [median(seconds[i : i + size]) for i in range(0, size * BLOCKS, size) if seconds[i : i + size]]


def block_ratios(ours: Sequence[float], peer: Sequence[float]) -> list[float]:
    """The ratio of medians peer / ours in each third of the rounds."""
    return [b / a for a, b in zip(block_medians(ours), block_medians(peer), strict=False)]


@dataclass(frozen=True)
class Bandwidth:
    """What the memory gives: bytes read plus bytes written, per second.

    Attributes:
        copy: `Tensor.copy_`, one read and one write: memcpy, or a device-to-device copy.
        stream: Four reads and three writes, as in the update of AdamW.
    """

    copy: float
    stream: float


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


def bandwidth(device: torch.device, numel: int | None = None, rounds: int = 5) -> Bandwidth:
    """Measure it, with the CPU threads torch uses now: the best of some rounds.

    Args:
        device: Whose memory.
        numel: Values per tensor; by default far more than any cache holds.
        rounds: How often.
    """
    numel = numel or (1 << 29 if device.type == "cuda" else 1 << 25)
    tensors = [torch.zeros(numel, device=device) for _ in range(4)]
    p, g, _, _ = tensors
    timer = time_on_device if device.type == "cuda" else functools.partial(time_steps, device=device)

    def best(step: Callable[[], object]) -> float:
        step()
        return min(timer(step, n=1) for _ in range(rounds))

    nbytes = p.numel() * p.element_size()
    return Bandwidth(
        copy=2 * nbytes / best(lambda: p.copy_(g)),
        stream=7 * nbytes / best(lambda: _stream(*tensors)),
    )
