"""Formats of 16 bits and their loops in csrc/cpu/blocks.h, by instruction set, against their definitions."""

import numpy as np
import pytest

from .floats import DEFINITIONS

formats = pytest.mark.parametrize("name", DEFINITIONS)


def same_numbers(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, or NaN for NaN."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), nan)
    assert np.array_equal(actual[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@formats
def test_every_number_is_loaded_exactly(by_isa, cpp, name):
    stored = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    for codec in (by_isa, cpp):
        same_numbers(codec.load(name, stored, None), DEFINITIONS[name].decode(stored))


@formats
def test_numbers_are_stored_to_nearest_even(by_isa, cpp, name):
    definition = DEFINITIONS[name]
    x = definition.edges()
    expected = definition.encode(x)
    nan = np.isnan(x)
    for codec in (by_isa, cpp):
        stored = codec.store(name, x[None])[0][0]
        assert np.array_equal(stored[~nan], expected[~nan])
        assert np.isnan(definition.decode(stored[nan])).all()
