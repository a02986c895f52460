"""How one value is kept, in Triton: twin of csrc/formats.h. No rule, no loop.

A format is a constexpr, so a kernel is compiled for whatever it meets and no list says what that may be.
Those of torch are a dtype, the others a `Special`. Whatever is rounded is rounded once: roots and quotients
by `sqrt_rn` and `div_rn`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...formats import BLOCK, PLAIN, Format, RootCode
from ...formats import FORMATS as DEFINITIONS
from ...tables import FORMAT_CODE, NO_FORMAT

CODE_BLOCK = tl.constexpr(BLOCK)


@dataclass(frozen=True)  # Triton would take a named tuple apart
class Special:
    """A format that torch has not.

    Attributes:
        values: What is in memory.
        side: What is beside it, for each value or, of root codes, for each block; None: nothing.
        takes_noise: Whether storing takes noise.
        roots, levels, unit, zero_below: As in `formats.RootCode`; without roots, it is none.
    """

    values: tl.dtype
    side: tl.dtype | None = None
    takes_noise: bool = False
    roots: int = 0
    levels: int = 0
    unit: float = 0.0
    zero_below: float = 0.0


def _special(format: Format) -> Special:
    if isinstance(format, RootCode):
        values = tl.int8 if format.signed else tl.uint8
        return Special(values, tl.float32, True, format.roots, format.levels, format.unit, format.zero_below)
    return Special(tl.uint16, tl.int16 if format.side_dtype else None, format.stochastic)


FORMATS: dict[int, Any] = {
    FORMAT_CODE[name]: getattr(tl, name) if format in PLAIN.values() else _special(format)
    for name, format in DEFINITIONS.items()
}


class Formats(NamedTuple):
    """Of the tensors of one launch; `average` is None where there is none."""

    param: Any
    grad: Any
    exp_avg: Any
    exp_avg_sq: Any
    average: Any = None

    @staticmethod
    def of(codes: Sequence[int]) -> "Formats":
        """From `Tables.formats`."""
        return Formats(*(None if code == NO_FORMAT else FORMATS[code] for code in codes))

    @property
    def present(self) -> list[Any]:
        """The formats of those tensors that there are."""
        return [format for format in self if format is not None]

    def fit_together(self) -> bool:
        """Whether the walks can step tensors that are kept so: each in its place, codes both or neither."""
        specials = {format for format in self if isinstance(format, Special)}
        if is_code(self.exp_avg) != is_code(self.exp_avg_sq) or (specials and tl.float64 in self):
            return False
        root_signed, root_unsigned = (FORMATS[FORMAT_CODE[f"root_{sign}"]] for sign in ("signed", "unsigned"))
        stochastic, split = (FORMATS[FORMAT_CODE[f"bfloat16_{how}"]] for how in ("stochastic", "split"))
        known_in: tuple[set[Any], ...] = (
            {stochastic, split},
            set(),
            {root_signed},
            {stochastic, root_unsigned},
        )
        averages = (
            {None, tl.float64} if register_of(self.param) == tl.float64 else {None, tl.float32, stochastic}
        )
        known = zip(self, known_in, strict=False)
        return (
            all(is_plain(format) or format in known for format, known in known) and self.average in averages
        )


class Kept(NamedTuple):
    """Where a tensor is, from some element on; what is beside it, if anything is."""

    at: tl.tensor
    side: tl.tensor


@triton.constexpr_function
def kept_as(F, i):
    """The i-th of `Formats`. As an attribute it would be no constexpr."""
    return F[i]


@triton.constexpr_function
def values_of(F):
    """The type in memory."""
    return F.values if isinstance(F, Special) else F


@triton.constexpr_function
def register_of(F):
    """The type of the arithmetic of a parameter's format."""
    return tl.float64 if values_of(F).is_fp64() else tl.float32


@triton.constexpr_function
def is_plain(F):
    """Whether torch has it."""
    return not isinstance(F, Special)


@triton.constexpr_function
def is_bfloat16(F):
    """Whether a parameter is kept in 16 bits that are those of a bfloat16."""
    return values_of(F) in (tl.bfloat16, tl.uint16)


@triton.constexpr_function
def has_average(F):
    """Whether there is an average of the parameters, by `Formats`."""
    return F[4] is not None


@triton.constexpr_function
def takes_noise(F):
    """Whether storing takes noise."""
    return isinstance(F, Special) and F.takes_noise


@triton.constexpr_function
def any_noise(F):
    """Whether storing any of the tensors takes noise."""
    return any(isinstance(format, Special) and format.takes_noise for format in F)


@triton.constexpr_function
def has_residual(F):
    """Whether there is something beside each value."""
    return isinstance(F, Special) and F.side is not None and not F.roots


@triton.constexpr_function
def is_code(F):
    """Whether values are kept as codes, in blocks."""
    return isinstance(F, Special) and F.roots > 0


@triton.constexpr_function
def root_code(F):
    """Of codes: how many roots are taken, levels, the least side, what is kept as zeros, and if signed."""
    return F.roots, float(F.levels), F.levels * F.unit, F.zero_below, F.values == tl.int8


@triton.jit
def elements(address, start, F: tl.constexpr, VECTOR: tl.constexpr):
    """A tensor from element `start` on, whose Field is in a table. VECTOR promises 16-byte alignment."""
    values = tl.load(address).to(tl.pointer_type(values_of(F))) + start
    if VECTOR:
        values = tl.multiple_of(values, 16)
    side = values
    if has_residual(F):
        side = tl.load(address + 1).to(tl.pointer_type(tl.int16)) + start
        if VECTOR:
            side = tl.multiple_of(side, 16)
    if is_code(F):
        side = tl.load(address + 1).to(tl.pointer_type(tl.float32))
    return Kept(values, side)


@triton.jit
def advance(kept, n, F: tl.constexpr):
    """The same, n elements further on."""
    if has_residual(F):
        return Kept(kept.at + n, kept.side + n)
    return Kept(kept.at + n, kept.side)


@triton.jit
def bits_of(x):
    """float32 as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def load(kept, i, mask, F: tl.constexpr, T: tl.constexpr):
    """Elements i in registers of T."""
    values = tl.load(kept.at + i, mask=mask)
    if is_plain(F):
        x = values.to(T)
    else:
        bits = values.to(tl.uint32) << 16
        if has_residual(F):
            low = tl.load(kept.side + i, mask=mask).to(tl.int32)
            magnitude = values.to(tl.int32) & 0x7FFF
            stale = (magnitude > 0x7F80) | tl.where(low < 0, magnitude == 0, magnitude == 0x7F80)
            bits += tl.where(stale, 0, low).to(tl.uint32, bitcast=True)
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def store(kept, i, mask, x, noise, F: tl.constexpr):
    """Keep x as elements i: rounded to nearest even, by 16 bits of noise each, or in two halves."""
    if is_plain(F):
        tl.store(kept.at + i, x.to(F), mask=mask)
    else:
        if takes_noise(F):
            upper = stochastic_upper(x, noise)
        else:
            bits = bits_of(x)
            bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits & 0x80000000) | 0x7FC00000, bits)
            upper = (bits + 0x8000) >> 16
            tl.store(kept.side + i, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=mask)
        tl.store(kept.at + i, upper.to(tl.uint16), mask=mask)


@triton.jit
def stochastic_upper(x, noise):
    """The upper 16 bits of x, rounded by 16 bits of noise each."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    upper = tl.minimum((magnitude + noise) >> 16, 0x7F7F)  # a finite number stays finite
    upper = tl.where(magnitude < 0x7F800000, upper, 0x7F80)
    return tl.where(magnitude > 0x7F800000, 0x7FC0, upper) | ((bits & 0x80000000) >> 16)


@triton.jit
def as_kept(x, noise, F: tl.constexpr):
    """What loading would give of x, once it is stored."""
    if is_plain(F):
        kept = x.to(F).to(x.dtype)
    elif takes_noise(F):
        kept = (stochastic_upper(x, noise) << 16).to(tl.float32, bitcast=True)
    else:
        kept = x  # in two halves, whole
    return kept


# ---- Codes: tiles of (blocks, CODE_BLOCK)


@triton.jit
def load_codes(kept, i, mask, blocks, is_block, F: tl.constexpr):
    """Elements i, of these blocks."""
    ROOTS: tl.constexpr = root_code(F)[0]
    LEVELS: tl.constexpr = root_code(F)[1]
    code = tl.load(kept.at + i, mask=mask, other=0).to(tl.int32)
    side = tl.load(kept.side + blocks, mask=is_block, other=0.0)
    per_code = tl.div_rn(side, tl.full(side.shape, LEVELS, tl.float32))[:, None]
    magnitude = tl.abs(code).to(tl.float32)
    x = tl.where(magnitude == LEVELS, side[:, None], magnitude * per_code)
    for _ in tl.static_range(ROOTS):
        x = x * x
    return tl.where(code < 0, x * -1.0, x)  # Triton negates by a subtraction from 0, which keeps no -0


@triton.jit
def root(x, ROOTS: tl.constexpr):
    """Square roots, each rounded."""
    for _ in tl.static_range(ROOTS):
        x = tl.sqrt_rn(x)
    return x


@triton.jit
def round_even(x):
    """Numbers from 0 to 2^24 rounded to integers, halves to even, as int32."""
    return tl.where(x < 8388608.0, (x + 8388608.0) - 8388608.0, x).to(tl.int32)


@triton.jit
def store_codes(kept, i, mask, blocks, is_block, x, noise, F: tl.constexpr):
    """Keep x as elements i, of these blocks. `noise`: 16 bits each."""
    ROOTS: tl.constexpr = root_code(F)[0]
    LEVELS: tl.constexpr = root_code(F)[1]
    LEAST: tl.constexpr = root_code(F)[2]
    ZERO_BELOW: tl.constexpr = root_code(F)[3]
    SIGNED: tl.constexpr = root_code(F)[4]
    bits = bits_of(x)
    magnitude = tl.where(mask, (bits & 0x7FFFFFFF).to(tl.int32, bitcast=True), 0)
    top = tl.max(magnitude, axis=1)  # as integers: NaN > infinity > finite
    t = root(top.to(tl.float32, bitcast=True), ROOTS)
    live = (top < 0x7F800000) & (t > 0.0) & (t >= ZERO_BELOW)
    t = tl.where(t < LEAST, LEAST, t)
    tl.store(
        kept.side + blocks, tl.where(live, t, tl.where(top < 0x7F800000, 0.0, float("nan"))), mask=is_block
    )

    t = tl.where(live, t, 1.0)
    per_root = tl.div_rn(tl.full(t.shape, LEVELS, tl.float32), t)[:, None]
    w = root(tl.where(live[:, None], magnitude.to(tl.float32, bitcast=True), 0.0), ROOTS)
    z = tl.where(w == t[:, None], LEVELS, w * per_root)
    z = tl.where(z < LEVELS, z, LEVELS)
    code = (round_even(z * 65536.0) + noise.to(tl.int32)) >> 16
    if SIGNED:
        code = tl.where((bits >> 31) != 0, -code, code)
    else:
        code = tl.where((code == 0) & (magnitude != 0), 1, code)
    code = tl.where(live[:, None], code, 0)
    tl.store(kept.at + i, code.to(kept.at.dtype.element_ty), mask=mask)
