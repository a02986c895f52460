"""csrc/cuda/fast_math.h: the bits of IEEE 754 wherever it says so, whichever way approximations are off."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import compiler
import pytest
import torch

ROOT = Path(__file__).parent
NVCC = shutil.which("nvcc")

# Units in the last place that approximations may be off. PTX promises 1 for reciprocals and 2^-22.9, which is
# up to 2.2, for those of roots.
RECIPROCAL_ERRORS, ROOT_ERRORS = range(-2, 3), range(-3, 4)
INF, NAN, TINY, SUBNORMAL = float("inf"), float("nan"), 2.0**-126, 2.0**-149


class Counts(ctypes.Structure):
    """struct Counts."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("wrong", "repeated", "all"))


@pytest.fixture(scope="module")
def emulated():
    if compiler.CXX is None:
        pytest.skip("needs g++")
    source = ROOT / "cuda_rounding" / "emulated.cpp"
    made = compiler.library(source, "-O2", "-pthread", f"-I{ROOT / 'cuda_emulation'}")
    library = ctypes.CDLL(str(made))
    library.quotient.argtypes = [ctypes.c_int, ctypes.c_float, ctypes.c_float]
    library.root.argtypes = [ctypes.c_int, ctypes.c_float]
    return library


def count(function, error: int, *arguments: int) -> Counts:
    counts = Counts()
    function(error, *map(ctypes.c_uint32, arguments), ctypes.byref(counts))
    return counts


@pytest.mark.parametrize("error", RECIPROCAL_ERRORS)
def test_reciprocals_of_all_mantissas(emulated, error):
    """But that of all ones, which is left to the slow path."""
    counts = count(emulated.all_reciprocals, error)
    assert (counts.all, counts.wrong) == (2**23 - 1, 0)
    assert emulated.quotient(error, 1.0, 2.0 - 2.0**-23) == 1


@pytest.mark.parametrize("error", RECIPROCAL_ERRORS)
def test_quotients_of_many_mantissas(emulated, error):
    counts = count(emulated.quotients, error, 13)
    assert counts.all == 7 * -(-(2**23) // 13)
    assert (counts.wrong, counts.repeated) == (0, 0)


@pytest.mark.parametrize("error", ROOT_ERRORS)
def test_roots_of_all_mantissas(emulated, error):
    counts = count(emulated.all_roots, error)
    assert (counts.all, counts.wrong, counts.repeated) == (2**24, 0, 0)


@pytest.mark.parametrize("error", [min(ROOT_ERRORS), max(ROOT_ERRORS)])
def test_roots_of_all_sizes(emulated, error):
    counts = count(emulated.roots, error, 1009)
    assert counts.all == -(-(2**32) // 1009)
    assert counts.wrong == 0
    # 200 of the 512 exponents with signs.
    assert counts.repeated == pytest.approx(counts.all * (1 - 200 / 512), rel=1e-2)


@pytest.mark.parametrize("error", RECIPROCAL_ERRORS)
def test_quotients_at_the_edges_of_the_range(emulated, error):
    """Fast inside the range and for zeros; outside, and beside every special number, never wrong."""
    inside = [(x, y) for x in (2.0**-100, 1.9 * 2.0**49, 2.0**50) for y in (2.0**-64, 1.7, 2.0**24)]
    inside += [(-x, y) for x, y in inside] + [(0.0, 2.0**-64), (-0.0, 3.0), (-0.0, 2.0**24)]
    assert [emulated.quotient(error, x, y) for x, y in inside] == [0] * len(inside)
    special = [0.0, SUBNORMAL, TINY, 1.0, 3.0, 2.0**127, INF, NAN, 2.0**-101, 2.0**51, 2.0**-65, 2.0**25]
    special += [-x for x in special]
    for x, y in itertools.product(special, special):
        assert emulated.quotient(error, x, y) in (0, 1), (x, y)
    assert emulated.quotient(error, 1.0, 2.0**25) == emulated.quotient(error, 2.0**-101, 1.0) == 1
    assert emulated.quotient(error, 1.0, -1.0) == emulated.quotient(error, 0.0, 0.0) == 1


@pytest.mark.parametrize("error", ROOT_ERRORS)
def test_roots_at_the_edges_of_the_range(emulated, error):
    assert [emulated.root(error, x) for x in (0.0, -0.0, 2.0**-100, 2.0**100)] == [0] * 4
    outside = [SUBNORMAL, TINY, 2.0**-100 * (1 - 2.0**-24), 2.0**100 * (1 + 2.0**-23), INF, NAN, -1.0, -INF]
    assert [emulated.root(error, x) for x in outside] == [1] * len(outside)


@pytest.mark.gpu
@pytest.mark.skipif(NVCC is None or not torch.cuda.is_available(), reason="needs nvcc and a GPU")
def test_roundings_on_this_gpu(tmp_path):
    source, made = ROOT / "cuda_rounding" / "gpu.cu", tmp_path / "rounding"
    subprocess.run([NVCC, "-std=c++17", "-O3", "-arch=native", "-o", made, source], check=True)
    done = subprocess.run([made], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_program_for_a_gpu_compiles(tmp_path):
    source, made = ROOT / "cuda_rounding" / "gpu.cu", tmp_path / "rounding.cubin"
    done = subprocess.run(
        [NVCC, "-std=c++17", "-arch=sm_90", "-cubin", "-o", made, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
