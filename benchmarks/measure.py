"""Time: steps of several optimizers in turn, and what the memory of the machine gives."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

BLOCKS = 3  # the machine is noisy: medians are taken of each third of the rounds


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use so many CPU threads; None: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_steps(step: Callable[[], object], n: int, device: torch.device) -> tuple[float, float]:
    """Time n back-to-back steps.

    Returns:
        Seconds per step by the wall clock, until the device has finished the last; and seconds per step
        between two events on the device. On a CPU both are the same.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(n):
            step()
        wall = (time.perf_counter() - start) / n
        return wall, wall
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    first.record()
    for _ in range(n):
        step()
    last.record()
    last.synchronize()
    return (time.perf_counter() - start) / n, first.elapsed_time(last) * 1e-3 / n


class Heat:
    """Contestants whose steps are timed in turn, so that a disturbance meets all of them.

    Attributes:
        seconds: Wall time per step of each contestant, one entry per turn.
        device_seconds: The same between events on the device.
    """

    # A step shorter than this is preceded by an untimed one: what its code and small tensors left in the
    # caches, the others have pushed out.
    WARM_BELOW = 0.02
    # Contestants slower than this, and than twice the fastest, take their turn in every third round.
    RARE_ABOVE = 0.2

    def __init__(
        self,
        steps: Mapping[str, Callable[[], object]],
        device: torch.device,
        before: Callable[[], object] = lambda: None,
        turn_seconds: float = 0.0,
    ) -> None:
        """Estimate how long each step takes.

        Args:
            steps: What to time, by name.
            device: Where it runs.
            before: Run before the steps of each turn, outside the time.
            turn_seconds: A turn is as many back-to-back steps as take so long, at least one.
        """
        self._steps = steps
        self._device = device
        self._before = before
        self._estimates: dict[str, float] = {}
        for name, step in steps.items():
            step()  # builds state and tables
            self._estimates[name] = time_steps(step, 1, device)[0]
        slow = max(self.RARE_ABOVE, 2 * min(self._estimates.values()))
        self._every = {name: 3 if s > slow else 1 for name, s in self._estimates.items()}
        self._rounds = 0
        self._batches = {name: max(1, int(turn_seconds / s)) for name, s in self._estimates.items()}
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}
        self.device_seconds: dict[str, list[float]] = {name: [] for name in steps}

    def rounds_in(self, seconds: float, least: int, most: int) -> int:
        """How many rounds take so long; divisible by the number of blocks."""
        turns = [
            (self._batches[name] + self._is_warmed(name)) * s / self._every[name]
            for name, s in self._estimates.items()
        ]
        rounds = max(least, min(most, int(seconds / sum(turns))))
        return -(-rounds // BLOCKS) * BLOCKS

    def _is_warmed(self, name: str) -> bool:
        return self._estimates[name] < self.WARM_BELOW

    def ready(self, name: str) -> None:
        """What precedes the timed steps of a turn."""
        if self._is_warmed(name):
            self._before()
            self._steps[name]()
        self._before()

    def turn(self, name: str) -> None:
        """Time one contestant."""
        self.ready(name)
        wall, on_device = time_steps(self._steps[name], self._batches[name], self._device)
        self.seconds[name].append(wall)
        self.device_seconds[name].append(on_device)

    def round(self, names: Iterable[str]) -> None:
        """Let each of these have its turn, if this is one of its rounds."""
        for name in names:
            if self._rounds % self._every[name] == 0:
                self.turn(name)
        self._rounds += 1

    def run(self, rounds: int) -> None:
        """Run so many rounds of all contestants."""
        for _ in range(rounds):
            self.round(self._steps)


def block_medians(seconds: Sequence[float]) -> list[float]:
    """The median of each third of the rounds; of all where there are fewer than three."""
    size = len(seconds) // BLOCKS
    if size == 0:
        return [median(seconds)] * BLOCKS
    return [median(seconds[i : i + size]) for i in range(0, size * BLOCKS, size)]


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
    numel = numel or (1 << 29 if device.type == "cuda" else 1 << 24)
    tensors = [torch.rand(numel, device=device) for _ in range(4)]
    p, g, _, _ = tensors

    def best(step: Callable[[], object]) -> float:
        step()
        return min(time_steps(step, 1, device)[1] for _ in range(rounds))

    nbytes = p.numel() * p.element_size()
    return Bandwidth(
        copy=2 * nbytes / best(lambda: p.copy_(g)),
        stream=7 * nbytes / best(lambda: _stream(*tensors)),
    )
