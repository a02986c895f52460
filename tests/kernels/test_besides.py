"""What a step does besides the rule: the average of parameters, and what it finds out of each chunk."""

import math

import numpy as np
import pytest
from format_codes import BF16, CPU_LAYOUTS, CUDA_LAYOUTS, F32, F64, NONE, STOCHASTIC, averages, has_codes

from fused_adamw.tables import WARMUPS, Averaging

from .backends import Cuda, Native, Triton
from .model import GROUPS, Group, Model, Param
from .test_kernels import ids, sizes

LERP = Averaging(0.9)


def layouts_where(wanted):
    """All layouts of all kernels for which this is true, with each format of an average."""
    return pytest.mark.parametrize(
        ("kernels", "formats", "average"),
        [
            pytest.param(name, formats, average, id=f"{name}-{ids((*formats, average))}")
            for name, kernels in (("cpu", Native), ("cuda", Cuda), ("triton", Triton))
            for formats in kernels.layouts
            for average in averages(formats)
            if wanted(formats)
        ],
        indirect=["kernels"],
    )


layouts = layouts_where(lambda formats: True)
codes = layouts_where(has_codes)


def rows(kernels) -> list[Param]:
    """Of every size, some of each kind in whole blocks, some at their first update."""
    lengths = sizes(kernels.block, kernels.chunk)
    if kernels.is_slow:
        lengths = [0, 3, *(kernels.block + i for i in (-1, 0, 1)), kernels.chunk + 7]
    return [
        Param(n, step=3.0 * (n % 2), amsgrad=i % 4 in (1, 2), group=i % len(GROUPS))
        for i, n in enumerate(lengths)
    ]


# ---- The average


@layouts
def test_update_of_every_size(kernels, formats, average):
    """With stats and an average, and twice, so that averages that were the parameter move on."""
    model = Model(kernels, rows(kernels), formats, GROUPS, average=average, averaging=LERP, stats=True)
    model.update(kernels.grids[0], sums=[9.0, 16.0], max_grad_norm=2.5)
    if not kernels.is_slow:
        model.update(kernels.grids[1])  # and squares of gradients, which no norm pass has found


@pytest.mark.parametrize("average", [F32, STOCHASTIC])
@pytest.mark.parametrize("formats", [(F32,) * 4, (BF16,) * 4], ids=ids)
def test_average_at_every_alignment(kernels, formats, average):
    n = kernels.block + 44
    params = [
        Param(n, step=1.0, average_shift=shift, amsgrad=amsgrad)
        for shift in ((0, 1, 4) if kernels.is_slow else range(9))
        for amsgrad in (False, True)
    ]
    model = Model(kernels, params, formats, average=average, averaging=LERP, chunk_size=n + 20)
    model.update(kernels.grids[2])


@codes
def test_average_beside_codes(kernels, formats, average):
    """Rows of every length, in chunks that cut blocks, and shards."""
    for chunk_size in (200,) if kernels.is_slow else (1, 100, 128, 200, 1000):
        # An emulated chunk takes hundreds of threads: of one element, there are to be few.
        lengths, local = ((1, 31, 128), 50) if chunk_size == 1 else ((1, 31, 127, 128, 144, 256, 300), 256)
        params = [
            Param(3 * length, columns=length, step=3.0 * (i % 2), average_shift=i % 3)
            for i, length in enumerate(lengths)
        ]
        params.append(Param(3 * local, columns=local, whole_columns=1000, offset=2**32 - 70, step=1.0))
        options = {"average": average, "averaging": LERP, "stats": True}
        Model(kernels, params, formats, chunk_size=chunk_size, **options).update(kernels.grids[1])


@pytest.mark.parametrize(
    "formats", [(F32,) * 4, (BF16, BF16, F32, F32), (BF16, F32, BF16, STOCHASTIC)], ids=ids
)
def test_a_stochastic_average_has_the_noise_of_the_whole(kernels, formats):
    """Even where nothing else takes noise: shards of columns, anywhere in the whole tensor."""
    params = [
        Param(local * rows, columns=local, whole_columns=whole, offset=offset, step=1.0)
        for local, whole in ((128, 384), (40, 57), (7, 1000))
        for rows in (1, 5)
        for offset in (0, 2**32 - 70, 2**40 + 5)
    ]
    model = Model(kernels, params, formats, average=STOCHASTIC, averaging=LERP, chunk_size=kernels.chunk)
    model.update(kernels.grids[1])


@pytest.mark.parametrize(
    "averaging",
    [
        Averaging(0.0),
        Averaging(0.3),
        Averaging(0.5),
        Averaging(1.0),
        Averaging(0.9999, every=3),
        Averaging(0.9, start_step=2),
        Averaging(0.9, start_step=3, every=2),
        *(
            Averaging(decay, warmup, *rest)
            for decay in (0.4, 0.999)
            for warmup in (1, 2)
            for rest in ((), (2, 3))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("formats", [(F32,) * 4, (F64,) * 4], ids=ids)
def test_when_and_how_far_the_average_moves(kernels, averaging, formats):
    """At all of the first updates, and late ones; in rows that count differently."""
    params = [Param(9, step=step) for step in (0.0, 1.0, 2.0, 3.0, 1000.0)]
    model = Model(kernels, params, formats, average=averages(formats)[0], averaging=averaging)
    for _ in range(6):
        model.update()


def test_warmups_are_those_that_kernels_know():
    assert WARMUPS == (None, "timm", "diffusers")


def test_rows_without_an_average(kernels):
    params = [Param(kernels.block + 3, step=1.0, average=i % 2 == 0, amsgrad=i == 3) for i in range(4)]
    Model(kernels, params, average=F32, averaging=LERP).update()


def test_an_average_follows_what_is_kept(kernels):
    """Of a parameter in bfloat16 the rounded value: at a weight of 1 they are equal."""
    for average in (F32, STOCHASTIC):
        model = Model(kernels, [Param(kernels.block + 9)], (BF16, BF16, F32, F32), average=average)
        model.update()
        p, averaged = model.buffers[0][0], model.buffers[0][6]
        np.testing.assert_array_equal(averaged.values, p.values)


@pytest.mark.parametrize("stats", [False, True])
def test_skipped_steps_touch_nothing(kernels, stats):
    params = [Param(300, step=1.0), Param(40, grad=False, step=1.0)]
    model = Model(kernels, params, average=F32, averaging=LERP, stats=stats)
    model.update(found_inf=1.0)
    model.update(sums=[math.nan], skip_nonfinite=True)
    model.update()
    model.update(found_inf=1.0)


# ---- Stats


@pytest.mark.parametrize("formats", sorted({*CPU_LAYOUTS, *CUDA_LAYOUTS}), ids=ids)
def test_stats_without_an_average(kernels, formats):
    if formats not in kernels.layouts:
        pytest.skip("no such layout")
    n = kernels.block
    params = [Param(2 * n + 3, step=4.0, grad=i != 1, amsgrad=i == 2, shifts=(i == 3,) * 5) for i in range(4)]
    model = Model(kernels, params, formats, average=NONE, stats=True, chunk_size=n // 128 * 128 + 128)
    model.update(kernels.grids[1], sums=[4.0], max_grad_norm=0.3, loss_scale=8.0)


@pytest.mark.parametrize("formats", [(F32,) * 4, (BF16,) * 4, (F64,) * 4], ids=ids)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf], ids=str)
def test_largest_gradient(kernels, formats, bad):
    """Anywhere, and NaN whatever else is there; beside an infinity, and alone."""
    model = Model(kernels, [Param(kernels.block + 70, step=1.0) for _ in range(2)], formats, stats=True)
    for place, buffers in zip((0, kernels.block + 69), model.buffers, strict=True):
        g = buffers[1]
        values = g.values.copy()
        values[place], values[50] = bad, math.inf
        g.write(values)
    model.update()


def test_stats_of_huge_and_tiny_numbers(kernels):
    """Squares that float32 does not hold."""
    for scale in (1e30, 1e-30):
        model = Model(kernels, [Param(kernels.block + 9, step=1.0)], grad_scale=scale, stats=True)
        model.update()
        assert model.stats.values[0] > 0.0


@pytest.mark.parametrize("lr", [1e-5, 1e-3, 0.1])
def test_lost_updates(kernels, lr):
    """Most, some and few; none of parameters that are not bfloat16; of zeros, that have no exponent, none."""
    for formats in ((BF16, BF16, F32, F32), (F32,) * 4):
        model = Model(kernels, [Param(700, step=2.0)], formats, [Group(lr=lr)], stats=True, chunk_size=1024)
        p = model.buffers[0][0]
        values = p.values.copy()
        values[::50], values[1::50] = 0.0, 1e-30
        p.write(values)
        model.update()
        lost = model.stats.values[4]
        assert (lost > 0) == (formats[0] == BF16)


@pytest.mark.parametrize("formats", [(F32,) * 4, (BF16,) * 4], ids=ids)
def test_stats_have_the_same_bits_whatever_the_grid(kernels, formats):
    found = set()
    for grid in kernels.grids:
        params = [Param(2 * kernels.block + 9, step=1.0), Param(40, grad=False), Param(70)]
        model = Model(kernels, params, formats, stats=True, chunk_size=kernels.block)
        model.update(grid)
        found.add(model.stats.values.tobytes())
    assert len(found) == 1
