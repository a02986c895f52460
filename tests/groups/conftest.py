"""Helpers shared by the tests of parameter groups."""

import pytest

from .torchvision_stub import torchvision_stub


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables fold to the width of the terminal, which test workers do not have."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="session")
def timm():
    with torchvision_stub():
        return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    return module


@pytest.fixture(scope="session")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def peft():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")
