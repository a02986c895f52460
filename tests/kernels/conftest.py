"""The kernels, each as `Model` calls them."""

import pytest
import torch
from compiler import CXX

from fused_adamw.backends import native

from .backends import Cuda, Native, Triton, build_cuda


def build(*flags):
    if CXX is None:
        pytest.skip("needs g++")
    return build_cuda(*flags)


@pytest.fixture(scope="session")
def cuda_library():
    """The CUDA kernels as they are."""
    return build()


@pytest.fixture(scope="session")
def switched_library():
    """With every switch of csrc/cuda/switches.h that changes how results are computed."""
    return build("-DFUSED_ADAMW_FAST_MATH=1", "-DFUSED_ADAMW_REVERSE_UPDATE=1")


@pytest.fixture
def cuda(cuda_library):
    return Cuda(cuda_library)


@pytest.fixture
def switched(switched_library):
    return Cuda(switched_library)


@pytest.fixture
def cpu(threads):
    assert native.unavailable_reason(torch.device("cpu")) is None
    return Native()


@pytest.fixture
def triton(monkeypatch):
    pytest.importorskip("triton", minversion="3.6")
    kernels = Triton(monkeypatch)
    if reason := kernels.backend.unavailable_reason(torch.device("cpu")):
        pytest.skip(reason)
    return kernels


@pytest.fixture(params=["cpu", "cuda", "triton"])
def kernels(request):
    """Each of them."""
    return request.getfixturevalue(request.param)
