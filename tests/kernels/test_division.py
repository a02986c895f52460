"""csrc/cpu/math.h: quotients by a coefficient have the bits of a division, on every instruction set."""

import ctypes
import math
from pathlib import Path

import compiler
import numpy as np
import pytest
from instruction_sets import ISAS, has_isa

# What is divided: roots of float32 numbers, from those of the least one and of the largest.
LEAST, LARGEST = (int(np.float32(math.sqrt(x)).view(np.uint32)) for x in (2.0**-149, 2.0**128 - 2.0**104))
ONE, TWO = (int(np.float32(x).view(np.uint32)) for x in (1.0, 2.0))


@pytest.fixture(scope="module", params=ISAS)
def library(request):
    if compiler.CXX is None or not has_isa(request.param):
        pytest.skip(f"needs g++, and a processor with {request.param}")
    source = Path(__file__).with_name("division.cpp")
    library = ctypes.CDLL(str(compiler.library(source, "-O3", *ISAS[request.param][0])))
    library.differ_from_division.argtypes = [ctypes.c_float, ctypes.c_uint32, ctypes.c_uint32]
    library.differ_from_division.restype = library.pairs_differ.restype = ctypes.c_int64
    return library


def bias_correction(beta2: float, step: int) -> float:
    return math.sqrt(1.0 - beta2**step)


BETAS = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0 - 2.0**-53)
DIVISORS = [bias_correction(beta2, step) for beta2 in BETAS for step in (1, 2, 3, 10, 777, 100_000)]
DIVISORS += [2.0**-k * (1.0 + sign * 2.0**-24 * n) for k in range(4) for sign in (1, -1) for n in range(3)]


@pytest.mark.parametrize("exponent", [0, -74, 63])
def test_all_mantissas(library, exponent):
    """Of the numbers between two powers of two; divided by what steps divide by, and by edges."""
    shift = exponent << 23
    for divisor in DIVISORS:
        assert library.differ_from_division(divisor, ONE + shift, TWO - 1 + shift) == 0, divisor


def test_all_numbers(library):
    """Those that are roots, by one divisor."""
    assert library.differ_from_division(bias_correction(0.999, 3), LEAST, LARGEST) == 0


@pytest.mark.parametrize("special", [0.0, math.inf, math.nan])
def test_special_numbers(library, special):
    bits = int(np.float32(special).view(np.uint32))
    for divisor in DIVISORS:
        assert library.differ_from_division(divisor, bits, bits) == 0, divisor


def test_many_pairs(library):
    """Divisors of any mantissa."""
    random = np.random.default_rng(0)
    for _ in range(20):
        x = random.integers(LEAST, LARGEST, 1 << 20, np.uint32, endpoint=True).view(np.float32)
        divisor = random.integers(ONE - (30 << 23), ONE, x.size, np.uint32, endpoint=True).view(np.float32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, divisor)]
        assert library.pairs_differ(*pointers, ctypes.c_int64(x.size)) == 0
