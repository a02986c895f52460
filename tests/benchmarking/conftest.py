"""Fixtures of the tests of benchmarks."""

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def _one_thread(threads: Callable[[int], None]) -> None:
    """Nothing here is large: a second thread only waits."""
    threads(1)
