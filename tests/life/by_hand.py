"""The arithmetic of a step, followed by hand: that of AdamW in numpy, of averages, of a history of spikes."""

import math

import numpy as np
import oracle
from common import array
from test_averages import decay_of

from .held import AVERAGE, MAXIMUM, weight_of


class Spikes:
    """What a guard knows, followed by hand.

    Args:
        guard: The guard.
        before: What another guard knew, to go on with.
    """

    def __init__(self, guard, before=None):
        self.guard = guard
        self.norms = Series(guard, before and before.norms)
        self.losses = Series(guard, before and before.losses)

    def judge(self, norm, loss):
        """What becomes of a step, and the limit of its norm. Remembers neither."""
        limit = self.norms.limit()
        if not math.isfinite(norm) or (loss is not None and not math.isfinite(loss)):
            return "nonfinite", limit
        if loss is not None and loss > self.losses.limit():
            return "loss_spike", limit
        if norm > limit:
            return ("clipped_spike" if self.guard.on == "clip" else "spike"), limit
        return "stepped", limit

    def accept(self, outcome, norm, limit, loss):
        """Remember a step, unless it was skipped."""
        if outcome in ("stepped", "clipped_spike"):
            self.norms.accept(limit if outcome == "clipped_spike" else norm)
            if loss is not None:
                self.losses.accept(loss)


class Series:
    """The latest values that were accepted, and how many there were.

    A longer window than before is filled from what there is, and warms up anew until it is.
    """

    def __init__(self, guard, before=None):
        self.guard = guard
        self.latest = before.latest[-guard.window :] if before else []
        is_cut = before and len(self.latest) < min(before.accepted, guard.window)
        self.accepted = 0 if before is None else len(self.latest) if is_cut else before.accepted

    def accept(self, value):
        self.latest = [*self.latest, value][-self.guard.window :]
        self.accepted += 1

    def limit(self):
        if self.accepted < self.guard.warmup:
            return math.inf
        mean = np.mean(self.latest)
        return mean + self.guard.sigmas * max(np.std(self.latest, ddof=1), 1e-6 * abs(mean))


def average_weight(ema, step):
    """How far the average goes towards the parameter at the update with this number, 1 for the first."""
    since = step - ema.start_step
    if since <= ema.every:
        return 1.0
    if since % ema.every:
        return 0.0
    return 1.0 - decay_of(ema, since // ema.every - 1)


def update(old, g, hypers, step, scale):
    """What becomes of a parameter and of its moments in a step, before they are stored.

    Args:
        old: The parameter and its state before.
        g: The gradient.
        hypers: `oracle.Hypers` of its group.
        step: The number of the step, 1 for the first.
        scale: What the gradient is multiplied by.

    Returns:
        The parameter, in the precision in which it is stepped, and the moments by their keys.
    """
    p = weight_of(old)

    def moment(key):
        return array(old.state[key]).astype(p.dtype) if key in old.state else np.zeros_like(p)

    m, v, v_max = map(moment, ("exp_avg", "exp_avg_sq", MAXIMUM))
    p, m, v, new_max = oracle.adamw(p, array(g).astype(p.dtype), m, v, v_max, hypers, step, scale)
    moments = {"exp_avg": m, "exp_avg_sq": v}
    if hypers.amsgrad or MAXIMUM in old.state:
        moments[MAXIMUM] = new_max if hypers.amsgrad else array(old.state[MAXIMUM])
    return p, moments


def average(ema, old, new, step):
    """What becomes of an average: it begins with what its parameter was before the step that made it."""
    p, weight = weight_of(new), average_weight(ema, step)
    before = array(old.state[AVERAGE]) if AVERAGE in old.state else weight_of(old)
    if not weight:
        return before
    before = before.astype(p.dtype)
    if weight >= 0.5:
        return p + p.dtype.type(weight - 1.0) * (p - before)
    return before + p.dtype.type(weight) * (p - before)
