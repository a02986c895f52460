"""Formats of whole tensors: any shape and strides, shards, memory; the host never reads a value."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_adamw.formats import (
    BLOCK,
    FORMATS,
    PLAIN,
    Field,
    Window,
    element_index,
    has_dense_rows,
    memory_order,
    noise_bits,
    noise_hash,
    noise_word,
)

from . import oracle
from .codecs import to_numpy

ROOT_NAMES = ("root_signed", "root_unsigned")
names = pytest.mark.parametrize("name", FORMATS)
root_names = pytest.mark.parametrize("name", ROOT_NAMES)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid_out(x, order):
    """The same numbers with the dimensions of `order` from the outermost to the innermost in memory."""
    inverse = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def in_memory(t):
    """The elements of a dense tensor as they follow each other in memory."""
    return to_numpy(torch.as_strided(t, (t.numel(),), (1,)))


def same_layout(a, b):
    """Whether elements follow each other in the same order."""
    return a.shape == b.shape and (
        a.numel() == 0
        or all(x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1)
    )


def noise_of(t, name="exp_avg", step=3, window=None):
    index = element_index(t, window)
    return noise_bits(noise_hash(noise_word(1, 2), torch.tensor(step), index), name)


# ---- Every shape, every layout


@st.composite
def tensors(draw, dense_rows=False):
    """Numbers in a tensor of any shape, dense in memory in any order of its dimensions."""
    shape = draw(st.lists(st.integers(0, 4), min_size=1 if dense_rows else 0, max_size=4))
    if shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 1, 2, 40, 127, 128, 129, 300]))
    order = draw(st.permutations(range(len(shape))))
    if dense_rows:
        order = [0, *(dim for dim in order if dim)]
    return laid_out(randn(*shape, seed=draw(st.integers(0, 99))), order)


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from([name for name in FORMATS if name not in ROOT_NAMES]), st.booleans())
def test_formats_of_single_values_keep_any_layout(x, name, noisy):
    field = FORMATS[name].zeros(x)
    assert not field.load().any()
    noise = noise_of(x) if noisy else None
    field.write(x, noise)
    for t in (field.values, field.load(), *([] if field.side is None else [field.side])):
        assert same_layout(t, x)
    if field.format in PLAIN.values():
        assert field.load().equal(x.to(field.format.dtype).to(field.load().dtype))
    if name.startswith("bfloat16"):
        stochastic = noisy and field.format.stochastic
        values, side = oracle.store(name, in_memory(x), in_memory(noise) if stochastic else None)
        np.testing.assert_array_equal(in_memory(field.values), values)
        if side is not None:
            np.testing.assert_array_equal(in_memory(field.side), side)


@settings(max_examples=60, deadline=None)
@given(tensors(dense_rows=True), st.sampled_from(ROOT_NAMES), st.booleans())
@example(laid_out(randn(5, 3, 7, 7), [0, 2, 3, 1]), "root_signed", True)
def test_root_codes_follow_rows_in_memory(x, name, noisy):
    assert has_dense_rows(x)
    x = x.abs() if name == "root_unsigned" else x
    field = FORMATS[name].zeros(x)
    noise = noise_of(x) if noisy else None
    field.write(x, noise)
    assert same_layout(field.values, x)
    assert same_layout(field.load(), x)
    rows = x.shape[0], math.prod(x.shape[1:])
    codes, scales = oracle.store(
        name, in_memory(x).reshape(rows), None if noise is None else in_memory(noise).reshape(rows)
    )
    np.testing.assert_array_equal(in_memory(field.values).reshape(rows), codes)
    np.testing.assert_array_equal(to_numpy(field.side), scales)
    np.testing.assert_array_equal(in_memory(field.load()).reshape(rows), oracle.load(name, codes, scales))


@names
def test_what_is_computed_with_may_have_other_strides(name):
    """A gradient may be laid out otherwise, and with it what is computed from both."""
    x = randn(6, 4, 5, 5).abs()
    field = FORMATS[name].zeros(x.contiguous(memory_format=torch.channels_last))
    other = FORMATS[name].zeros(x.contiguous(memory_format=torch.channels_last))
    noise = noise_of(field.values)
    field.write(x, noise)
    other.write(x.contiguous(memory_format=torch.channels_last), noise.contiguous())
    assert field.load().equal(other.load())


@pytest.mark.parametrize(
    ("t", "dense"),
    [
        (torch.empty(3, 4), True),
        (torch.empty(4, 3).t(), False),
        (torch.empty(1, 3).t(), True),
        (torch.empty(3, 8)[:, ::2], False),
        (torch.empty(6, 4)[::2], False),
        (torch.empty(4, 6)[:, :4], False),
        (torch.empty(8, 3, 2, 2).contiguous(memory_format=torch.channels_last), True),
        (torch.empty(3, 4, 5).transpose(1, 2), True),
        (torch.empty(3, 4, 5).transpose(0, 2), False),
        (torch.empty(5), True),
        (torch.empty(()), False),
        (torch.empty(0, 4), True),
        (torch.empty(5).as_strided((1, 5), (77, 1)), True),
    ],
)
@root_names
def test_root_codes_need_dense_rows(name, t, dense):
    assert has_dense_rows(t) == dense
    if dense:
        FORMATS[name].zeros(t)
    elif t.dim() == 0 or memory_order(t)[0] != 0:
        with pytest.raises(ValueError, match=f"^{name} needs a tensor whose rows are dense"):
            FORMATS[name].zeros(t)
    else:  # what holds the codes has no holes
        assert FORMATS[name].zeros(t).values.is_contiguous()


# ---- Shards


@names
def test_a_shard_of_rows_is_kept_as_the_rows_of_the_whole(name):
    """Even and uneven, and with noise: values, side and what is loaded."""
    x = randn(7, 150).abs()
    whole = FORMATS[name].zeros(x)
    whole.write(x, noise_of(x))
    start = 0
    for rows in (3, 3, 1, 0):
        part = x[start : start + rows]
        window = Window(start * 150, rows * 150, 7 * 150)
        shard = FORMATS[name].zeros(part)
        shard.write(part, noise_of(part, window=window))
        assert shard.values.equal(whole.values[start : start + rows])
        if shard.side is not None:
            assert shard.side.equal(whole.side[start : start + rows])
        start += rows


@root_names
def test_a_shard_of_whole_blocks_is_kept_as_in_the_whole(name):
    x = randn(5, 3 * BLOCK).abs()
    whole = FORMATS[name].zeros(x)
    whole.write(x, noise_of(x))
    for start, blocks in ((0, 2), (2, 1)):
        columns = slice(start * BLOCK, (start + blocks) * BLOCK)
        part = x[:, columns].contiguous()
        shard = FORMATS[name].zeros(part)
        shard.write(part, noise_of(part, window=Window(start * BLOCK, blocks * BLOCK, 3 * BLOCK)))
        assert shard.values.equal(whole.values[:, columns])
        assert shard.side.equal(whole.side[:, start : start + blocks])


# ---- Memory


@names
def test_bytes_are_those_of_the_tensors(name):
    for shape in ((), (5,), (3, 0), (16, 144), (2, 3, 5, 7)):
        if name in ROOT_NAMES and not shape:
            continue
        field = FORMATS[name].zeros(torch.empty(shape))
        tensors = [t for t in (field.values, field.side) if t is not None]
        assert FORMATS[name].nbytes(shape) == sum(t.numel() * t.element_size() for t in tensors)
        if field.side is not None:
            assert field.side.shape == FORMATS[name].side_shape(shape)
            assert field.side.dtype == FORMATS[name].side_dtype


def test_bytes_per_value():
    per_value = {name: format.nbytes((64, 256)) / (64 * 256) for name, format in FORMATS.items()}
    assert per_value == {
        "float32": 4,
        "float64": 8,
        "float16": 2,
        "bfloat16": 2,
        "bfloat16_stochastic": 2,
        "bfloat16_split": 4,
        "root_signed": 1 + 4 / 128,
        "root_unsigned": 1 + 4 / 128,
    }


@names
def test_writing_stays_in_place_and_skips(name):
    field = FORMATS[name].zeros(randn(4, 200))
    addresses = [t.data_ptr() for t in field[1:] if t is not None]
    field.write(randn(4, 200).abs(), skip=torch.tensor(False))
    before = [None if t is None else t.clone() for t in field[1:]]
    assert field.load().any()
    field.write(torch.full((4, 200), torch.nan), skip=torch.tensor(True))
    for old, new in zip(before, field[1:], strict=True):
        assert old is None or old.equal(new)
    assert addresses == [t.data_ptr() for t in field[1:] if t is not None]


@names
def test_encoding_takes_any_dtype_and_what_was_decoded_comes_back(name):
    like = torch.empty(4, 200, dtype=torch.bfloat16)
    field = FORMATS[name].encode(randn(4, 200).double().abs(), like)
    assert field.as_torch().is_floating_point()
    again = FORMATS[name].encode(field.load(), like)
    assert again.values.equal(field.values)
    assert field.side is None or again.side.equal(field.side)


def test_what_torch_would_hold():
    """The tensors themselves where they hold floating-point numbers; codes as float32."""
    for name, format in FORMATS.items():
        field = format.encode(randn(4, 200).abs(), torch.empty(4, 200))
        seen = field.as_torch()
        if name in ROOT_NAMES:
            assert seen.dtype == torch.float32
            assert seen.equal(field.load())
        else:
            assert seen is field.values


def test_plain_formats_are_found_by_dtype():
    assert {dtype: format.name for dtype, format in PLAIN.items()} == {
        getattr(torch, name): name for name in ("float32", "float64", "float16", "bfloat16")
    }


@names
def test_fields_can_be_copied_and_pickled(name):
    field = FORMATS[name].encode(randn(2, 130).abs(), torch.empty(2, 130))
    for twin in (copy.deepcopy(field), pickle.loads(pickle.dumps(field))):
        assert twin.format == field.format
        assert twin.values.equal(field.values)
        assert twin.values.data_ptr() != field.values.data_ptr()


# ---- How it computes


def one_step(name, device="cpu"):
    x = torch.zeros(6, 144, device=device)
    step = torch.ones((), device=device)
    field = FORMATS[name].zeros(x)
    h = noise_hash(noise_word(0, 0), step, element_index(x, Window(10, 144, 200)))
    field.write(field.load() + 1, noise_bits(h, "exp_avg"), skip=step > 2)
    return field


@names
def test_nothing_is_read_on_the_host(name):
    """Fake tensors have no values: whoever asks for one fails."""
    with FakeTensorMode():
        field = one_step(name)
    assert field.values.shape == (6, 144)


@names
def test_the_default_dtype_does_not_matter(name, default_dtype):
    x, noise = randn(3, 200).abs(), noise_of(torch.empty(3, 200))
    expected = FORMATS[name].store(x, noise, x)
    loaded = FORMATS[name].load(*expected)
    default_dtype(torch.float64)
    stored = FORMATS[name].store(x, noise, x)
    assert stored[0].equal(expected[0])
    assert stored[1] is None or (stored[1].equal(expected[1]) and stored[1].dtype == expected[1].dtype)
    again = FORMATS[name].load(*expected)
    assert again.equal(loaded)
    assert again.dtype == (torch.float64 if name == "float64" else torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@names
def test_a_gpu_keeps_the_same_bits_and_is_not_waited_for(name):
    torch.cuda.set_sync_debug_mode("error")
    try:
        field = one_step(name, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = one_step(name)
    assert field.values.cpu().equal(expected.values)
    assert field.side is None or field.side.cpu().equal(expected.side)


def test_field_is_a_pair_of_tensors_with_a_format():
    p = torch.nn.Parameter(randn(3, 5).bfloat16())
    field = Field(FORMATS["bfloat16_split"], p, FORMATS["bfloat16_split"].new_side(p))
    assert field.load().equal(p.float())
    with torch.no_grad():
        field.write(field.load() + 2**-20)
    assert p.equal(randn(3, 5).bfloat16())
    assert field.load().equal(p.float() + 2**-20)
