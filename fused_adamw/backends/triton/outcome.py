"""What becomes of a step as a whole, in Triton: twin of csrc/outcome.h. Knows no rows, no rule."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import triton
import triton.language as tl

from ...tables import (
    OUTCOMES,
    SeriesStruct,
    SpikeHistoryStruct,
    StatusStruct,
    word_of,
    words,
)

# Where the parts of a status are, in words; of it, of the history, of a series.
_LOSS_SCALE, _OUTCOME, _COUNTS = (
    tl.constexpr(word_of(StatusStruct, name)) for name in ("loss_scale", "outcome", "counts")
)
_REFUSED = tl.constexpr(word_of(SpikeHistoryStruct, "refused"))
_ACCEPTED, _VALUES = (tl.constexpr(word_of(SeriesStruct, name)) for name in ("accepted", "values"))
_STATUS_WORDS, _HISTORY_WORDS = (tl.constexpr(words(struct)) for struct in (StatusStruct, SpikeHistoryStruct))
_REFUSED_NORMS = tl.constexpr(words(SpikeHistoryStruct) - word_of(SpikeHistoryStruct, "refused"))

_CLIPPED_SPIKE, _OVERFLOW, _NONFINITE, _SPIKE, _LOSS_SPIKE = (
    tl.constexpr(OUTCOMES.index(name))
    for name in ("clipped_spike", "overflow", "nonfinite", "spike", "loss_spike")
)

_LARGEST = tl.constexpr(1.7976931348623157e308)  # DBL_MAX
_BLOCK = tl.constexpr(128)  # values of a series at once


class Spikes(NamedTuple):
    """What a spike is, and the loss that may be one; None, for a pointer, is a constexpr."""

    sigmas: tl.tensor
    window: tl.tensor
    warmup: tl.tensor
    loss: tl.tensor


class StepInputs(NamedTuple):
    """What is known only when the step runs; None, for a pointer, is a constexpr."""

    sums: tl.tensor
    n_sums: tl.tensor
    max_grad_norm: tl.tensor
    grad_scale: tl.tensor
    found_inf: tl.tensor
    status: tl.tensor
    spikes: Spikes


class StepScalars(NamedTuple):
    """What a step derives from its inputs, in float64; `outcome` is int32."""

    grad_norm: tl.tensor
    loss_scale: tl.tensor
    grad_scale: tl.tensor
    outcome: tl.tensor
    skip: tl.tensor


@triton.jit
def norms_of(inputs):
    """The series of norms that were accepted."""
    return inputs.status + _STATUS_WORDS + _HISTORY_WORDS


@triton.jit
def losses_of(inputs):
    """The series of losses that were accepted."""
    return norms_of(inputs) + _VALUES + inputs.spikes.window


@triton.jit
def limit_of(series, spikes):
    """What the next value must not exceed."""
    return tl.where(tl.load(series + _ACCEPTED) < spikes.warmup.to(tl.float64), _LARGEST, tl.load(series))


@triton.jit
def step_scalars(inputs, SKIP_NONFINITE: tl.constexpr, SPIKES: tl.constexpr, CLIPS: tl.constexpr):
    """Gradient norm, what gradients are multiplied by, what becomes of the step.

    SPIKES: they are looked for. CLIPS: gradients are clipped to the limit, instead of skipping the step.
    """
    norm = tl.full([], 0.0, tl.float64)
    loss_scale = tl.full([], 1.0, tl.float64)
    outcome = tl.full([], 0, tl.int32)
    if inputs.grad_scale is not None:
        loss_scale = tl.load(inputs.grad_scale).to(tl.float64)
    scale = 1.0 / loss_scale
    if inputs.sums is not None:
        i = 0
        while i < inputs.n_sums:
            norm += tl.load(inputs.sums + i)
            i += 1
        norm = tl.sqrt(norm) / loss_scale
        # Not through a name of its own: the interpreter would round it to float32.
        clip_coef = inputs.max_grad_norm / (norm + 1e-6)
        if SPIKES:
            spikes = inputs.spikes
            limit = limit_of(norms_of(inputs), spikes)
            outcome = tl.where(norm > limit, _CLIPPED_SPIKE if CLIPS else _SPIKE, outcome)
            if CLIPS:
                clip_coef = tl.where(limit < inputs.max_grad_norm, limit / (norm + 1e-6), clip_coef)
            if spikes.loss is not None:
                loss = tl.load(spikes.loss)
                outcome = tl.where(loss > limit_of(losses_of(inputs), spikes), _LOSS_SPIKE, outcome)
                outcome = tl.where(tl.abs(loss) <= _LARGEST, outcome, _NONFINITE)
        if SKIP_NONFINITE or SPIKES:
            outcome = tl.where(norm <= _LARGEST, outcome, _NONFINITE)
        scale *= tl.where(clip_coef > 1.0, 1.0, clip_coef)  # NaN stays NaN
    if inputs.found_inf is not None:
        outcome = tl.where(tl.load(inputs.found_inf) != 0.0, _OVERFLOW, outcome)
    return StepScalars(norm, loss_scale, scale, outcome, outcome >= _OVERFLOW)


@triton.jit
def accept(series, x, spikes):
    """Add a value, and set the limit for the next one."""
    window = spikes.window.to(tl.int64)
    before = tl.load(series + _ACCEPTED).to(tl.int64)
    values = series + _VALUES
    place = before % window
    n = tl.minimum(before + 1, window)
    total = tl.zeros([_BLOCK], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < n:
        i = first + tl.arange(0, _BLOCK)
        # The value itself is stored last: other threads than the one that stores it would read it.
        total += tl.where(i == place, x, tl.load(values + i, mask=(i < n) & (i != place), other=0.0))
        first += _BLOCK
    count = n.to(tl.float64)
    mean = tl.sum(total) / count
    squares = tl.zeros([_BLOCK], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < n:
        i = first + tl.arange(0, _BLOCK)
        value = tl.where(i == place, x, tl.load(values + i, mask=(i < n) & (i != place), other=0.0))
        squares += tl.where(i < n, (value - mean) * (value - mean), 0.0)
        first += _BLOCK
    deviation = tl.where(n > 1, tl.sqrt(tl.sum(squares) / tl.where(n > 1, count - 1.0, 1.0)), 0.0)
    least = 1e-6 * tl.abs(mean)
    tl.store(series, mean + spikes.sigmas * tl.where(deviation > least, deviation, least))
    tl.store(series + _ACCEPTED, (before + 1).to(tl.float64))
    tl.store(values + place, x)


@triton.jit
def record(inputs, scalars, SPIKES: tl.constexpr):
    """Write what became of a step: in one program, after all of them have their scalars."""
    status = inputs.status
    tl.store(status, scalars.grad_norm)
    tl.store(status + _LOSS_SCALE, scalars.loss_scale)
    tl.store(status + _OUTCOME, scalars.outcome.to(tl.float64))
    count = status + _COUNTS + scalars.outcome
    tl.store(count, tl.load(count) + 1.0)
    if SPIKES:
        history = status + _STATUS_WORDS
        if scalars.outcome > _OVERFLOW:
            streak = tl.load(history)
            place = streak.to(tl.int64) % _REFUSED_NORMS
            tl.store(history + _REFUSED + place, scalars.grad_norm)
            tl.store(history, streak + 1.0)
        if scalars.outcome < _OVERFLOW:
            tl.store(history, 0.0)
            norms = norms_of(inputs)
            is_clipped = scalars.outcome == _CLIPPED_SPIKE
            accept(norms, tl.where(is_clipped, tl.load(norms), scalars.grad_norm), inputs.spikes)
            if inputs.spikes.loss is not None:
                accept(losses_of(inputs), tl.load(inputs.spikes.loss), inputs.spikes)
