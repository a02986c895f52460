"""What a step does besides the rule, in Triton: twins of csrc/average.h and csrc/stats.h."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import triton
import triton.language as tl

from ...tables import WARMUPS, ChunkStatsStruct, word_of, words
from .formats import bits_of, is_bfloat16
from .rule import power

_TIMM = tl.constexpr(WARMUPS.index("timm"))
_STATS_WORDS = tl.constexpr(words(ChunkStatsStruct))
_GRAD_SQUARES, _GRAD_MAX, _UPDATE_SQUARES, _PARAM_SQUARES, _LOST_UPDATES = (
    tl.constexpr(word_of(ChunkStatsStruct, name))
    for name in ("grad_squares", "grad_max", "update_squares", "param_squares", "lost_updates")
)


# ---- The average of the parameters


class Averaging(NamedTuple):
    """How the average of the parameters follows them: see csrc/average.h."""

    decay: tl.tensor
    warmup: tl.tensor
    start_step: tl.tensor
    every: tl.tensor


class AverageStep(NamedTuple):
    """The weight as torch.lerp uses it: from where it is accurate. `moves`: whether the average does."""

    weight: tl.tensor
    from_param: tl.tensor
    moves: tl.tensor


@triton.jit
def average_weight(averaging, step):
    """How much of the way to the parameter the average goes at update number `step`. 0: it stays."""
    updates = step - averaging.start_step.to(tl.float64)
    every = averaging.every.to(tl.float64)
    is_first = updates <= every
    n = tl.where(is_first, 1.0, updates / every - 1.0)
    timm, diffusers = 1.0 - power(1.0 + n, -2.0 / 3.0), (1.0 + n) / (10.0 + n)
    warm = tl.where(averaging.warmup == _TIMM, timm, diffusers)
    decay = tl.where((averaging.warmup != 0) & (warm < averaging.decay), warm, averaging.decay)
    return tl.where(is_first, 1.0, tl.where(n == tl.floor(n), 1.0 - decay, 0.0))


@triton.jit
def average_step(averaging, address, step, T: tl.constexpr):
    """What the average of a row does at update number `step`; address 0: there is none."""
    weight = average_weight(averaging, step)
    from_param = weight >= 0.5
    moves = (address != 0) & (weight != 0.0)
    return AverageStep(tl.where(from_param, weight - 1.0, weight).to(T), from_param, moves)


@triton.jit
def average_update(average, p, c):
    """The rule of the average, a block of elements at once."""
    return tl.where(c.from_param, p, average) + c.weight * (p - average)


# ---- What is found out about a chunk


class Stats(NamedTuple):
    """Of some elements, each lane of a block its own, or of all of them; `grad_max` is by its bits."""

    grad_squares: tl.tensor
    grad_max: tl.tensor
    update_squares: tl.tensor
    param_squares: tl.tensor
    lost_updates: tl.tensor


@triton.jit
def no_stats(shape: tl.constexpr, T: tl.constexpr):
    """Of no elements."""
    squares = tl.zeros(shape, tl.float64)
    bits = tl.zeros(shape, T).to(tl.int64 if T.is_fp64() else tl.int32, bitcast=True)
    return Stats(squares, bits, squares, squares, tl.zeros(shape, tl.int32))


@triton.jit
def is_lost(p, update):
    """Whether rounding to bfloat16 would lose an update: it is below half a unit in the last place of p."""
    exponent = tl.maximum((bits_of(p) & 0x7F800000).to(tl.int32, bitcast=True), 0x00800000)
    size = tl.abs(update)
    return (size < exponent.to(tl.float32, bitcast=True) * 0.00390625) & (size > 0.0)


@triton.jit
def observe(stats, before, p, g, mask, F: tl.constexpr):
    """The stats with a block more. F: of the parameter. Where `mask`, if there is one, is false: nothing."""
    update = p - before
    lost = is_lost(before, update) if is_bfloat16(F) else tl.zeros(p.shape, tl.int1)
    if mask is not None:
        g, p, update = tl.where(mask, g, 0.0), tl.where(mask, p, 0.0), tl.where(mask, update, 0.0)
        lost = lost & mask
    if g.dtype.is_fp64():
        magnitude = g.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        magnitude = g.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    wide_g, wide_update, wide_p = g.to(tl.float64), update.to(tl.float64), p.to(tl.float64)
    return Stats(
        stats.grad_squares + wide_g * wide_g,
        tl.maximum(stats.grad_max, magnitude),  # as integers: NaN > infinity > finite
        stats.update_squares + wide_update * wide_update,
        stats.param_squares + wide_p * wide_p,
        stats.lost_updates + lost.to(tl.int32),
    )


@triton.jit
def over_lanes(stats):
    """What was found out of all lanes together."""
    return Stats(
        tl.sum(stats.grad_squares),
        tl.max(stats.grad_max),
        tl.sum(stats.update_squares),
        tl.sum(stats.param_squares),
        tl.sum(stats.lost_updates),
    )


@triton.jit
def of_both(x, y):
    """What was found out of two parts of a chunk together."""
    return Stats(
        x.grad_squares + y.grad_squares,
        tl.maximum(x.grad_max, y.grad_max),
        x.update_squares + y.update_squares,
        x.param_squares + y.param_squares,
        x.lost_updates + y.lost_updates,
    )


@triton.jit
def write_stats(table, chunk, stats, T: tl.constexpr):
    """Keep what was found out about a chunk."""
    at = table + chunk.to(tl.int64) * _STATS_WORDS
    tl.store(at + _GRAD_SQUARES, stats.grad_squares)
    tl.store(at + _GRAD_MAX, stats.grad_max.to(T, bitcast=True).to(tl.float64))
    tl.store(at + _UPDATE_SQUARES, stats.update_squares)
    tl.store(at + _PARAM_SQUARES, stats.param_squares)
    tl.store(at + _LOST_UPDATES, stats.lost_updates.to(tl.float64))
