"""What becomes of a step as a whole: clipped, skipped, counted. Twin of csrc/outcome.h, in plain PyTorch.

Nothing here reads a device value on the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..tables import (
    FIRST_SKIPPED,
    HISTORY_WORDS,
    OUTCOMES,
    STATUS_WORDS,
    SeriesStruct,
    SpikeHistoryStruct,
    SpikeOptions,
    StatusStruct,
    StepInputs,
    word_of,
    words,
)


class StepScalars(NamedTuple):
    """What a step derives from its inputs.

    Attributes:
        norm: The gradient norm; None without a norm pass.
        loss_scale: That the gradients carried.
        grad_scale: What every gradient is multiplied by: the clip coefficient and 1/loss-scale.
        outcome: A position in `OUTCOMES`, as a number of the status; None: stepped, whatever is found.
        skip: Whether to skip the step, bool; None: never.
    """

    norm: Tensor | None
    loss_scale: Tensor | float
    grad_scale: Tensor | float
    outcome: Tensor | None
    skip: Tensor | None


def step_scalars(inputs: StepInputs) -> StepScalars:
    """Work out the gradient norm, the factor for the gradients, and what becomes of the step.

    Clips as `torch.nn.utils.clip_grad_norm_` does: `max_norm / (norm + 1e-6)`, at most 1; NaN stays NaN.
    """
    norm: Tensor | None = None
    outcome: Tensor | None = None
    loss_scale = 1.0 if inputs.grad_scale is None else inputs.grad_scale.to(inputs.status.dtype).reshape(())
    grad_scale: Tensor | float = 1.0 / loss_scale

    def becomes(name: str, condition: Tensor) -> None:
        nonlocal outcome
        before = inputs.status.new_zeros(()) if outcome is None else outcome
        outcome = torch.where(condition.reshape(()), float(OUTCOMES.index(name)), before)

    if inputs.sums is not None:
        norm = inputs.sums.sum().sqrt() / loss_scale
        max_grad_norm: Tensor | float = inputs.max_grad_norm
        if inputs.spikes.window:
            norms, losses = series_of(inputs.status, inputs.spikes.window)
            limit = norms.limit_for(inputs.spikes)
            becomes("clipped_spike" if inputs.spikes.clips else "spike", norm > limit)
            if inputs.spikes.clips:
                max_grad_norm = limit.clamp(max=inputs.max_grad_norm)
            if inputs.loss is not None:
                becomes("loss_spike", inputs.loss > losses.limit_for(inputs.spikes))
                becomes("nonfinite", inputs.loss.isfinite().logical_not())
        if inputs.skip_nonfinite or inputs.spikes.window:
            becomes("nonfinite", norm.isfinite().logical_not())
        grad_scale = grad_scale * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    if inputs.found_inf is not None:
        becomes("overflow", inputs.found_inf != 0)
    skip = None if outcome is None else outcome >= FIRST_SKIPPED
    return StepScalars(norm, loss_scale, grad_scale, outcome, skip)


def record(inputs: StepInputs, scalars: StepScalars) -> None:
    """Write what became of a step: mutates the status, and the history that follows it."""
    status, outcome = inputs.status, scalars.outcome
    if outcome is None:
        outcome = status.new_zeros(())
    counts = _words_of(status, StatusStruct.counts)
    counts += torch.arange(len(OUTCOMES), device=status.device) == outcome
    for name, value in (
        ("grad_norm", 0.0 if scalars.norm is None else scalars.norm),
        ("loss_scale", scalars.loss_scale),
        ("outcome", outcome),
    ):
        word = status[word_of(StatusStruct, name)]
        if isinstance(value, Tensor):
            word.copy_(value)
        else:
            word.fill_(value)  # an assignment would copy it from the host
    if inputs.spikes.window and scalars.norm is not None:
        _remember(inputs, scalars.norm, outcome)


def _remember(inputs: StepInputs, norm: Tensor, outcome: Tensor) -> None:
    """Write the history of a step: its norm, its loss."""
    history = history_of(inputs.status)
    streak, refused = history[0], _words_of(history, SpikeHistoryStruct.refused)
    is_refused, is_accepted = outcome > OUTCOMES.index("overflow"), outcome < FIRST_SKIPPED
    here = torch.arange(len(refused), device=refused.device) == streak % len(refused)
    refused.copy_(torch.where(here & is_refused, norm, refused))
    streak.copy_(torch.where(is_accepted, 0.0, streak + is_refused))
    norms, losses = series_of(inputs.status, inputs.spikes.window)
    kept = torch.where(outcome == OUTCOMES.index("clipped_spike"), norms.limit, norm)
    norms.accept(kept, is_accepted, inputs.spikes)
    if inputs.loss is not None:
        losses.accept(inputs.loss.reshape(()), is_accepted, inputs.spikes)


class Series:
    """The latest values that were accepted, and the limit for the next: struct Series, in a status.

    Args:
        words: float64 (2 + window,); the values are a ring.
    """

    def __init__(self, words: Tensor) -> None:
        self._words = words
        self.limit = words[word_of(SeriesStruct, "limit")]
        self.accepted = words[word_of(SeriesStruct, "accepted")]
        self.values = words[word_of(SeriesStruct, "values") :]

    def limit_for(self, options: SpikeOptions) -> Tensor:
        """What the next value must not exceed."""
        return torch.where(self.accepted < options.warmup, math.inf, self.limit)

    def accept(self, x: Tensor | float, is_accepted: Tensor | bool, options: SpikeOptions) -> None:
        """Add a value, if it is accepted, and set the limit for the next one: mutates the words.

        It is above the mean by `sigmas` deviations of the sample, of which each counts as a millionth of the
        mean at least: equal values are no spikes.
        """
        place = torch.arange(len(self.values), device=self.values.device)
        values = torch.where(place == self.accepted % len(self.values), x, self.values)
        n = (self.accepted + 1).clamp(max=len(self.values))
        mean = torch.where(place < n, values, 0.0).sum() / n
        squares = torch.where(place < n, values - mean, 0.0).square().sum()
        deviation = (squares / (n - 1).clamp(min=1)).sqrt().maximum(1e-6 * mean.abs())
        new = torch.cat([torch.stack([mean + options.sigmas * deviation, self.accepted + 1]), values])
        self._words.copy_(torch.where(torch.as_tensor(is_accepted, device=new.device), new, self._words))

    def take(self, other: Series, options: SpikeOptions) -> None:
        """Go on from where another series is, whose window may be another: mutates the words, on the CPU."""
        accepted, window = int(other.accepted), len(other.values)
        n = min(accepted, window, len(self.values))
        is_longer = n < min(accepted, len(self.values))  # it is filled from its start
        self.accepted.fill_(0 if is_longer else accepted - n)
        for i in range(accepted - n, accepted):
            self.accept(other.values[i % window], True, options)


def history_of(status: Tensor) -> Tensor:
    """The words of struct SpikeHistory in a status."""
    return status[STATUS_WORDS : STATUS_WORDS + HISTORY_WORDS]


def series_of(status: Tensor, window: int) -> tuple[Series, Series]:
    """The norms that were accepted, and the losses."""
    start, size = STATUS_WORDS + HISTORY_WORDS, words(SeriesStruct) - 1 + window
    return Series(status[start : start + size]), Series(status[start + size : start + 2 * size])


def _words_of(t: Tensor, field: object) -> Tensor:
    """The part of a tensor that holds a field of several words."""
    start = getattr(field, "offset", 0) // 8
    return t[start : start + getattr(field, "size", 8) // 8]
