"""What becomes of steps, and what is remembered of them, in Python: written from what a guard promises."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

import oracle

from fused_adamw.tables import SpikeOptions

OUTCOMES = ("stepped", "clipped_spike", "overflow", "nonfinite", "spike", "loss_spike")
REFUSED = 8  # norms of skipped steps that are kept
UNSET = 7.0  # where nothing has been written


class Found(NamedTuple):
    """What a step left in the status."""

    grad_norm: float
    outcome: str


@dataclass
class Accepted:
    """The values of a series, all that there ever were."""

    spikes: SpikeOptions
    values: list[float] = field(default_factory=list)

    @property
    def latest(self) -> list[float]:
        return self.values[-self.spikes.window :]

    @property
    def limit(self) -> float:
        """What the next one must not exceed, once there are enough."""
        mean = statistics.fmean(self.latest)
        deviation = statistics.stdev(self.latest) if len(self.latest) > 1 else 0.0
        return mean + self.spikes.sigmas * max(deviation, 1e-6 * abs(mean))

    def exceeds(self, x: float) -> bool:
        return len(self.values) >= self.spikes.warmup and bool(self.values) and x > self.limit

    def words(self) -> list[float]:
        ring = [UNSET] * self.spikes.window
        for i, value in enumerate(self.values):
            ring[i % self.spikes.window] = value
        return [self.limit if self.values else UNSET, float(len(self.values)), *ring]


class Outcomes:
    """Of the steps of one optimizer."""

    def __init__(self, spikes: SpikeOptions) -> None:
        self.spikes = spikes
        self.counts = dict.fromkeys(OUTCOMES, 0)
        self.norms, self.losses = Accepted(spikes), Accepted(spikes)
        self.ring = [UNSET] * REFUSED
        self.streak = 0
        self.last = (0.0, 1.0, "stepped")

    def step(self, norm, max_grad_norm, loss_scale, found_inf, skip_nonfinite, loss) -> tuple[bool, float]:
        """One step. `norm`: None without a norm pass.

        Returns:
            Whether it is skipped, and what gradients are multiplied by.
        """
        outcome, scale = "stepped", 1.0 / loss_scale
        if norm is not None:
            limit = max_grad_norm
            if self.spikes.window:
                if self.norms.exceeds(norm):
                    outcome = "clipped_spike" if self.spikes.clips else "spike"
                if self.spikes.clips and self.norms.exceeds(math.inf):
                    limit = min(limit, self.norms.limit)
                if loss is not None and self.losses.exceeds(loss):
                    outcome = "loss_spike"
            bad = [x for x in (norm, loss) if x is not None and not math.isfinite(x)]
            if (self.spikes.window and bad) or (skip_nonfinite and not math.isfinite(norm)):
                outcome = "nonfinite"
            scale *= oracle.clip_coefficient(norm, limit)
        if found_inf:
            outcome = "overflow"
        self.counts[outcome] += 1
        self.last = (0.0 if norm is None else norm, loss_scale, outcome)
        if self.spikes.window and norm is not None:
            self.remember(norm, loss, outcome)
        return outcome not in ("stepped", "clipped_spike"), scale

    def remember(self, norm: float, loss: float | None, outcome: str) -> None:
        if outcome in ("nonfinite", "spike", "loss_spike"):
            self.ring[self.streak % REFUSED] = norm
            self.streak += 1
        elif outcome != "overflow":
            self.streak = 0
            self.norms.values.append(self.norms.limit if outcome == "clipped_spike" else norm)
            if loss is not None:
                self.losses.values.append(loss)

    @property
    def found(self) -> Found:
        return Found(self.last[0], self.last[2])

    def words(self) -> list[float]:
        """Of the status, and what follows it."""
        norm, loss_scale, outcome = self.last
        words = [norm, loss_scale, float(OUTCOMES.index(outcome)), *map(float, self.counts.values())]
        if self.spikes.window:
            words += [float(self.streak), *self.ring, *self.norms.words(), *self.losses.words()]
        return words
