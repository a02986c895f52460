"""The formats and their noise in numpy, written from their definitions. Imports nothing of ours.

Values are float32 arrays, or their bits as uint32. A root code is worked out one block at a time.
"""

from dataclasses import dataclass

import numpy as np

from .floats import DEFINITIONS

F32, U32, U64 = np.float32, np.uint32, np.uint64
NAN_BITS = 0x7FC00000
BLOCK = 128


def bits_of(x):
    """float32 as uint32."""
    return np.ascontiguousarray(x, F32).view(U32)


def from_bits(bits):
    """uint32 as float32."""
    return np.ascontiguousarray(bits, U32).view(F32)


def canonical(x):
    """The bits of float32 numbers, with one pattern for every NaN."""
    return np.where(np.isnan(x), U32(NAN_BITS), bits_of(x))


# ---- Noise


def splitmix64(x):
    """On Python integers."""
    mask = 2**64 - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def lowbias32(x):
    """On arrays of uint32, which wrap."""
    x = x ^ (x >> U32(16))
    x = x * U32(0x7FEB352D)
    x = x ^ (x >> U32(15))
    x = x * U32(0x846CA68B)
    return x ^ (x >> U32(16))


def key(seed, ordinal, step):
    """The two words, low and high, that a step's noise for one parameter begins with."""
    stream = splitmix64((seed ^ (0x9E3779B97F4A7C15 * ordinal)) % 2**64)
    k = splitmix64((stream + step) % 2**64)
    return U32(k % 2**32), U32(k >> 32)


def noise_hash(seed, ordinal, step, index):
    """32 bits for each index, uint32."""
    index = np.atleast_1d(np.asarray(index, U64))
    low, high = (index & U64(0xFFFFFFFF)).astype(U32), (index >> U64(32)).astype(U32)
    k0, k1 = (
        np.full(index.shape, key(seed, ordinal, step)[0]),
        np.full(index.shape, key(seed, ordinal, step)[1]),
    )
    return lowbias32(lowbias32(low ^ k0) + k1 + high * U32(0x9E3779B9))


def noise_pair(seed, ordinal, step, index):
    """The noise of parameter and exp_avg, and that of exp_avg_sq: 16 bits each, uint32."""
    h = noise_hash(seed, ordinal, step, index)
    return h % U32(2**16), h // U32(2**16)


# ---- bfloat16, as uint16


def bf16_nearest(x):
    bits = bits_of(x).astype(U64)
    even = bits + U64(0x7FFF) + ((bits >> U64(16)) & U64(1))
    nan = ((bits >> U64(16)) & U64(0x8000)) | U64(0x7FC0)
    return (np.where(np.isnan(x), nan, even >> U64(16))).astype(np.uint16)


def bf16_stochastic(x, noise):
    bits = bits_of(x).astype(np.int64)
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    upper = np.minimum((magnitude + np.asarray(noise, np.int64)) >> 16, 0x7F7F)
    upper = np.where(np.isinf(x), 0x7F80, np.where(np.isnan(x), 0x7FC0, upper))
    return (sign | upper).astype(np.uint16)


def bf16_value(upper):
    return from_bits(np.asarray(upper, U32) << U32(16))


# ---- A float32 in two halves


def split_store(x):
    """Upper half as uint16, residual as int16."""
    bits = bits_of(x).astype(np.int64)
    bits = np.where(np.isnan(x), (bits & 0x80000000) | NAN_BITS, bits)
    low = bits % 2**16
    return ((bits + 0x8000) // 2**16).astype(np.uint16), np.where(low >= 2**15, low - 2**16, low).astype(
        np.int16
    )


def split_load(upper, residual):
    """The float32 numbers."""
    upper, residual = np.asarray(upper, np.int64), np.asarray(residual, np.int64)
    magnitude = upper % 2**15
    impossible = (magnitude == 0) & (residual < 0)
    impossible |= (magnitude >= 0x7F80) & (residual > 0)
    impossible |= magnitude > 0x7F80
    return from_bits(((upper * 2**16 + np.where(impossible, 0, residual)) % 2**32).astype(U32))


# ---- Root codes


@dataclass(frozen=True)
class Root:
    """A root code: its square roots, top code, least unit of a block, and whether it has a sign."""

    roots: int
    levels: int
    unit: float
    signed: bool

    def root(self, x):
        for _ in range(self.roots):
            x = np.sqrt(x, dtype=F32)
        return x

    def places(self, x):
        """Where values are between the codes of their block, float32, and the block's scale."""
        x = np.asarray(x, F32)
        nothing = np.zeros(x.size, F32)
        if not np.isfinite(x).all():
            return nothing, F32("nan")
        magnitude = np.abs(x)
        t = self.root(magnitude.max())
        if t == 0 or (self.signed and t < F32(self.unit)):
            return nothing, F32(0)
        t = max(t, F32(self.levels * self.unit))
        r = F32(self.levels) / t
        top = F32(self.levels)
        return np.array([top if w == t else min(F32(w * r), top) for w in self.root(magnitude)], F32), t

    def store_block(self, x, noise=None):
        """Codes (int64) and scale of one block, rounded to nearest without noise."""
        places, t = self.places(x)
        codes = []
        for j, z in enumerate(places.astype(float)):
            if noise is None:
                code = round(z)  # half to even
            else:
                code = (round(z * 65536) + int(noise[j])) >> 16
            if not self.signed and x[j] != 0 and t > 0:
                code = max(code, 1)
            codes.append(-code if self.signed and x[j] < 0 else code)
        return np.array(codes, np.int64), t

    def load_block(self, codes, t):
        t, codes = F32(t), np.asarray(codes, np.int64)
        unit = t / F32(self.levels)
        w = np.where(np.abs(codes) == self.levels, t, np.abs(codes).astype(F32) * unit)
        for _ in range(self.roots):
            w = w * w
        return np.where(codes < 0, -w, w).astype(F32)

    def store(self, x, noise=None):
        """Codes and scales, (rows, blocks), of the rows of a matrix."""
        rows, columns = x.shape
        codes = np.zeros((rows, columns), np.int64)
        scales = np.zeros((rows, -(-columns // BLOCK)), F32)
        for row in range(rows):
            for b in range(scales.shape[1]):
                here = slice(b * BLOCK, min((b + 1) * BLOCK, columns))
                n = None if noise is None else noise[row, here]
                codes[row, here], scales[row, b] = self.store_block(x[row, here], n)
        return codes, scales

    def load(self, codes, scales):
        values = np.zeros(codes.shape, F32)
        for row in range(codes.shape[0]):
            for b in range(scales.shape[1]):
                here = slice(b * BLOCK, (b + 1) * BLOCK)
                values[row, here] = self.load_block(codes[row, here], scales[row, b])
        return values


# ---- All of them


ROOTS = {"root_signed": Root(2, 127, 2**-31, True), "root_unsigned": Root(3, 255, 2**-15, False)}


def store(name, x, noise=None):
    """Values and side of a matrix, the side None where the format has none; uint16 for 16-bit floats."""
    if name in ROOTS:
        return ROOTS[name].store(x, noise)
    if name == "bfloat16_split":
        return split_store(x)
    if name == "float16":
        return DEFINITIONS[name].encode(x), None
    return (bf16_nearest(x) if noise is None else bf16_stochastic(x, noise)), None


def load(name, values, side):
    """The float32 numbers that values and side stand for."""
    if name in ROOTS:
        return ROOTS[name].load(values, side)
    if name == "float16":
        return DEFINITIONS[name].decode(values)
    return split_load(values, side) if name == "bfloat16_split" else bf16_value(values)
