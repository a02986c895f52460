"""Floats of 16 bits by their definition, an independent codec."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Definition:
    """A 16-bit float by its definition: sign, exponent, mantissa, rounding to nearest even."""

    mantissa: int  # bits
    min_exponent: int
    max_exponent: int

    @property
    def infinity(self) -> int:
        """Its bits."""
        return (self.max_exponent - self.min_exponent + 2) << self.mantissa

    def decode(self, bits: np.ndarray) -> np.ndarray:
        """The float32 values of 16-bit numbers."""
        magnitude = (bits & 0x7FFF).astype(np.int64)
        field, fraction = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        units = np.where(field == 0, fraction, fraction + (1 << self.mantissa)).astype(np.float64)
        x = np.ldexp(units, self.min_exponent - self.mantissa + np.maximum(field - 1, 0))
        x[magnitude == self.infinity] = np.inf
        x[magnitude > self.infinity] = np.nan
        return np.copysign(x, np.where(bits & 0x8000, -1.0, 1.0)).astype(np.float32)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The bits of float32 values; of NaN any."""
        with np.errstate(invalid="ignore"):  # signalling NaN
            magnitude = np.abs(x.astype(np.float64))
        finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
        exponent = np.where(finite == 0.0, self.min_exponent, np.frexp(finite)[1] - 1)
        exponent = np.maximum(exponent, self.min_exponent)
        # In units of the last place; a carry moves into the exponent.
        units = np.rint(np.ldexp(finite, self.mantissa - exponent)).astype(np.int64)
        bits = np.minimum(units + ((exponent - self.min_exponent) << self.mantissa), self.infinity)
        bits = np.where(np.isfinite(x), bits, np.where(np.isnan(x), 0x7FFF, self.infinity))
        return (bits | np.where(np.signbit(x), 0x8000, 0)).astype(np.uint16)

    def edges(self) -> np.ndarray:
        """Every number, what lies halfway to its neighbour and just beside that; extremes; random bits."""
        numbers = self.decode(np.arange(self.infinity, dtype=np.uint16))
        halfway = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
        beside = [np.nextafter(halfway, np.float32(side)) for side in (-np.inf, np.inf)]
        last = np.float32(2.0) ** self.max_exponent * (2 - np.float32(2.0) ** -(self.mantissa + 1))
        beyond = [last, np.nextafter(last, np.float32(0)), np.finfo(np.float32).max, np.inf, np.nan]
        tiny = np.arange(64, dtype=np.uint32).view(np.float32)
        positive = np.concatenate([numbers, halfway, *beside, np.float32(beyond), tiny])
        random = np.random.default_rng(0).integers(0, 2**32, 1 << 18, dtype=np.uint32).view(np.float32)
        return np.concatenate([positive, -positive, random])


DEFINITIONS = {"bfloat16": Definition(7, -126, 127), "float16": Definition(10, -14, 15)}
