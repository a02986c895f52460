"""An optimizer, and what is expected of it whatever has happened to it.

A step is, bit for bit, that of an optimizer that was made for this step alone; and, wherever numpy has the
formats, that of AdamW in numpy, with averages and a history of spikes that are followed by hand.
"""

import copy
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import oracle
import torch
from common import array
from torch import nn

from fused_adamw import FusedHygieneAdamW

from . import by_hand
from .by_hand import Spikes
from .held import (
    AVERAGE,
    Held,
    assert_equal,
    assert_held,
    assert_stored,
    held_by,
    name_of,
    replica,
    stored_as,
    weight_of,
)


class Inputs(NamedTuple):
    """What a step is given besides gradients."""

    loss_scale: float | None = None
    found_inf: bool | None = None
    loss: float | None = None


class Life:
    """An optimizer, how it was built, and what is expected of it.

    Args:
        groups: With the options of each.
        is_in_numpy: Whether numpy has the formats of parameters and moments.
        options: Of the optimizer.
    """

    def __init__(self, groups, is_in_numpy, **options):
        self.options = options
        self.is_in_numpy = is_in_numpy
        self.given = list(map(_as_it_came, groups))  # in the order of the groups now
        self.optimizer = FusedHygieneAdamW(groups, **options)
        self.spikes = Spikes(options["guard"]) if options["guard"] else None
        self.counts = Counter()

    @property
    def groups(self):
        return self.optimizer.param_groups

    @property
    def params(self):
        return [p for group in self.groups for p in group["params"]]

    def add_group(self, group):
        self.given.append(_as_it_came(group))
        self.optimizer.add_param_group(group)

    def _variant(self, index):
        """The options of the rule that a group came with."""
        given = self.given[index]
        names = ("weight_decay_mode", "cautious_weight_decay", "nesterov")
        return {**{name: given[name] for name in names}, "lr_ref": given["lr"] or 1.0}

    def resume(self, state_dict, **changes):
        """Go on as another program would: in a new optimizer, from a checkpoint.

        Args:
            state_dict: The checkpoint.
            changes: Of the options.
        """
        self.options |= changes
        groups = []
        for index, group in enumerate(self.groups):
            given = {key: value for key, value in self.given[index].items() if key != "params"}
            groups.append({**given, "params": group["params"]})
        self.optimizer = FusedHygieneAdamW(groups, **self._options_now())
        self.optimizer.load_state_dict(state_dict)

    def _options_now(self):
        now = {"max_grad_norm": self.optimizer.max_grad_norm, "stats": self.optimizer.stats}
        return {**self.options, **now}

    def newborn(self):
        """An optimizer that holds copies of all that this one does, and has made no step."""
        groups = []
        for index, group in enumerate(self.groups):
            params = []
            for p in group["params"]:
                params.append(nn.Parameter(replica(p), requires_grad=p.requires_grad))
                params[-1].grad_dtype = None
                params[-1].grad = None if p.grad is None else replica(p.grad)
            options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            groups.append({**options, **self._variant(index), "params": params})
        born = FusedHygieneAdamW(groups, **self._options_now())
        newborn = [p for group in born.param_groups for p in group["params"]]
        for p, q in zip(self.params, newborn, strict=True):
            if p in self.optimizer.state:
                born.state[q] = {key: replica(t) for key, t in self.optimizer.state[p].items()}
        if self.spikes:
            born.load_guard_state_dict(self.optimizer.guard_state_dict())
        return born

    def step(self, inputs):
        """Make a step, and compare all that it leaves."""
        before, other = held_by(self.optimizer), self.newborn()
        grads = [p.grad for p in self.params]
        kept = [None if g is None else replica(g) for g in grads]
        for optimizer in (self.optimizer, other):
            self._step(optimizer, inputs)
        for g, k in zip(grads, kept, strict=True):
            if g is not None:
                assert_equal(g, k, "a gradient")
        found = held_by(self.optimizer)
        assert_held(found, held_by(other))
        outcome = self._compare_outcomes(grads, inputs)
        if self.optimizer.stats or self._needs_norm():
            self._compare_stats(grads, found, outcome, inputs, other)
        if outcome not in ("stepped", "clipped_spike"):
            for one, same in zip(found, before, strict=True):
                assert torch.equal(one.p, same.p)
                assert all(torch.equal(one.state[key], t) for key, t in same.state.items())
        elif self.is_in_numpy and (self.options["ema"] is None or self.options["ema"].dtype is None):
            self._compare_with_numpy(before, found, grads)

    def _step(self, optimizer, inputs):
        if inputs.loss is not None and self.spikes:
            optimizer.observe(inputs.loss)
        if inputs.loss_scale is not None:  # as a GradScaler does
            optimizer.grad_scale = torch.tensor(inputs.loss_scale)
            optimizer.found_inf = torch.tensor(float(inputs.found_inf))
        optimizer.step()
        if inputs.loss_scale is not None:
            del optimizer.grad_scale, optimizer.found_inf

    def _needs_norm(self):
        return bool(self.spikes or self.optimizer.max_grad_norm or self.options["skip_nonfinite"])

    def _compare_outcomes(self, grads, inputs):
        """Find out by hand what becomes of the step, and by what it multiplies gradients."""
        loss = inputs.loss if self.spikes else None
        self.scale = 1.0 / (inputs.loss_scale or 1.0)
        outcome, max_grad_norm = "stepped", self.optimizer.max_grad_norm
        if self._needs_norm():
            squares = (np.square(array(g).astype(np.float64)).sum() for g in grads if g is not None)
            norm = math.sqrt(math.fsum(squares)) * self.scale
            measured = self.optimizer._status[0].item()
            np.testing.assert_allclose(measured, norm, rtol=1e-7)
            limit = math.inf
            if self.spikes:
                outcome, limit = self.spikes.judge(measured, loss)
            elif self.options["skip_nonfinite"] and not math.isfinite(norm):
                outcome = "nonfinite"
            if outcome == "clipped_spike" or (self.spikes and self.spikes.guard.on == "clip"):
                max_grad_norm = min(limit, max_grad_norm or math.inf)
            if max_grad_norm is not None:
                self.scale *= oracle.clip_coefficient(measured, max_grad_norm)
        if inputs.found_inf:
            outcome = "overflow"
        if self.spikes:
            self.spikes.accept(outcome, measured, limit, loss)
        self.counts[outcome] += 1
        counts = self.optimizer.skipped_steps_by_reason
        assert {name: int(n) for name, n in counts.items()} == {name: self.counts[name] for name in counts}
        return outcome

    def _compare_stats(self, grads, found, outcome, inputs, other):
        ours, theirs = (list(o.param_stats().values()) for o in (self.optimizer, other))
        assert len(ours) == sum(g is not None for g in grads)
        stepped = outcome in ("stepped", "clipped_spike")
        present = [(g, one) for g, one in zip(grads, found, strict=True) if g is not None]
        for (g, one), mine, same in zip(present, ours, theirs, strict=True):
            for x, y in zip(mine, same, strict=True):
                assert (x is None) == (y is None)
                np.testing.assert_allclose(x or 0, y or 0, rtol=1e-12)
            if mine.grad_norm is not None and not mine.nonfinite:
                norm = np.linalg.norm(array(g).astype(np.float64)) / (inputs.loss_scale or 1.0)
                np.testing.assert_allclose(mine.grad_norm, norm, rtol=1e-6)
            if mine.param_norm is not None and stepped:
                rough = 2.0 ** (-22 if one.p.dtype.itemsize > 2 else -7)
                norm = np.linalg.norm(array(one.p).astype(np.float64))
                np.testing.assert_allclose(mine.param_norm, norm, rtol=rough)

    def _compare_with_numpy(self, before, found, grads):
        fallbacks = self.optimizer._plan.fallbacks if self.options["backend"] == "native" else range(99)
        hypers = [h for index in range(len(self.groups)) for h in self._hypers(index)]
        for slot, (old, new, g, h) in enumerate(zip(before, found, grads, hypers, strict=True)):
            if g is not None:
                self._compare_one(old, new, g, h, 4 * (slot in fallbacks), f"of parameter {slot}")
            else:  # what its state has come to lack is made anyway
                kept = {key: t for key, t in new.state.items() if key in old.state or not old.state}
                assert_held([Held(new.p, kept)], [old])

    def _compare_one(self, old, new, g, hypers, slack, what):
        """Compare a parameter and its state; by `slack` torch's square root may be off, by a unit or so."""
        step = int(old.state["step"]) + 1 if "step" in old.state else 1
        assert int(new.state["step"]) == step, what
        p, values = by_hand.update(old, g, hypers, step, self.scale)
        if AVERAGE in new.state:
            values[AVERAGE] = by_hand.average(self.options["ema"], old, new, step)
        wide = 32 if p.dtype == np.float64 else 0  # norms and limits are added up in another order
        biggest = np.abs([p, p - weight_of(old)]).max(initial=0.0)
        assert_stored(weight_of(new), p, stored_as(new), f"value {what}", wide or slack, biggest)
        for key, value in values.items():
            kept = name_of(new.state[key].dtype)
            assert_stored(array(new.state[key]), value, kept, f"{key} {what}", wide)

    def _hypers(self, index):
        group = self.groups[index]
        hypers = oracle.Hypers(
            float(group["lr"]),
            tuple(map(float, group["betas"])),
            group["eps"],
            group["weight_decay"],
            group["amsgrad"],
            group["maximize"],
            **self._variant(index),
        )
        return [hypers] * len(group["params"])


def _as_it_came(group):
    """Its options, of which a tensor may change."""
    return {**group, "lr": float(group["lr"])}
