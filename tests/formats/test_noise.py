"""The noise of stochastic rounding: a hash that looks random in seed, parameter, step and element."""

import functools

import numpy as np
import pytest
import torch

from fused_adamw.formats import NOISE_SHIFT, Window, element_index, noise_bits, noise_hash, noise_word

from . import oracle

FAR = 2**33


def test_noise_is_as_known(any_codec, known):
    inputs = (known[f"noise_{name}"] for name in ("seed", "ordinal", "step", "h"))
    for seed, ordinal, step, expected in zip(*inputs, strict=True):
        h = any_codec.noise_hash(int(seed), int(ordinal), int(step), known["noise_index"])
        np.testing.assert_array_equal(h, expected)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 2**64 + 5])
@pytest.mark.parametrize("ordinal", [0, 1, 10**6])
def test_noise_is_that_of_the_oracle(codec, seed, ordinal):
    """Any integer is a seed, elements beyond 2^32 have noise of their own."""
    index = np.concatenate([np.arange(40), FAR + np.arange(40), [2**32 - 1, 2**32, 2**62]])
    for step in (1, 2, 2**24, 2**40):
        h = codec.noise_hash(seed, ordinal, step, index)
        np.testing.assert_array_equal(h, oracle.noise_hash(seed, ordinal, step, index))
        assert len(set(h)) == len(index)


def test_the_moments_do_not_share_bits():
    h = torch.tensor([0x12345678, 0xFFFF0000])
    assert noise_bits(h, "param").tolist() == noise_bits(h, "exp_avg").tolist() == [0x5678, 0]
    assert noise_bits(h, "exp_avg_sq").tolist() == [0x1234, 0xFFFF]
    assert all(noise_bits(h, name).dtype == torch.int32 for name in NOISE_SHIFT)


# ---- Is it random?


@functools.lru_cache
def hash_over(axis, n, stride=1, seed=3):
    """The hash of n consecutive elements, steps or parameters."""
    k = np.arange(n) * stride
    if axis == "index":
        word, step = noise_word(seed, 5), torch.tensor(7)
        return noise_hash(word, step, torch.tensor(k)).numpy()
    zero = torch.zeros(1, dtype=torch.int64)
    if axis == "step":
        return noise_hash(noise_word(seed, 5), torch.tensor(1 + k), zero).numpy()
    assert axis == "ordinal"
    hashes = [noise_hash(noise_word(seed, int(i)), torch.tensor(7), zero) for i in k]
    return torch.cat(hashes).numpy()


def z_score(cells, n_cells=1024):
    """By how many standard deviations chi-square misses what independent, uniform cells give."""
    expected = len(cells) / n_cells
    chi2 = ((np.bincount(cells, minlength=n_cells) - expected) ** 2 / expected).sum()
    return (chi2 - (n_cells - 1)) / np.sqrt(2 * (n_cells - 1))


AXES = {"index": 2**20, "step": 30_000, "ordinal": 10_000}


@pytest.mark.parametrize("axis", AXES)
def test_bits_are_uniform(axis):
    h = hash_over(axis, AXES[axis])
    for shift in range(32 - 9):
        assert abs(z_score(h >> shift & 1023)) < 5


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_independent(axis):
    """Five bits of one with five of the next, and of one half with the other half."""
    h = hash_over(axis, AXES[axis])
    for shift in (0, 11, 16, 27):
        bits = h >> shift & 31
        assert abs(z_score(bits[:-1] << 5 | bits[1:])) < 5
    assert abs(z_score((h >> 16 & 31) << 5 | h & 31)) < 5
    assert abs(z_score((h >> 27 & 31) << 5 | h >> 11 & 31)) < 5


@pytest.mark.parametrize("stride", [2, 128, 1000, 2**12, 2**20, 2**32])
def test_bits_are_uniform_along_strides(stride):
    """Columns of a matrix are no less random than rows."""
    h = hash_over("index", 2**16, stride)
    for shift in (0, 6, 16, 22):
        assert abs(z_score(h >> shift & 1023)) < 5


@pytest.mark.parametrize("axis", AXES)
def test_every_bit_is_independent_of_the_next(axis):
    """1,024 pairs: a bit of one, and a bit of its neighbour."""
    h = hash_over(axis, AXES[axis])
    bits = (h[:, None] >> np.arange(32) & 1) * 2.0 - 1
    z = bits[:-1].T @ bits[1:] / np.sqrt(len(h) - 1)
    assert np.abs(z).max() < 5


def test_seeds_give_other_noise():
    a, b = (hash_over("index", 2**12, seed=seed) for seed in (3, 4))
    assert (a == b).sum() == 0


# ---- Where an element is


@pytest.mark.parametrize(
    ("whole", "dim", "sizes"),
    [
        ((10, 6), 0, [3, 3, 3, 1]),
        ((3, 6), 0, [1, 1, 1, 0]),
        ((4, 10), 1, [4, 4, 2, 0]),
        ((3, 4, 5), 1, [2, 2]),
        ((3, 4, 5), 2, [2, 2, 1]),
        ((7,), 0, [4, 3]),
    ],
)
def test_elements_of_shards_have_the_places_of_the_whole(whole, dim, sizes):
    index = element_index(torch.empty(whole))
    inner = int(np.prod(whole[dim + 1 :]))
    start = 0
    for size in sizes:
        part = index.narrow(dim, start, size)
        window = Window(start * inner, size * inner, whole[dim] * inner)
        assert element_index(torch.empty(part.shape), window).equal(part)
        start += size


def test_places_follow_memory():
    x = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    index = element_index(x)
    flat = torch.empty(x.numel(), dtype=torch.int64)
    torch.as_strided(flat, x.shape, x.stride()).copy_(index)
    assert flat.equal(torch.arange(x.numel()))
    assert element_index(torch.tensor(3.0)).tolist() == 0
