"""Fixtures of the core tests."""

import os

# Triton then interprets its kernels on CPU tensors. Read when triton is first imported, so it comes before
# any import; `TRITON_INTERPRET=0 pytest -m gpu` runs them compiled, on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from common import TARGETS


@pytest.fixture(params=TARGETS)
def target(request):
    """A backend on a device."""
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A device, whatever backend serves it."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def threads():
    """Sets torch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def default_dtype():
    """Sets torch's default dtype until the end of the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture
def small_chunks(monkeypatch):
    """Cuts tensors into chunks of 64 elements, so that small ones have several."""
    from fused_adamw.backends import native

    monkeypatch.setattr(native, "chunk_size", lambda device: 64)
    return 64
