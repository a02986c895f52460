"""What formats keep, bit by bit: against the known answers, the numpy oracle, and what they promise."""

import numpy as np
import pytest

from . import oracle
from .oracle import ROOTS, bf16_value, bits_of, canonical, from_bits

NAMES = ("float16", "bfloat16", "bfloat16_stochastic", "bfloat16_split", *ROOTS)
MAX = 0x7F7FFFFF


@pytest.fixture(scope="module")
def scalars(known):
    """Edges of either sign, subnormals, ties, infinities, NaNs, random bits and ordinary numbers."""
    return from_bits(known["scalar_bits"])[None]


def assert_same_bits(x, y):
    np.testing.assert_array_equal(canonical(x), canonical(y))


def blocks(kind, n, columns, seed=0):
    """Rows of numbers that are hard to keep together."""
    rng = np.random.default_rng(seed)
    shape = n, columns
    normal = rng.standard_normal(shape)
    if kind == "normal":
        return (normal * np.exp(2 * rng.standard_normal(shape)) * 1e-3).astype(np.float32)
    if kind == "wide":
        return (np.sign(normal) * 10.0 ** rng.uniform(-38, 38, shape)).astype(np.float32)
    if kind == "bits":
        bits = rng.integers(0, 2**32, shape, np.uint32)
        return from_bits(np.where((bits & 0x7FFFFFFF) > MAX, bits & 0x807FFFFF, bits))
    if kind == "subnormal":
        sign = rng.integers(0, 2, shape, np.uint32) << 31
        return from_bits(rng.integers(0, 2**23, shape, np.uint32) | sign)
    assert kind == "sparse"
    return (normal * (rng.random(shape) < 0.05) * 10.0 ** rng.uniform(-20, 2, (n, 1))).astype(np.float32)


KINDS = ("normal", "wide", "bits", "subnormal", "sparse")


# ---- Known answers


@pytest.mark.parametrize("noise", ["zero", "ones", "rand"])
def test_stochastic_bfloat16_is_as_known(any_codec, known, scalars, noise):
    values, _ = any_codec.store("bfloat16_stochastic", scalars, known[f"bf16sr_noise_{noise}"][None])
    np.testing.assert_array_equal(values[0], known[f"bf16sr_{noise}"])


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16_stochastic"])
def test_nearest_bfloat16_is_as_known(any_codec, known, scalars, name):
    values, _ = any_codec.store(name, scalars)
    assert_same_bits(bf16_value(values[0]), bf16_value(known["bf16_nearest"]))


def test_split_is_as_known(any_codec, known, scalars):
    values, side = any_codec.store("bfloat16_split", scalars)
    np.testing.assert_array_equal(values[0], known["split16_hi"])
    np.testing.assert_array_equal(side[0], known["split16_lo"])
    edited = any_codec.load("bfloat16_split", known["split16_edit_hi"], known["split16_edit_lo"])
    assert_same_bits(edited, from_bits(known["split16_edit_bits"]))


@pytest.mark.parametrize("rounding", ["nearest", "sr"])
@pytest.mark.parametrize("moment", ["m", "v"])
@pytest.mark.parametrize("size", [128, 27, 1])
def test_root_codes_are_as_known(any_codec, known, size, moment, rounding):
    x = from_bits(known[f"b{size}_x"])
    name, x = ("root_signed", x) if moment == "m" else ("root_unsigned", np.abs(x))
    values, side = any_codec.store(name, x, known[f"b{size}_noise"] if rounding == "sr" else None)
    answer = f"b{size}_{moment}_{rounding}"
    np.testing.assert_array_equal(values, known[f"{answer}_code"])
    assert_same_bits(side[:, 0], from_bits(known[f"{answer}_t"]))
    if rounding == "sr":
        assert_same_bits(any_codec.load(name, values, side), from_bits(known[f"{answer}_value"]))


def test_moments_of_four_steps_are_as_known(any_codec, known):
    """A convolution of 16 channels: rows of 144, in blocks of 128 and 16, with the noise of its elements."""
    seed, ordinal = map(int, known["tensor_hyper"])
    beta1, beta2 = known["tensor_betas"]
    index = np.arange(5 * 144).reshape(5, 144)
    m = v = np.zeros((5, 144), np.float32)
    for i, g in enumerate(known["tensor_g"].view(np.float32)):
        h = any_codec.noise_hash(seed, ordinal, i + 1, index)
        m = m + np.float32(1 - beta1) * (g - m)
        v = v * np.float32(beta2) + np.float32(1 - beta2) * g * g
        kept = {"m": ("root_signed", m, h & 0xFFFF), "v": ("root_unsigned", v, h >> 16)}
        loaded = {}
        for moment, (name, x, noise) in kept.items():
            values, side = any_codec.store(name, x, noise)
            np.testing.assert_array_equal(values, known[f"tensor_{moment}_code"][i])
            assert_same_bits(side, from_bits(known[f"tensor_{moment}_t"][i]))
            loaded[moment] = any_codec.load(name, values, side)
        m, v = loaded["m"], loaded["v"]


# ---- The oracle


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 31, 128, 200])
@pytest.mark.parametrize("name", NAMES)
def test_stores_and_loads_as_the_oracle(codec, name, columns, kind):
    x = blocks(kind, 12, columns)
    x = np.abs(x) if name == "root_unsigned" else x
    for noise in (None, np.random.default_rng(1).integers(0, 2**16, x.shape)):
        if noise is not None and name in ("float16", "bfloat16"):
            continue
        values, side = codec.store(name, x, noise)
        expected_values, expected_side = oracle.store(name, x, noise)
        np.testing.assert_array_equal(values, expected_values)
        if expected_side is not None:
            np.testing.assert_array_equal(side, expected_side)
        assert_same_bits(codec.load(name, values, side), oracle.load(name, expected_values, expected_side))


# ---- bfloat16


def test_every_bfloat16_is_loaded_and_stored_again(codec):
    every = np.arange(2**16, dtype=np.uint16)[None]
    x = codec.load("bfloat16", every, None)
    np.testing.assert_array_equal(bits_of(x[0]), every[0].astype(np.uint32) << np.uint32(16))
    numbers = ~np.isnan(x)
    for noise in (None, np.full(x.shape, 0), np.full(x.shape, 2**16 - 1)):
        values, _ = codec.store("bfloat16_stochastic", x, noise)
        np.testing.assert_array_equal(values[numbers], every[numbers])
        assert np.isnan(bf16_value(values[~numbers])).all()


def test_stochastic_bfloat16_is_right_on_average(codec):
    """The mean over every noise is the number itself, exactly."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x7F7F0000, 60, np.uint32)
    edges = np.array(
        [0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x3F7FFFFF, 0x007FFFFF, 0x00800001, 0x7F7F0000], np.uint32
    )
    magnitude = np.concatenate([bits, edges])
    x = from_bits(np.concatenate([magnitude, magnitude | np.uint32(0x80000000)]))[:, None]
    noise = np.arange(2**16)[None].repeat(len(x), 0)
    values, _ = codec.store("bfloat16_stochastic", x.repeat(2**16, 1), noise)
    np.testing.assert_array_equal(bf16_value(values).astype(np.float64).mean(1), x[:, 0].astype(np.float64))


def test_stochastic_bfloat16_never_makes_an_infinity(codec):
    x = from_bits(np.arange(0x7F7F0000, 0x7F800000, 7, np.uint32))[None]
    values, _ = codec.store("bfloat16_stochastic", np.concatenate([x, -x]), np.full((2, x.size), 2**16 - 1))
    assert np.isfinite(bf16_value(values)).all()


# ---- Split


def test_split_loses_nothing(codec):
    """All upper halves with the edges of the lower ones, and random bits."""
    lower = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFD, 0xFFFE, 0xFFFF], np.uint32)
    every = (np.arange(2**16, dtype=np.uint32)[:, None] << np.uint32(16)) | lower
    random = np.random.default_rng(0).integers(0, 2**32, (1, 2**19), np.uint32)
    for x in (from_bits(every), from_bits(random)):
        values, side = codec.store("bfloat16_split", x)
        assert_same_bits(codec.load("bfloat16_split", values, side), x)
        np.testing.assert_array_equal(np.isnan(bf16_value(values)), np.isnan(x))
        # The value kept beside the residual is the number rounded, so within half a unit of it.
        off = values.astype(np.int64) * 2**16 - bits_of(x)
        assert (np.abs(off[~np.isnan(x)]) <= 2**15).all()


def test_split_values_that_somebody_wrote_are_loaded_as_written(codec):
    """With whatever residual was there before: finite if they are, and to half a unit."""
    every = np.arange(2**16, dtype=np.uint16)
    x = bf16_value(every)
    for residual in (-(2**15), -1, 0, 1, 2**15 - 1):
        loaded = codec.load("bfloat16_split", every, np.full(2**16, residual, np.int16))
        np.testing.assert_array_equal(np.isnan(loaded), np.isnan(x))
        finite = np.isfinite(x)
        assert np.isfinite(loaded[finite]).all()
        assert (np.signbit(loaded) == np.signbit(x))[finite].all()
        if residual >= 0:
            np.testing.assert_array_equal(loaded[np.isinf(x)], x[np.isinf(x)])
        off = bits_of(loaded)[finite].astype(np.int64) - bits_of(x)[finite]
        assert (np.abs(off) <= 2**15).all()


def test_split_weight_set_to_zero_is_zero(codec):
    """Its residual may still be negative, and would make a NaN of the bits of a zero."""
    values = np.array([0x0000, 0x8000, 0x0000], np.uint16)
    loaded = codec.load("bfloat16_split", values, np.array([-1, -(2**15), 0], np.int16))
    np.testing.assert_array_equal(bits_of(loaded), [0, 0x80000000, 0])


def test_split_keeps_what_is_above_the_largest_bfloat16(codec):
    """The value reads as an infinity, and the number is finite again when loaded."""
    x = from_bits([[MAX, 0x7F7F8000, 0xFF7FFFFF]])
    values, side = codec.store("bfloat16_split", x)
    assert np.isinf(bf16_value(values)).all()
    assert_same_bits(codec.load("bfloat16_split", values, side), x)


# ---- Root codes

root_codes = pytest.mark.parametrize("name", list(ROOTS))


def stored_blocks(codec, name, kind, columns=128, n=400):
    """Blocks, stored with noise and loaded again."""
    x = blocks(kind, n, columns)
    x = np.abs(x) if name == "root_unsigned" else x
    noise = np.random.default_rng(1).integers(0, 2**16, x.shape)
    values, side = codec.store(name, x, noise)
    return x, values, side, codec.load(name, values, side)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [128, 27, 1])
@root_codes
def test_codes_are_stored_again_as_they_were(codec, name, columns, kind):
    """Codes and side, bit for bit, whatever noise had made them: what a checkpoint relies upon."""
    x, values, side, loaded = stored_blocks(codec, name, kind, columns)
    again, side_again = codec.store(name, loaded)
    np.testing.assert_array_equal(again, values)
    assert_same_bits(side_again, side)

    nearest, side = codec.store(name, x)
    again, side_again = codec.store(name, codec.load(name, nearest, side))
    np.testing.assert_array_equal(again, nearest)
    assert_same_bits(side_again, side)


@pytest.mark.parametrize("kind", KINDS)
@root_codes
def test_loaded_codes_are_zero_or_normal(codec, name, kind):
    x, values, side, loaded = stored_blocks(codec, name, kind)
    magnitude = np.abs(loaded)
    assert ((loaded == 0) == (values == 0)).all()
    assert (magnitude[loaded != 0] >= np.finfo(np.float32).tiny).all()
    assert np.isfinite(loaded).all()
    assert ((side[:, 0] == 0) == (loaded == 0).all(1)).all()
    if name == "root_unsigned":
        assert ((values == 0) == (x == 0)).all()


@pytest.mark.parametrize("kind", ["normal", "wide", "sparse"])
@root_codes
def test_the_largest_value_of_a_block_has_the_top_code(codec, name, kind):
    """Where the side is above its least, whatever the noise."""
    x, values, side, _ = stored_blocks(codec, name, kind)
    code = ROOTS[name]
    high = side[:, 0] > np.float32(code.levels * code.unit)
    assert high.any()
    top = np.abs(x).argmax(1)
    assert (np.abs(values.astype(int))[np.arange(len(x)), top][high] == code.levels).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
@pytest.mark.parametrize("place", [0, 77, 127])
@root_codes
def test_a_block_with_an_infinity_or_nan_is_nan_and_the_others_are_kept(codec, name, place, bad):
    x = np.ones((2, 300), np.float32)
    x[0, 128 + place] = from_bits([bad])[0] if isinstance(bad, int) else bad
    values, side = codec.store(name, x, np.zeros(x.shape))
    assert (np.isnan(side) == [[False, True, False], [False, False, False]]).all()
    loaded = codec.load(name, values, side)
    assert np.isnan(loaded[0, 128:256]).all()
    x[0, 128:256] = np.nan
    np.testing.assert_array_equal(loaded, x)


@root_codes
def test_zeros_are_zeros(codec, name):
    x = np.array([[0.0] * 128, [-0.0] * 128, [0.0] * 127 + [1.0]], np.float32)
    values, side = codec.store(name, x, np.full(x.shape, 2**16 - 1))
    np.testing.assert_array_equal(side[:, 0], [0, 0, 1])
    np.testing.assert_array_equal(bits_of(codec.load(name, values, side)), bits_of(np.abs(x)))


def test_a_block_whose_largest_value_is_tiny(codec):
    """Signed codes give it up below 2^-124; unsigned ones keep every positive value above zero."""
    tiny = from_bits(np.array([[1], [2], [0x007FFFFF], [0x00800000]], np.uint32))
    unit = np.array([[2.0**-124], [np.nextafter(np.float32(2.0**-124), np.float32(0))]], np.float32)
    x = np.concatenate([tiny, unit])
    values, side = codec.store("root_signed", x)
    np.testing.assert_array_equal(side[:, 0] > 0, [False, False, False, False, True, False])
    values, side = codec.store("root_unsigned", x)
    assert (side[:, 0] >= np.float32(255 * 2**-15)).all()
    assert (values >= 1).all()


@root_codes
def test_root_codes_are_right_on_average(codec, name):
    """The mean code over every noise is the root's place between two codes."""
    x = blocks("normal", 1, 16)
    x = np.abs(x) if name == "root_unsigned" else x
    noise = np.arange(2**16)[:, None].repeat(16, 1)
    values, side = codec.store(name, x.repeat(2**16, 0), noise)
    code = ROOTS[name]
    root = np.abs(x[0]).astype(np.float64) ** (0.5**code.roots)
    z = np.maximum(root / side[0, 0] * code.levels, 0 if code.signed else 1)
    np.testing.assert_allclose(np.abs(values.astype(np.int64)).mean(0), z, rtol=1e-6, atol=2**-16)


@pytest.mark.parametrize("short", [0, 1])
@root_codes
def test_the_least_noise_that_rounds_up_is_that_of_the_oracle(codec, name, short):
    """Noise that just suffices, or falls short by one: a quotient that is off in its last bit would show."""
    x = np.abs(blocks("normal", 200, 128))
    places = np.stack([ROOTS[name].places(row)[0] for row in x]).astype(np.float64)
    noise = np.maximum(-np.rint(places * 65536).astype(np.int64) % 65536 - short, 0)
    values, _ = codec.store(name, x, noise)
    np.testing.assert_array_equal(values, oracle.store(name, x, noise)[0])


# ---- The walk on the CPU


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_any_length(by_isa, name):
    """Whole vectors and what is left over of them have the same bits, and nothing after them is written."""
    largest = by_isa.size(name)
    x = np.abs(blocks("normal", 3, largest))
    noise = np.random.default_rng(1).integers(0, 2**16, x.shape)
    takes_noise = name not in ("float16", "bfloat16", "bfloat16_split")
    for n in range(1, largest + 1):
        row, its_noise = x[:, :n].reshape(1, -1) if name not in ROOTS else x[:, :n], None
        if takes_noise:
            its_noise = noise[:, :n].reshape(row.shape)
        values, side = by_isa.store(name, row, its_noise, block=n)
        expected = oracle.store(name, row, its_noise)
        np.testing.assert_array_equal(values, expected[0])
        if side is not None:
            np.testing.assert_array_equal(side, expected[1])
        assert_same_bits(by_isa.load(name, values, side, block=n), oracle.load(name, *expected))
