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
def test_every_number_is_loaded_exactly(by_isa, name):
    stored = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    expected = DEFINITIONS[name].decode(stored)
    same_numbers(by_isa.load_blocks(name, stored, by_isa.block), expected)
    same_numbers(by_isa.load(name, stored, None), expected)


@formats
def test_numbers_are_stored_to_nearest_even(by_isa, name):
    definition = DEFINITIONS[name]
    x = definition.edges()
    expected = definition.encode(x)
    nan = np.isnan(x)
    for stored in (by_isa.store_blocks(name, x, by_isa.block), by_isa.store(name, x[None])[0][0]):
        assert np.array_equal(stored[~nan], expected[~nan])
        assert np.isnan(definition.decode(stored[nan])).all()


@formats
def test_blocks_of_any_length(by_isa, name):
    """Whole vectors and what is left over of them have the same bits."""
    definition = DEFINITIONS[name]
    x = np.random.default_rng(2).standard_normal(300).astype(np.float32)
    stored = definition.encode(x)
    for n in range(1, by_isa.block + 1):
        assert np.array_equal(by_isa.store_blocks(name, x, n), stored)
        same_numbers(by_isa.load_blocks(name, stored, n), definition.decode(stored))
