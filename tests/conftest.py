"""Fixtures of the core tests."""

import importlib
import os

# Triton then interprets its kernels on CPU tensors. Read when triton is first imported, so it comes before
# any import; `TRITON_INTERPRET=0 pytest -m gpu` runs them compiled, on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from common import TARGETS, Target

from fused_adamw import stepping
from fused_adamw.step import plan


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
    for name in ("native", "triton"):
        try:
            module = importlib.import_module(f"fused_adamw.backends.{name}")
        except ImportError:
            continue
        monkeypatch.setattr(module, "chunk_size", lambda device, numel: 64)


@pytest.fixture
def built(monkeypatch):
    """A list that grows by one with every plan that is built."""
    plans = []

    class Counted(plan.Plan):
        def __init__(self, *args, **kwargs):
            plans.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(stepping, "Plan", Counted)
    return plans


# The files about what kernels compute. The others test what is above the kernels.
KERNEL_FILES = {"test_oracle", "test_clip", "test_layouts", "test_amp", "test_step_counts"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave interpreted Triton to the files about kernels: elsewhere it is slow and adds little.

    And leave out what needs gigabytes, unless `-m` asks for it: `pytest -m large`.
    """
    if "large" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("large")])
        items[:] = [item for item in items if not item.get_closest_marker("large")]
    for item in items:
        target = getattr(item, "callspec", None) and item.callspec.params.get("target")
        if isinstance(target, Target) and target.slow and item.module.__name__ not in KERNEL_FILES:
            item.add_marker(pytest.mark.slow)
