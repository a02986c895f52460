"""The formats of csrc/formats.h and their loops in csrc/cpu/blocks.h, alone, against their definitions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from dtype_codes import CUDA_LAYOUTS, MIXES

from fused_adamw.backends import native
from fused_adamw.tables import DTYPE_CODE

CSRC = Path(__file__).parents[1] / "csrc"
CPUINFO = Path("/proc/cpuinfo")
CXX = shutil.which("c++") or shutil.which("g++")

# C entry points: one value, and up to a block of them.
SOURCE = """
#include "cpu/blocks.h"
using namespace fused_adamw;
#define ENTRIES(FORMAT)                                                                               \\
  extern "C" float load_##FORMAT(FORMAT::Stored x) { return FORMAT::load(x); }                        \\
  extern "C" FORMAT::Stored store_##FORMAT(float x) { return FORMAT::store(x); }                      \\
  extern "C" void load_block_##FORMAT(uint64_t values, int64_t n, float* out) {                       \\
    float buffer[kBlock];                                                                             \\
    const float* loaded = load_block<kRead>({FORMAT::kDType, values}, 0, n, buffer);                  \\
    for (int64_t i = 0; i < n; ++i) out[i] = loaded[i];                                               \\
  }                                                                                                   \\
  extern "C" void store_block_##FORMAT(uint64_t values, int64_t n, const float* x) {                  \\
    store_block({FORMAT::kDType, values}, 0, n, x);                                                   \\
  }
ENTRIES(BFloat16)
ENTRIES(Float16)
extern "C" int64_t block() { return kBlock; }
"""
# For each instruction set that has loops of its own: the compiler's flags, and what /proc/cpuinfo calls it.
ISAS = {
    "baseline": ([], ""),
    "avx2": (["-mavx2", "-mf16c"], "avx2"),
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"], "avx512vl"),
}


@dataclass(frozen=True)
class Definition:
    """A 16-bit float by its definition: sign, exponent, mantissa, rounding to nearest even."""

    name: str
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


DEFINITIONS = (Definition("BFloat16", 7, -126, 127), Definition("Float16", 10, -14, 15))
formats = pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda d: d.name)


@pytest.fixture(scope="module", params=ISAS)
def library(request, tmp_path_factory):
    """The formats, compiled for an instruction set."""
    flags, feature = ISAS[request.param]
    if not CXX:
        pytest.skip("needs a C++ compiler")
    if feature and not (CPUINFO.exists() and f" {feature} " in CPUINFO.read_text()):
        pytest.skip(f"this processor has no {feature}")
    folder = tmp_path_factory.mktemp("formats")
    source, made = folder / "formats.cpp", folder / "formats.so"
    source.write_text(SOURCE)
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-Wall", "-ffp-contract=off", *flags]
    subprocess.run([CXX, *flags, f"-I{CSRC}", "-o", made, source], check=True)
    library = ctypes.CDLL(str(made))
    library.block.restype = ctypes.c_int64
    for definition in DEFINITIONS:
        load, store = (getattr(library, f"{way}_{definition.name}") for way in ("load", "store"))
        load.argtypes, load.restype = [ctypes.c_uint16], ctypes.c_float
        store.argtypes, store.restype = [ctypes.c_float], ctypes.c_uint16
        for way in ("load_block", "store_block"):
            function = getattr(library, f"{way}_{definition.name}")
            function.argtypes = [ctypes.c_uint64, ctypes.c_int64, ctypes.c_uint64]
    return library


def load(library, definition: Definition, stored: np.ndarray, n: int) -> np.ndarray:
    """Load all values, n at a time."""
    out = np.zeros(len(stored), np.float32)
    for i in range(0, len(stored), n):
        part, to = stored[i : i + n], out[i : i + n]
        getattr(library, f"load_block_{definition.name}")(part.ctypes.data, len(part), to.ctypes.data)
    return out


def store(library, definition: Definition, x: np.ndarray, n: int) -> np.ndarray:
    """Store all values, n at a time, and nothing after them."""
    out = np.full(len(x) + 1, 0x1234, np.uint16)
    for i in range(0, len(x), n):
        part = x[i : i + n]
        getattr(library, f"store_block_{definition.name}")(out[i:].ctypes.data, len(part), part.ctypes.data)
        assert out[i + len(part)] == 0x1234
    return out[:-1]


def same_numbers(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, or NaN for NaN."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), nan)
    assert np.array_equal(actual[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@formats
def test_every_number_is_loaded_exactly(library, definition):
    stored = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    expected = definition.decode(stored)
    same_numbers(load(library, definition, stored, library.block()), expected)
    one = getattr(library, f"load_{definition.name}")
    same_numbers(np.float32([one(int(x)) for x in stored]), expected)


@formats
def test_numbers_are_stored_to_nearest_even(library, definition):
    x = definition.edges()
    expected = definition.encode(x)
    stored = store(library, definition, x, library.block())
    nan = np.isnan(x)
    assert np.array_equal(stored[~nan], expected[~nan])
    assert np.isnan(definition.decode(stored[nan])).all()
    one = getattr(library, f"store_{definition.name}")
    some = np.random.default_rng(1).choice(np.flatnonzero(~nan), 20_000)
    assert [one(float(value)) for value in x[some]] == expected[some].tolist()


@formats
def test_blocks_of_any_length(library, definition):
    """Whole vectors and what is left over of them have the same bits."""
    x = np.random.default_rng(2).standard_normal(300).astype(np.float32)
    stored = definition.encode(x)
    for n in range(1, library.block() + 1):
        assert np.array_equal(store(library, definition, x, n), stored)
        same_numbers(load(library, definition, stored, n), definition.decode(stored))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_build_says_what_it_can_step(device):
    """Python asks it rather than keep a list."""
    built = MIXES if device == "cpu" else CUDA_LAYOUTS if native.build_info()["cuda_archs"] else []
    codes = {**DTYPE_CODE, torch.complex64: 9}
    for param, p in codes.items():
        for grad, g in codes.items():
            for state, s in codes.items():
                answer = native.supports(torch.device(device), param, grad, state)
                assert answer == ((p, g, s) in built), (param, grad, state)
