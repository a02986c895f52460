"""The codecs under test, and answers that none of them made."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from compiler import CXX
from instruction_sets import ISAS, has_isa

from . import oracle
from .codecs import Blocks, Cpp, Torch


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tensors are small here."""
    threads(1)


def compiled(kind, isa=()):
    if CXX is None:
        pytest.skip("needs g++")
    return kind(isa)


@pytest.fixture(scope="session")
def cpp():
    """The formats in C++."""
    return compiled(Cpp)


@pytest.fixture(scope="session")
def blocks():
    """Makes the blocks of the walk on the CPU for an instruction set."""

    @functools.cache
    def make(isa):
        if not has_isa(isa):
            pytest.skip(f"this processor has no {isa}")
        return compiled(Blocks, ISAS[isa][0])

    return make


@pytest.fixture(params=ISAS)
def by_isa(request, blocks):
    """The blocks of the walk on the CPU, for each instruction set."""
    return blocks(request.param)


CODECS = ["torch-cpu", pytest.param("torch-cuda", marks=pytest.mark.gpu), "cpp", *ISAS]


@pytest.fixture(params=CODECS)
def codec(request):
    """What stores and loads as `oracle` does, by other code."""
    return _codec(request)


@pytest.fixture(params=["oracle", *CODECS])
def any_codec(request):
    """The same, and the oracle itself: against what neither of them made."""
    return _codec(request)


def _codec(request):
    if request.param == "oracle":
        return oracle
    if request.param == "cpp":
        return request.getfixturevalue("cpp")
    if request.param in ISAS:
        return request.getfixturevalue("blocks")(request.param)
    device = request.param.removeprefix("torch-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return Torch(device)


@pytest.fixture(scope="session")
def known():
    """The known answers, which two implementations that share no code with these agreed upon.

    Keys: inputs and noise (`*_x`, `*_bits`, `*_noise*`), and what was made of them. float32 is kept as its
    bits, with 7FC00000 for every NaN. `b128`, `b27` and `b1` are blocks of so many values.
    """
    return dict(np.load(Path(__file__).parent / "known_answers.npz"))
