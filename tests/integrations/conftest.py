"""Real loops of other libraries take seconds each: all of these tests are slow."""

from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Frameworks write where they run."""
    monkeypatch.chdir(tmp_path)
