"""What a step does besides the rule, in numpy: averages of parameters, and what it finds out of chunks."""

from __future__ import annotations

import math

import numpy as np

from fused_adamw.tables import WARMUPS, Averaging

STATS = 5  # numbers of a chunk


def average_weight(averaging: Averaging, step: int) -> float:
    """How much of the way to the parameter the average goes at update number `step`, 1 for the first."""
    updates, every = step - averaging.start_step, averaging.every
    if updates <= every:
        return 1.0
    if updates % every:
        return 0.0
    made = updates // every - 1
    warm = {
        None: 1.0,
        "timm": 1 - (1 + made) ** (-2 / 3),
        "diffusers": (1 + made) / (10 + made),
    }[WARMUPS[averaging.warmup]]
    return 1.0 - min(averaging.decay, warm)


def lerp(start: np.ndarray, end: np.ndarray, weight: float) -> np.ndarray:
    """As torch does it: from the end that it is nearer to."""
    T = start.dtype.type
    with np.errstate(all="ignore"):
        if weight < 0.5:
            return start + T(weight) * (end - start)
        return end - (end - start) * T(1 - weight)


def chunk_stats(before: np.ndarray, after: np.ndarray, grad: np.ndarray, is_bfloat16: bool) -> list[float]:
    """Of the parameter before and after a step, before it is rounded, and the gradient as it is stored."""
    with np.errstate(all="ignore"):
        update = after - before
        squares = [float(np.sum(x.astype(np.float64) ** 2)) for x in (grad, update, after)]
        lost = 0
        if is_bfloat16:
            least = -125  # of the least normal number, which zeros and subnormal ones are measured by
            exponent = np.where(before == 0, least, np.maximum(np.frexp(before)[1], least))
            half_unit = np.ldexp(np.float64(1), exponent - 9)
            size = np.abs(update.astype(np.float64))
            lost = np.count_nonzero((size < half_unit) & (size > 0))
    largest = math.nan if np.isnan(grad).any() else float(np.abs(grad).max(initial=0.0))
    return [squares[0], largest, squares[1], squares[2], float(lost)]
