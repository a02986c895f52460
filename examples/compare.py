"""What the runs say about the optimizers: pure functions of the rows of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from loop import AMP_DTYPES, Row
from scipy import stats

SAME_PATH_STEPS = 50


def loss_differences(a: Sequence[Row], b: Sequence[Row]) -> np.ndarray:
    """Return |difference| of two training-loss curves, step by step, as far as both go."""
    steps = min(len(a), len(b))
    losses = np.array([[row["train_loss"] for row in rows[:steps]] for rows in (a, b)], dtype=float)
    return np.abs(losses[0] - losses[1])


def tolerance(amp: str | None) -> float:
    """Return how far two equal optimizers may part in the first steps.

    In mixed precision a last-bit difference of two float32 weights can round to neighbouring half-precision
    numbers, so the curves part by multiples of that precision whatever the optimizer.
    """
    return 1e-4 if amp is None else 32 * torch.finfo(AMP_DTYPES[amp]).eps


def same_path(differences: np.ndarray, allowed: float) -> bool:
    """Whether the first steps of two curves are the same; a loss that is not a number is never the same."""
    return bool((differences[:SAME_PATH_STEPS] <= allowed).all())


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a whole training step and of its clip and update."""

    step_ms: float
    optimizer_ms: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Timing:
        return cls(*(float(np.median([row[name] for row in rows])) for name in ("step_ms", "optimizer_ms")))

    @property
    def share(self) -> float:
        return self.optimizer_ms / self.step_ms


def best_validation(rows: Sequence[Row], loss: str = "val_loss") -> Row:
    """Return the row with the lowest validation loss, or with the lowest of another name."""
    validated = [row for row in rows if row[loss] is not None]
    return min(validated, key=lambda row: row[loss] if math.isfinite(row[loss]) else math.inf)


@dataclass(frozen=True)
class Gain:
    """What hygiene gains over uniform decay, seed by seed; positive where hygiene is better."""

    gains: tuple[float, ...]

    @classmethod
    def of(cls, hygiene: Sequence[float], uniform: Sequence[float], score: str) -> Gain:
        sign = -1 if score == "perplexity" else 1  # of the scores, only perplexity is better when lower
        return cls(tuple(sign * (a - b) for a, b in zip(hygiene, uniform, strict=True)))

    @property
    def mean(self) -> float:
        return float(np.mean(self.gains))

    @property
    def spread(self) -> float | None:
        """The standard deviation from seed to seed; None for a single seed."""
        return float(np.std(self.gains, ddof=1)) if len(self.gains) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean gain; None for a single seed."""
        if self.spread is None:
            return None
        count = len(self.gains)
        half = float(stats.t.ppf(0.975, count - 1)) * self.spread / math.sqrt(count)
        return self.mean - half, self.mean + half

    def verdict(self) -> str:
        """Say who wins, or that nobody does, in a sentence."""
        if self.interval is None:
            return "One seed shows no spread, so this says nothing about which is better: try --seeds 3."
        low, high = self.interval
        evidence = (
            f"mean gain {self.mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, {len(self.gains)} seeds"
        )
        if low > 0:
            return f"Hygiene is better here, by more than seeds explain ({evidence})."
        if high < 0:
            return f"Uniform decay is better here, by more than seeds explain ({evidence})."
        return f"No winner: the difference is within what seeds explain ({evidence})."


def jsonable(row: Row) -> dict[str, Any]:
    """Replace what JSON cannot say (NaN, infinity) by null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
