"""The guards, each as a function that checks what is held."""

import pytest

from .held import guard_of_objects, native_guard, python_guard


@pytest.fixture(
    params=[python_guard, guard_of_objects, native_guard], ids=["python", "c++ with objects", "c++"]
)
def guarded(request):
    """Guards what is held; returns its check: the addresses of the gradients, None if it changed."""
    return request.param
