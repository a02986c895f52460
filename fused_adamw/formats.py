"""How one tensor is kept: formats, and the noise that stochastic ones round with.

A format keeps `values`, one element per value, and where it needs one a `side`. The rule of the optimizer
knows floating-point numbers only: load, compute, store.

Every bit is defined, so that backends agree. So roots are taken in float64, as torch's `sqrt` of float32 is
not correctly rounded on a CPU, and tensors are divided by tensors, as a quotient of a tensor and a number may
become a product with a reciprocal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # values that share a scale: this many neighbours of one row, fewer at its end

# ---- Order in memory


def memory_order(t: Tensor) -> tuple[int, ...]:
    """The dimensions from the outermost to the innermost.

    Those of size 1 are the last, whatever their strides, except dimension 0, which is the first.
    """

    def place(dim: int) -> float:
        if t.shape[dim] == 1:
            return 0 if dim else -math.inf
        return -t.stride(dim)

    return tuple(sorted(range(t.dim()), key=place))


def has_dense_rows(t: Tensor) -> bool:
    """Whether the rows `t[0], t[1], ...` follow each other in memory without holes, each row dense in itself.

    True of contiguous and of channels_last tensors, false of a transposed matrix.
    """
    order = memory_order(t)
    return t.dim() > 0 and order[0] == 0 and (t.numel() == 0 or t.permute(order).is_contiguous())


def _in_order(t: Tensor, order: Sequence[int]) -> Tensor:
    """All elements as a vector, the innermost dimension of `order` fastest."""
    return t.permute(tuple(order)).reshape(-1)


def _as_shape(flat: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """The inverse of `_in_order`."""
    inverse = sorted(range(len(order)), key=lambda dim: order[dim])
    return flat.reshape([shape[dim] for dim in order]).permute(inverse)


# ---- Noise

_GOLDEN = 0x9E3779B97F4A7C15
_LOW32 = 0xFFFFFFFF

# Where each tensor's 16 bits are in the hash. Those share in which the update is linear.
NOISE_SHIFT = {"param": 0, "exp_avg": 0, "exp_avg_sq": 16, "average": 0}


class Window(NamedTuple):
    """Where the elements of a shard lie in the whole tensor, both in memory order.

    Element k of the shard is element `offset + k // columns * whole_columns + k % columns` of the whole.
    """

    offset: int
    columns: int
    whole_columns: int


def window_of(t: Tensor, whole: Tensor, start: Sequence[int], *, by_rows: bool = False) -> Window | None:
    """Where the elements of a shard lie in the whole tensor.

    Args:
        t: The shard.
        whole: The tensor that it is a part of; only its shape and strides are read.
        start: The first index of the shard in each dimension of it.
        by_rows: Take the rows `t[0], t[1], ...` for the columns of the window.

    Returns:
        None if the shard is no regular series of pieces, or its order in memory is another one.
    """
    order = memory_order(whole)
    if [d for d in order if t.shape[d] > 1] != [d for d in memory_order(t) if t.shape[d] > 1]:
        return None
    mine, all_ = [t.shape[d] for d in order], [whole.shape[d] for d in order]
    cut = [i for i, (n, of) in enumerate(zip(mine, all_, strict=True)) if n != of]
    # The window's columns begin at the innermost dimension that is cut; those outside of it must be one run.
    first = max(cut, default=0)
    if any(math.prod(mine[:i]) > 1 for i in cut if i < first) or (by_rows and (first > 1 or order[0] != 0)):
        return None
    first = max(first, int(by_rows))
    offset = sum(start[d] * math.prod(all_[i + 1 :]) for i, d in enumerate(order))
    columns = [max(1, math.prod(sizes[first:])) if first else 1 for sizes in (mine, all_)]
    return Window(offset, *columns)


def _signed(x: int) -> int:
    """`x` mod 2^64 as an int64."""
    return (x + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(x: Tensor) -> Tensor:
    z = x + _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _lowbias32(x: Tensor) -> Tensor:
    """32-bit words in int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW32
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW32
    return x ^ (x >> 16)


def noise_word(seed: int, ordinal: int) -> int:
    """What a parameter's noise depends on besides step and element, as an int64.

    Args:
        seed: The optimizer's seed.
        ordinal: The parameter's place among all parameters of all groups.
    """
    return _signed(seed ^ (_GOLDEN * ordinal % 2**64))


def noise_hash(word: int, step: Tensor, index: Tensor) -> Tensor:
    """32 random bits per element that depend on nothing but the arguments.

    Args:
        word: From `noise_word`.
        step: 0-dim, any real dtype: counts this update, 1 for the first.
        index: int64: places in the whole tensor, from `element_index`.

    Returns:
        int64 of the shape of `index`, at least 0 and below 2^32.
    """
    first = _splitmix64(torch.full((), word, dtype=torch.int64, device=index.device))
    key = _splitmix64(first + step.to(torch.int64))
    low, high = key & _LOW32, _shift(key, 32)
    inner = _lowbias32((index & _LOW32) ^ low)
    return _lowbias32((inner + high + _shift(index, 32) * 0x9E3779B9) & _LOW32)


def noise_bits(hashed: Tensor, name: str) -> Tensor:
    """The 16 bits for one of a parameter's tensors.

    Args:
        hashed: From `noise_hash`.
        name: A key of `NOISE_SHIFT`.

    Returns:
        int32 of the shape of `hashed`.
    """
    return ((hashed >> NOISE_SHIFT[name]) & 0xFFFF).to(torch.int32)


def element_index(t: Tensor, window: Window | None = None) -> Tensor:
    """The place of every element in memory order, in the whole tensor where `t` is a shard of one.

    Returns:
        int64 of the shape of `t`.
    """
    k = torch.arange(t.numel(), device=t.device)
    if window is not None and t.numel():
        k = window.offset + k // window.columns * window.whole_columns + k % window.columns
    return _as_shape(k, t.shape, memory_order(t))


# ---- Formats


@dataclass(frozen=True)
class Format:
    """Keeps a tensor as it is, in a floating dtype.

    Attributes:
        name: Unique; the key in `FORMATS`.
        dtype: Of `values`.
        side_dtype: Of the side; None: there is none.
        stochastic: Whether storing takes noise.
    """

    name: str
    dtype: torch.dtype
    side_dtype: torch.dtype | None = None
    stochastic: bool = False

    def load(self, values: Tensor, side: Tensor | None) -> Tensor:
        """What is kept, as the rule computes with it: float64 if kept in it, else float32.

        Shape and strides are those of `values`. Exact.
        """
        return values.to(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def store(self, x: Tensor, noise: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Round `x` to what can be kept.

        Args:
            x: Of a floating dtype.
            noise: int32 of the shape of `x`, 16 random bits each, for stochastic formats; None: to nearest.
            like: The tensor that the values are for; only its shape and strides are read.

        Returns:
            Values, of the shape of `x`, and side.
        """
        return x.to(self.dtype), None

    def side_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the side for values of a shape: where there is one, one element per value."""
        return tuple(shape)

    def new_side(self, values: Tensor) -> Tensor | None:
        """A side for values that are zero, or whose side is not known: zeros; None without a side."""
        if self.side_dtype is None:
            return None
        return torch.zeros_like(values, dtype=self.side_dtype, memory_format=torch.preserve_format)

    def zeros(self, like: Tensor) -> Field:
        """New memory that holds zeros; values have the shape, strides and device of `like`."""
        values = torch.zeros_like(like, dtype=self.dtype, memory_format=torch.preserve_format)
        return Field(self, values, self.new_side(values))

    def encode(self, x: Tensor, like: Tensor) -> Field:
        """New memory that holds `x`, of any device and dtype, rounded to nearest; laid out as in `zeros`."""
        field = self.zeros(like)
        field.write(x.to(like.device))
        return field

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of values and side for a tensor of a shape."""
        side = 0 if self.side_dtype is None else math.prod(self.side_shape(shape)) * self.side_dtype.itemsize
        return math.prod(shape) * self.dtype.itemsize + side


@dataclass(frozen=True)
class StochasticBFloat16(Format):
    """bfloat16, rounded up as often as the dropped bits say: right on average, however small the change."""

    def store(self, x: Tensor, noise: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        if noise is None:
            return super().store(x, noise, like)
        bits = x.float().view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        rounded = ((magnitude + noise) >> 16).clamp(max=0x7F7F)  # a finite number stays finite
        special = torch.where(magnitude > 0x7F800000, 0x7FC0, 0x7F80)
        upper = torch.where(magnitude < 0x7F800000, rounded, special) | ((bits >> 16) & 0x8000)
        return upper.to(torch.int16).view(torch.bfloat16), None


@dataclass(frozen=True)
class SplitBFloat16(Format):
    """A float32 in two halves: bfloat16 values, and the low 16 bits in the side, as a signed difference.

    The values are the float32 rounded to bfloat16, ties away from zero. They have the last word: a residual
    that no store gives for a value counts as 0, so after somebody else wrote the values, what is loaded is
    within half a unit in their last place.
    """

    def load(self, values: Tensor, side: Tensor | None) -> Tensor:
        assert side is not None
        upper, lower = values.view(torch.int16).to(torch.int32), side.to(torch.int32)
        magnitude = upper & 0x7FFF
        stale = torch.where(lower < 0, magnitude == 0, magnitude >= 0x7F80) | (magnitude > 0x7F80)
        return ((upper << 16) + torch.where(stale, 0, lower)).view(torch.float32)

    def store(self, x: Tensor, noise: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        bits = x.float().view(torch.int32)
        bits = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits & ~0x7FFFFFFF) | 0x7FC00000, bits)
        upper, lower = (bits + 0x8000) >> 16, (bits << 16) >> 16
        return upper.to(torch.int16).view(torch.bfloat16), lower.to(torch.int16)


@dataclass(frozen=True)
class RootCode(Format):
    """8 bits per value: the value's root as a fraction of its block's, and each block's root in the side.

    Roots spread the codes over many orders of magnitude. The block's largest value always has the top code,
    so storing what was loaded gives the same codes and side again. Unsigned codes are for values that are
    never negative, and are 0 for zeros alone: nothing that is divided by vanishes. A block with an infinity
    or a NaN is NaN everywhere.

    Attributes:
        roots: Square roots taken.
        levels: The top code.
        unit: `levels * unit` is the least side of a block, so that every code stands for a normal float32.
        zero_below: Blocks with a smaller root are kept as zeros.
    """

    roots: int = 0
    levels: int = 0
    unit: float = 0.0
    zero_below: float = 0.0

    @property
    def signed(self) -> bool:
        return self.dtype.is_signed

    def load(self, values: Tensor, side: Tensor | None) -> Tensor:
        assert side is not None
        order = memory_order(values)
        codes, t = _blocks(values, order).to(torch.int32), side.unsqueeze(-1)
        magnitude = codes.abs()
        x = magnitude * torch.div(t, torch.full_like(t, self.levels))
        x = torch.where(magnitude == self.levels, t, x)
        for _ in range(self.roots):
            x = x * x
        return _unblocked(torch.where(codes < 0, -x, x), values.shape, order)

    def store(self, x: Tensor, noise: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        order = memory_order(like)
        x = _blocks(x.float(), order)
        # A maximum of floating-point numbers may drop a NaN; as integers, NaN > inf > finite.
        top = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True).view(torch.float32)
        t = self._root(top)
        finite = top.isfinite()
        live = finite & (t > 0) & (t >= self.zero_below)
        t = torch.where(live, t.clamp(min=self.levels * self.unit), 0.0)
        t = torch.where(finite, t, torch.nan)
        x, scale = torch.where(live, x, 0.0), torch.where(live, t, 1.0)

        root = self._root(x.abs())
        z = (root * torch.div(torch.full_like(scale, self.levels), scale)).clamp(max=self.levels)
        z = torch.where(root == scale, float(self.levels), z)
        if noise is None:
            codes = z.round().to(torch.int32)
        else:
            codes = ((z * 65536).round().to(torch.int32) + _blocks(noise, order)) >> 16
        codes = torch.where(x < 0, -codes, codes) if self.signed else torch.maximum(codes, (x != 0).int())
        return _unblocked(codes.to(self.dtype), like.shape, order), t.squeeze(-1)

    def _root(self, x: Tensor) -> Tensor:
        for _ in range(self.roots):
            x = x.double().sqrt().float()
        return x

    def side_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(rows, blocks of a row)."""
        return shape[0], -(-math.prod(shape[1:]) // BLOCK)

    def new_side(self, values: Tensor) -> Tensor | None:
        if not has_dense_rows(values):
            raise ValueError(
                f"{self.name} needs a tensor whose rows are dense and follow each other in memory, "
                f"not shape {tuple(values.shape)} with strides {values.stride()}"
            )
        return values.new_zeros(self.side_shape(values.shape), dtype=self.side_dtype)


def _blocks(x: Tensor, order: Sequence[int]) -> Tensor:
    """(rows, blocks, BLOCK), with zeros after the end of a row."""
    rows, n_blocks = x.shape[0], -(-math.prod(x.shape[1:]) // BLOCK)
    flat = _in_order(x, order).view(rows, math.prod(x.shape[1:]))
    return torch.nn.functional.pad(flat, (0, n_blocks * BLOCK - flat.shape[1])).view(rows, n_blocks, BLOCK)


def _unblocked(blocks: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    rows, n_blocks, _ = blocks.shape
    flat = blocks.view(rows, n_blocks * BLOCK)[:, : math.prod(shape[1:])]
    return _as_shape(flat.contiguous(), shape, order)


FORMATS = {
    format.name: format
    for format in (
        Format("float32", torch.float32),
        Format("float64", torch.float64),
        Format("float16", torch.float16),
        Format("bfloat16", torch.bfloat16),
        StochasticBFloat16("bfloat16_stochastic", torch.bfloat16, stochastic=True),
        SplitBFloat16("bfloat16_split", torch.bfloat16, torch.int16),
        RootCode("root_signed", torch.int8, torch.float32, True, 2, 127, unit=2**-31, zero_below=2**-31),
        RootCode("root_unsigned", torch.uint8, torch.float32, True, 3, 255, unit=2**-15),
    )
}

# The formats of tensors that are as torch has them, in the dtypes that kernels know.
PLAIN = {format.dtype: format for format in FORMATS.values() if type(format) is Format}


def plain_format(dtype: torch.dtype) -> Format:
    """The format of a tensor that is as torch has it, of any dtype."""
    return PLAIN.get(dtype) or Format(str(dtype).removeprefix("torch."), dtype)


class Formats(NamedTuple):
    """How a parameter and what belongs to it are kept. The maximum of exp_avg_sq is kept as exp_avg is."""

    param: Format
    grad: Format
    exp_avg: Format
    exp_avg_sq: Format
    average: Format | None = None  # there is none

    @property
    def present(self) -> dict[str, Format]:
        """The formats of those tensors that there are."""
        return {name: format for name, format in self._asdict().items() if format is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {format.name}" for name, format in self.present.items())


class Field(NamedTuple):
    """One tensor as it is kept."""

    format: Format
    values: Tensor
    side: Tensor | None = None

    def load(self) -> Tensor:
        """What is kept, as `Format.load` has it."""
        return self.format.load(self.values, self.side)

    def write(self, x: Tensor, noise: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Keep `x` instead, in the same memory.

        Args:
            x: Of the shape of the values.
            noise: As `Format.store` takes it.
            skip: 0-dim bool on the device; where it is true, nothing is changed.
        """
        for old, new in self.changes(x, noise, skip):
            old.copy_(new)

    def changes(
        self, x: Tensor, noise: Tensor | None = None, skip: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """What `write` would do: the tensors that it changes, each with what they are to hold."""
        stored = zip(self[1:], self.format.store(x, noise, self.values), strict=True)
        return [
            (old, new if skip is None else torch.where(skip, old, new))
            for old, new in stored
            if old is not None and new is not None
        ]

    def stored(self, x: Tensor, noise: Tensor | None = None) -> Field:
        """A field of the same format that keeps `x`, in new memory."""
        return Field(self.format, *self.format.store(x, noise, self.values))

    def as_torch(self) -> Tensor:
        """What torch's optimizers would hold: the values themselves, decoded to float32 if they are codes."""
        return self.values if self.values.is_floating_point() else self.load()
