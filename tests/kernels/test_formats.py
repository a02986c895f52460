"""What formats need of a walk: noise of the right element, sides beside their values, blocks of codes."""

import math

import numpy as np
import pytest
from format_codes import BF16, F16, F32, PLAIN, SIGNED, SPLIT, UNSIGNED, has_codes, takes_noise

from .model import GROUPS, Group, Model, Param
from .test_kernels import layouts_where

low_precision = layouts_where(lambda formats: not set(formats) <= set(PLAIN))
noisy = layouts_where(takes_noise)
codes = layouts_where(has_codes)
masters = layouts_where(lambda formats: formats[0] == SPLIT)

LENGTHS = (1, 31, 127, 128, 129, 144, 200, 256, 300)  # of rows


# ---- Where elements are


@codes
def test_rows_of_every_length(kernels, formats):
    """In chunks that hold whole blocks, cut them, or are smaller."""
    for chunk_size in (128, 200, 1000) if kernels.is_slow else (1, 100, 127, 128, 129, 200, 384, 1000):
        params = [
            Param(rows * length, columns=length, step=3.0 * (i % 2), side_shifts=(i % 4,) * 5)
            for i, length in enumerate(LENGTHS)
            for rows in ((3,) if kernels.is_slow else (1, 3))
        ]
        Model(kernels, params, formats, chunk_size=chunk_size).update(kernels.grids[1])


@codes
def test_blocks_whose_rows_are_longer_than_chunks(kernels, formats):
    chunk = kernels.chunk // 128 * 128
    params = [Param(2 * n, columns=n, step=2.0) for n in (chunk - 1, chunk, chunk + 1, 2 * chunk + 130)]
    model = Model(kernels, params, formats, chunk_size=chunk)
    for grid in kernels.grids[: 1 if kernels.is_slow else 3]:
        model.update(grid)


@noisy
def test_elements_of_shards_have_the_noise_of_the_whole(kernels, formats):
    """Blocks of columns, anywhere in the whole tensor; across the places that 32 bits do not hold."""
    params = [
        Param(local * rows, columns=local, whole_columns=whole, offset=offset, step=1.0)
        for local, whole in ((128, 128), (128, 384), (256, 1000), (144, 144), (40, 57), (7, 1000), (1, 3))
        for rows in (1, 5)
        for offset in (0, 3, 2**31 - 40, 2**32 - 1, 2**32 - 70, 2**40 + 5)
    ]
    if kernels.is_slow:
        params = params[1::7]
    Model(kernels, params, formats, chunk_size=kernels.chunk).update(kernels.grids[1])


@noisy
def test_rows_of_a_shard_that_are_longer_than_32_bits_hold(kernels, formats):
    """Columns that only unsigned 32-bit numbers hold."""
    params = [Param(260, columns=130, whole_columns=2**32 - 1, offset=i * (2**32 - 1)) for i in (0, 3)]
    Model(kernels, params, formats).update()


# ---- Noise


@noisy
def test_noise_depends_on_seed_ordinal_and_step(kernels, formats):
    """Each draws other bits; the rest of the model is the same."""
    seen = set()
    changes = [{}, {"ordinal": 2**40}, {"ordinal": 1}, {"step": 2.0}, {"step": 2.0**24 - 1}]
    for seed in (0, 1, 2**64 - 1):
        for change in changes if seed == 0 else changes[:1]:
            model = Model(kernels, [Param(300, **{"ordinal": 0, "step": 1.0, **change})], formats)
            model.noise_seed = seed
            model.update()
            seen.add(b"".join(part.elements.tobytes() for b in model.buffers[0] for part in b.parts))
    assert len(seen) == 7


@noisy
def test_noise_of_every_step_is_new(kernels, formats):
    model = Model(kernels, [Param(300), Param(40, columns=20, group=1, grad=False)], formats, GROUPS)
    for _ in range(3):
        model.update(sums=[4.0], max_grad_norm=0.3)


# ---- What is skipped


@low_precision
def test_skipped_steps_touch_nothing(kernels, formats):
    """Not even residuals that are stale, or codes that a store would make otherwise."""
    model = Model(kernels, [Param(300, step=1.0), Param(40, grad=False, step=1.0)], formats)
    set_bits(model)
    model.update(found_inf=1.0)
    model.update(sums=[math.nan], skip_nonfinite=True)
    model.update()


# ---- Values


def skip_subnormal_bfloat16(kernels, formats) -> None:
    if BF16 in formats and not kernels.subnormal_bfloat16:
        pytest.skip("takes wrong bits of subnormal bfloat16 numbers")


def bit_patterns(n: int, seed: int = 0) -> np.ndarray:
    """float32: NaN of both signs, zeros, subnormals, the largest numbers, infinities, and random bits."""
    special = [0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7F800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F7F0000]
    special += [0, 1, 2, 0x7FFF, 0x8000, 0x007FFFFF, 0x00800000, 0x3F7FFFFF, 0x3F808000, 0x3F818000]
    random = np.random.default_rng(seed).integers(0, 2**32, n, np.uint32)
    both = [*special, *(bits | 0x80000000 for bits in special)]
    random[: len(both)] = both
    return random


def set_bits(model: Model) -> None:
    """Fill the parameters, and the moments of 16 bits, with all kinds of bits, and residuals with any."""
    for buffers in model.buffers:
        for buffer in (buffers[0], *buffers[2:4]):
            bits = bit_patterns(buffer.n, buffer.n)
            if buffer is buffers[3]:
                bits &= np.uint32(0x7FFFFFFF)
            if buffer.format in (SIGNED, UNSIGNED):
                buffer.memory.elements[:] = bits.astype(buffer.memory.elements.dtype)
                if buffer.format == SIGNED:  # no store makes it
                    buffer.memory.elements[buffer.memory.elements == -128] = -127
            elif buffer.memory.elements.itemsize == 2:
                buffer.memory.elements[:] = (bits >> 16).astype(np.uint16)
            else:
                buffer.memory.elements[:] = bits.view(np.float32)
            if buffer.format == SPLIT:
                buffer.side.elements[:] = (
                    (bits * np.uint32(0x9E3779B9) >> 16).astype(np.uint16).view(np.int16)
                )


@low_precision
def test_every_kind_of_bits(kernels, formats):
    """Of parameters, moments and gradients, at the first step and later, with decay and without."""
    skip_subnormal_bfloat16(kernels, formats)
    params = [Param(300, step=step, group=group) for step in (0.0, 5.0) for group in (0, 1)]
    model = Model(kernels, params, formats, GROUPS)
    set_bits(model)
    for buffers in model.buffers[:2]:
        g = buffers[1]
        bits = bit_patterns(g.n, 1)
        g.memory.elements[:] = (
            bits.view(np.float32) if g.memory.elements.itemsize == 4 else (bits >> 16).astype(np.uint16)
        )
    model.update()


@masters
def test_residuals_that_are_stale(kernels, formats):
    """The parameter was zeroed, set to an infinity or to NaN beside a residual of the number before."""
    model = Model(kernels, [Param(96)], formats)
    p, g = model.buffers[0][:2]
    g.write(np.zeros(g.n))
    values = np.array(
        [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7F7F, 0xFF7F, 0x7FC0, 0xFFFF, 0x0001, 0x8001], np.uint16
    )
    residuals = np.array([-(2**15), -1, 0, 1, 2**15 - 1], np.int16)
    p.memory.elements[:50], p.side.elements[:50] = np.repeat(values, 5), np.tile(residuals, 10)
    model.update()


@masters
def test_a_master_moves_as_float32_does(kernels, formats):
    """Steps that are too small for bfloat16, bit for bit."""
    groups = [Group(lr=1e-5)]
    split = Model(kernels, [Param(200)], formats, groups)
    full = Model(kernels, [Param(200)], (F32, *formats[1:]), groups)
    full.buffers[0][0].write(split.buffers[0][0].values)
    for _ in range(3 if kernels.is_slow else 20):
        for model in (split, full):
            model.update()
    ours, theirs = (model.buffers[0][0].values.view(np.uint32) for model in (split, full))
    np.testing.assert_array_equal(ours, theirs)


@codes
def test_blocks_that_are_not_finite_are_not_lost(kernels, formats):
    """An infinity or a NaN makes its block NaN, and no other."""
    for bad in (math.nan, math.inf, -math.inf):
        model = Model(kernels, [Param(600, columns=300, step=1.0)], formats)
        g = model.buffers[0][1]
        values = g.values.copy()
        values[140] = bad  # of the first row, the second block
        g.write(values)
        model.update()
        nan = np.isnan(model.buffers[0][2].values)
        assert nan[128:256].all()
        assert not nan[:128].any()
        assert not nan[256:].any()
        model.update()


@codes
def test_blocks_of_any_size_of_number(kernels, formats):
    """Zeros, the least and the largest numbers, outliers, blocks that fade away."""
    skip_subnormal_bfloat16(kernels, formats)
    scales = (0.0, 1e-45, 1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e18)
    params = [Param(128 * len(scales), columns=128 * k, step=s) for k in (1, 2) for s in (0.0, 7.0)]
    model = Model(kernels, params, formats)
    for buffers in model.buffers:
        g = buffers[1]
        values = g.values.reshape(len(scales), -1) * np.array(scales)[:, None]
        values[:, 5] *= 1e4
        values[:, 65::2] = 0.0
        g.write(values.clip(-6e4, 6e4).reshape(-1) if g.format == F16 else values.reshape(-1))
    for _ in range(2):
        model.update()
    for buffers in model.buffers:
        buffers[1].write(np.zeros(buffers[1].n))
    model.update()
