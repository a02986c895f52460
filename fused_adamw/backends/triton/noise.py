"""The noise of stochastic rounding in Triton: twin of csrc/noise.h, in wrapping integers."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


class Noise(NamedTuple):
    """What a row's noise is drawn by: its key, and where its elements lie in the whole tensor."""

    low: tl.tensor
    high: tl.tensor
    offset: tl.tensor
    local_columns: tl.tensor
    columns: tl.tensor


@triton.jit
def splitmix64(x):
    """A bijection of uint64."""
    z = x + _GOLDEN
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def lowbias32(x):
    """A bijection of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_of(seed, ordinal, step, offset, local_columns, columns):
    """What a row's noise is drawn by. `step` counts this update: 1 for the first."""
    word = seed ^ (ordinal.to(tl.uint64, bitcast=True) * _GOLDEN)
    key = splitmix64(splitmix64(word) + step.to(tl.uint64))
    return Noise(key.to(tl.uint32), (key >> 32).to(tl.uint32), offset, local_columns, columns)


@triton.jit
def noise_bits(noise, place):
    """32 bits for each place in the whole tensor, int64: the low 16 for the parameter and exp_avg."""
    low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
    inner = lowbias32(low ^ noise.low)
    return lowbias32(inner + noise.high + high * 0x9E3779B9)


@triton.jit
def places(noise, i):
    """Where elements i of a row lie in the whole tensor."""
    if noise.local_columns != noise.columns:
        row = i // noise.local_columns
        i += row * (noise.columns - noise.local_columns)
    return noise.offset + i
