"""How one value is kept, in Triton: twin of csrc/formats.h. No rule, no loop.

A format is a constexpr, so a kernel is compiled for whatever it meets and no list says what that may be.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from ...formats import PLAIN
from ...tables import FORMAT_CODE

FORMATS = {FORMAT_CODE[format.name]: getattr(tl, format.name) for format in PLAIN.values()}


class Formats(NamedTuple):
    """Of the tensors of one launch."""

    param: tl.dtype
    grad: tl.dtype
    exp_avg: tl.dtype
    exp_avg_sq: tl.dtype

    @staticmethod
    def of(codes: Sequence[int]) -> "Formats":
        """From `Tables.formats`."""
        return Formats(*(FORMATS[code] for code in codes))


@triton.constexpr_function
def register_of(F):
    """The type of the arithmetic of a parameter's format."""
    return tl.float64 if F.is_fp64() else tl.float32


@triton.jit
def elements(address, start, F: tl.constexpr, VECTOR: tl.constexpr):
    """A tensor from element `start` on, its address being in a table. VECTOR promises 16-byte alignment."""
    values = tl.load(address).to(tl.pointer_type(F)) + start
    return tl.multiple_of(values, 16) if VECTOR else values


@triton.jit
def load(values, i, mask, T: tl.constexpr):
    """Elements i in registers of T."""
    return tl.load(values + i, mask=mask).to(T)


@triton.jit
def store(values, i, mask, x):
    """Keep x, rounded to nearest even, as elements i."""
    tl.store(values + i, x.to(values.dtype.element_ty), mask=mask)
