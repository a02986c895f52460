"""Time steps of several optimizers in turn, so that a disturbance of the machine meets all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch

BLOCKS = 3  # machines are noisy: medians are taken of each third of the rounds


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use so many CPU threads; None: as it is."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_steps(
    step: Callable[[], object], n: int, device: torch.device, before: Callable[[], object] | None = None
) -> tuple[float, float]:
    """Time n back-to-back steps.

    Args:
        step: What to time.
        n: How often.
        device: Where it runs.
        before: Run before every step, outside the time.

    Returns:
        Seconds per step by the wall clock, until the device has finished the last; and seconds per step
        between two events on the device. On a CPU both are the same.
    """
    if before is not None:
        # What runs between the steps is left out only where each is timed on its own; it takes many of them
        # all the same to come to the steady state. On a GPU, host and device then wait for each other.
        alone = []
        for _ in range(n):
            before()
            alone.append(time_steps(step, 1, device))
        wall, on_device = (sum(seconds) / n for seconds in zip(*alone, strict=True))
        return wall, on_device
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


class Turn(NamedTuple):
    """Times of one turn of a peer, in seconds.

    Attributes:
        first: Wall time of its first step, which finds nothing of its own in the caches; None where a step is
            long and that makes little difference.
        wall: Wall time per step of the batch that follows.
        device: The same between events on the device.
    """

    first: float | None
    wall: float
    device: float


class InterleavedTimer:
    """Times the steps of several peers in turn.

    Attributes:
        turns: The turns of each peer so far.
    """

    # A step shorter than this is slower right after other work has pushed its code and small tensors out of
    # the caches: the first is timed on its own.
    WARM_BELOW = 0.02
    # That work: a pass over so many bytes, more than caches hold. It is the same for all peers; what the
    # previous one left in the caches is not.
    FLUSHED_BYTES = 1 << 27
    # Peers slower than this, and than twice the fastest, take their turn in every third round.
    RARE_ABOVE = 0.2

    def __init__(
        self,
        steps: Mapping[str, Callable[[], object]],
        device: torch.device,
        turn_seconds: float,
        before: Callable[[], object] | None = None,
        threads_of: Mapping[str, int | None] | None = None,
    ) -> None:
        """Find out how many steps of each make a batch.

        Args:
            steps: What to time, by name.
            device: Where it runs.
            turn_seconds: A batch is as many back-to-back steps as last so long, at least one.
            before: Run before every step, outside the time.
            threads_of: CPU threads of each peer; None: as it is.
        """
        self._steps = steps
        self._device = device
        self._before = before
        self._threads_of = threads_of or {}
        self._batches: dict[str, int] = {}
        self._estimates: dict[str, float] = {}
        for name, step in steps.items():
            with threads(self._threads_of.get(name)):
                time_steps(step, 1, device, before)  # builds state and tables
                n, seconds = 1, time_steps(step, 1, device, before)[0]
                while n * seconds < turn_seconds:  # the longer the batch, the shorter its steps
                    n = math.ceil(turn_seconds / seconds)
                    seconds = time_steps(step, n, device, before)[0]
            self._batches[name], self._estimates[name] = n, seconds
        slow = max(self.RARE_ABOVE, 2 * min(self._estimates.values()))
        self._every = {name: 3 if s > slow else 1 for name, s in self._estimates.items()}
        devices = {torch.device("cpu"), device}  # the host has caches too
        self._flushed = [torch.zeros(self.FLUSHED_BYTES // 4, device=d) for d in devices]
        self._rounds = 0
        self.turns: dict[str, list[Turn]] = {name: [] for name in steps}

    def _before_first(self) -> None:
        if self._before is not None:
            self._before()
        for tensor in self._flushed:
            tensor.add_(1)

    def round(self) -> None:
        """Give each peer its turn, if this is one of its rounds."""
        for name, step in self._steps.items():
            if self._rounds % self._every[name] == 0:
                with threads(self._threads_of.get(name)):
                    self.turns[name].append(self._turn(name, step))
        self._rounds += 1

    def _turn(self, name: str, step: Callable[[], object]) -> Turn:
        first = None
        if self._estimates[name] < self.WARM_BELOW:
            first, _ = time_steps(step, 1, self._device, self._before_first)
        return Turn(first, *time_steps(step, self._batches[name], self._device, self._before))

    def run(self, seconds: float, least: int, most: int) -> None:
        """Run rounds for so long, `least` to `most` of them; their number is divisible by `BLOCKS`."""
        end = time.perf_counter() + seconds
        while (
            self._rounds < least
            or (self._rounds < most and time.perf_counter() < end)
            or self._rounds % BLOCKS
        ):
            self.round()


def block_medians(turns: Sequence[Turn]) -> list[Turn]:
    """The medians of each third of the turns; of all where there are fewer than three."""
    size = len(turns) // BLOCKS
    blocks = [turns[i * size : (i + 1) * size] for i in range(BLOCKS)] if size else [turns] * BLOCKS
    return [
        Turn(*(None if None in seconds else median(seconds) for seconds in zip(*block, strict=True)))
        for block in blocks
    ]
