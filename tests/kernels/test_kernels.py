"""Every kernel against the numpy oracle: walk, rule, scalars, norm. Each update compares every byte."""

import itertools
import math

import numpy as np
import pytest
import torch
from common import thin_zeros
from format_codes import CPU_LAYOUTS, CUDA_LAYOUTS, F32, F64, NAMES, averages, cpu_has, has_codes
from format_codes import PLAIN as PLAIN_FORMATS

from fused_adamw.backends import native
from fused_adamw.formats import FORMATS, Formats
from fused_adamw.tables import FORMAT_CODE, StepInputs, set_column, status_words

from .backends import Cuda, Native, Triton
from .buffers import Buffer
from .model import GROUPS, PLAIN, Group, Model, Param


def ids(formats):
    return "-".join(NAMES[x] for x in formats)


def layouts_where(wanted):
    """All layouts of all kernels for which this is true."""
    return pytest.mark.parametrize(
        ("kernels", "formats"),
        [
            pytest.param(name, formats, id=f"{name}-{ids(formats)}")
            for name, kernels in (("cpu", Native), ("cuda", Cuda), ("triton", Triton))
            for formats in kernels.layouts
            if wanted(formats)
        ],
        indirect=["kernels"],
    )


layouts = layouts_where(lambda formats: True)
grad_dtypes = pytest.mark.parametrize("dtype", PLAIN_FORMATS, ids=lambda x: ids([x]))


def sizes(block: int, chunk: int) -> list[int]:
    """Around vectors, blocks and chunks."""
    return [0, 1, 3, 4, 5, 7, 8, 9, *(x + i for x in (block, chunk) for i in (-1, 0, 1)), 3 * chunk + 7]


def test_layouts_are_those_of_the_kernels():
    assert (Native.layouts, Cuda.layouts, Triton.layouts) == (CPU_LAYOUTS, CUDA_LAYOUTS, CUDA_LAYOUTS)
    assert all(map(cpu_has, CPU_LAYOUTS))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_build_says_what_it_can_step(device):
    """Python asks it rather than keep a list."""
    on_cuda = CUDA_LAYOUTS if native.build_info()["cuda_archs"] else []
    for names in itertools.product(FORMAT_CODE, repeat=4):
        codes = tuple(FORMAT_CODE[name] for name in names)
        has = cpu_has(codes) if device == "cpu" else codes in on_cuda
        formats = Formats(*(FORMATS[name] for name in names))
        assert native.supports(torch.device(device), formats) == has, names
        if has:
            known = {
                name
                for name, code in FORMAT_CODE.items()
                if native.supports(torch.device(device), formats._replace(average=FORMATS[name]))
            }
            assert known == {NAMES[code] for code in averages(codes)}, names


# ---- Walk


@layouts
def test_update_of_every_size(kernels, formats):
    params = [
        Param(n, step=3.0 * (n % 2), amsgrad=i % 4 in (1, 2))  # some of either kind in whole blocks
        for i, n in enumerate(sizes(kernels.block, kernels.chunk))
    ]
    Model(kernels, params, formats).update(kernels.grids[1], sums=[9.0, 16.0], max_grad_norm=2.5)


@layouts
@pytest.mark.parametrize("amsgrad", [False, True])
def test_update_at_every_alignment(kernels, formats, amsgrad):
    n = kernels.block + 44
    together = [Param(41, shifts=(s,) * 5, side_shifts=(s % 2,) * 5, amsgrad=amsgrad) for s in range(1, 8)]
    one_off = [
        Param(n, **{which: tuple(s * (i == tensor) for i in range(5))}, amsgrad=amsgrad)
        for tensor in range(5)
        for which in ("shifts", "side_shifts")
        for s in ((1, 4) if kernels.is_slow else (1, 2, 3, 4, 6))
    ]
    chunk = max(256, kernels.block)
    Model(kernels, together + one_off, formats, chunk_size=chunk).update(kernels.grids[2])


def mixed_rows(kernels, formats) -> Model:
    """Groups, step counts, amsgrad and missing gradients that change from row to row."""
    random = np.random.default_rng(1)
    count, largest = (16, 300) if kernels.is_slow else (40, 900)
    params = [
        Param(
            int(random.integers(0, largest)),
            group=i % len(GROUPS),
            amsgrad=i // len(GROUPS) % 2 == 1,
            grad=i % 15 != 14,
            step=float(random.integers(5)),
        )
        for i in range(count)
    ]
    assert {(p.group, p.amsgrad) for p in params if p.grad} == set(
        itertools.product(range(len(GROUPS)), (False, True))
    )
    return Model(kernels, params, formats, GROUPS, chunk_size=256)


@layouts
def test_update_of_mixed_rows(kernels, formats):
    model = mixed_rows(kernels, formats)
    for grid in kernels.grids[: 1 if kernels.is_slow else 3]:
        model.update(grid, sums=[4.0], max_grad_norm=0.3)


@pytest.mark.parametrize("size", [3, "block", "block + 1", 1000, 1 << 14])
def test_any_chunk_size(kernels, size):
    size = {"block": kernels.block, "block + 1": kernels.block + 1}.get(size, size)
    model = Model(kernels, [Param(min(4 * size, 1300) + 1)], chunk_size=size)
    total, _ = model.norm()
    assert total == pytest.approx(math.fsum(model.squares()), rel=kernels.norm_rtol)
    model.update()


def test_any_grid(kernels):
    for grid in kernels.grids:
        model = Model(kernels, [Param(40), Param(0), Param(70, group=1)], groups=GROUPS, chunk_size=16)
        total, _ = model.norm(grid)
        assert total == pytest.approx(math.fsum(model.squares()), rel=kernels.norm_rtol)
        model.update(grid)


@pytest.mark.parametrize("params", [[], [Param(0)], [Param(0), Param(0, grad=False)]], ids=len)
def test_nothing_to_do(kernels, params):
    """No chunks: the sum is zero, the status is written, an empty parameter's step still counts."""
    for groups in (PLAIN, ()) if not params else (PLAIN,):
        model = Model(kernels, params, groups=groups)
        assert model.norm(kernels.grids[-1])[0] == 0.0
        model.update(sums=[0.0])
        assert model.update(sums=[4.0]).grad_norm == 2.0


def test_rows_without_chunks_are_counted(kernels):
    """More rows than are counted at once; those without a gradient are not."""
    params = [Param(0, grad=i % 3 != 1, step=float(i)) for i in range(700)]
    model = Model(kernels, params)
    total, _ = model.norm()
    assert total == 0.0
    assert model.update(sums=[total]) == (0.0, "stepped")


def test_positions_that_32_bits_do_not_hold(kernels):
    """The chunks with such positions of a row of 2**32 + 1 elements, in thin memory."""
    numel, far = 2**32 + 1, [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
    c = 2**12
    index = sorted({place // c for place in far})
    p, g, m, v = [thin_zeros(numel, torch.float32).numpy() for _ in range(4)]
    g[far] = 1.0
    model = Model(kernels, [Param(c * len(index))], chunk_size=c)  # a workspace for as many chunks
    t = model.tables
    for name, tensor in (("param", p), ("exp_avg", m), ("exp_avg_sq", v)):
        set_column(t.rows, name, [tensor.ctypes.data])
    set_column(t.rows, "numel", [numel])
    t.grads[0] = g.ctypes.data
    t.chunks = torch.tensor([[0, i] for i in index], dtype=torch.int32)
    assert model.norm()[0] == len(far)
    kernels.update(t, StepInputs(Buffer([0.0] * status_words(0), F64).tensor), kernels.grids[0])
    for tensor, value in ((p, -1e-2), (m, 0.1), (v, 1e-3)):
        np.testing.assert_allclose(tensor[far], value, rtol=1e-6)
        for i in index:
            chunk = tensor[i * c : (i + 1) * c]
            assert np.flatnonzero(chunk).tolist() == [x - i * c for x in far if x // c == i]


# ---- Rule


@layouts_where(lambda formats: not has_codes(formats))
def test_bad_values_stay_where_they_are(kernels, formats):
    """NaN and infinity in a tensor reach their own element, and amsgrad's maximum as in torch."""
    model = Model(kernels, [Param(40, amsgrad=True, step=1.0), Param(40, step=1.0)], formats)
    for buffers in model.buffers:
        for tensor in range(5):
            values = buffers[tensor].values
            values[tensor * 7 : tensor * 7 + 3] = [math.nan, math.inf, 0.0]
            buffers[tensor].write(values)
    model.update()
    maximum = model.buffers[0][4].values
    assert np.isnan(maximum[[7, 21, 28]]).all()


@layouts
def test_special_values(kernels, formats):
    """Zeros, subnormal and huge numbers and NaN, alone and in whole vectors."""
    c = kernels.chunk
    params = [Param(n, step=3.0 * (n % 2), amsgrad=n % 3 == 0, shifts=(n % 2,) * 5) for n in (c, c + 1)]
    Model(kernels, params, formats).set_special_values().update()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.9999), (0.999, 0.9)])
@pytest.mark.parametrize("step", [0, 1, 10**6])
@pytest.mark.parametrize("formats", [(F32,) * 4, (F64,) * 4], ids=ids)
def test_bias_correction(kernels, betas, step, formats):
    with np.errstate(divide="ignore"):  # log(0) in Triton
        Model(kernels, [Param(4, step=float(step))], formats, [Group(betas=betas)]).update()


def test_learning_rate_is_read_at_each_step(kernels):
    model = Model(kernels, [Param(10)], groups=[Group(lr_tensor=True)])
    model.update()
    model.lrs[0].write([0.5])
    model.update()


# ---- Scalars


def test_sums_of_several_tables(kernels):
    assert Model(kernels, [Param(100)]).update(sums=[1.0, 3.0, 5.0], max_grad_norm=0.5).grad_norm == 3.0


def test_small_norm_is_not_clipped(kernels):
    Model(kernels, [Param(100)]).update(sums=[0.25], max_grad_norm=1.0)


def test_no_norm(kernels):
    status = Model(kernels, [Param(100)]).update(None, None, max_grad_norm=0.0, skip_nonfinite=True)
    assert status == (0.0, "stepped")


def test_max_grad_norm_is_not_rounded(kernels):
    Model(kernels, [Param(100)], (F64,) * 4).update(sums=[4.0], max_grad_norm=0.1)


@pytest.mark.parametrize("found_inf", [None, 0.0])
@pytest.mark.parametrize(
    ("loss_scale", "total", "norm"), [(1024.0, 1024.0**2 * 4.0, 2.0), (2.0, 9.0, 1.5), (3.0, None, 0.0)]
)
def test_loss_scale_is_taken_out(kernels, loss_scale, total, norm, found_inf):
    model = Model(kernels, [Param(77)], grad_scale=loss_scale)
    sums = None if total is None else [total]
    status = model.update(sums=sums, max_grad_norm=0.5, loss_scale=loss_scale, found_inf=found_inf)
    assert status == (norm, "stepped")


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("sums", [None, [4.0], [math.nan], [math.inf]], ids=str)
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_skipped_steps(kernels, found_inf, sums, skip_nonfinite):
    model = Model(
        kernels, [Param(33), Param(kernels.chunk + 1, amsgrad=True), Param(9, grad=False), Param(0)]
    )
    for found in (found_inf, found_inf, 0.0):
        model.update(kernels.grids[1], sums=sums, found_inf=found, skip_nonfinite=skip_nonfinite)


# ---- Norm


@grad_dtypes
def test_norm_of_every_size(kernels, dtype):
    c = kernels.norm_chunk
    params = [Param(n, grad=n != 8, shifts=(0, n % 3, 0, 0, 0)) for n in sizes(2 * kernels.block, c)]
    model = Model(kernels, params, (F32, dtype, F32, F32), chunk_size=c)
    total, partials = model.norm(kernels.grids[2])
    np.testing.assert_allclose(partials, model.squares(), rtol=kernels.norm_rtol if dtype != F64 else 1e-14)
    np.testing.assert_allclose(total, math.fsum(partials), rtol=1e-15)


@grad_dtypes
def test_norm_has_the_same_bits_whatever_the_grid_the_order_and_the_alignment(kernels, dtype):
    c = kernels.norm_chunk
    sums = set()
    for i, grid in enumerate(kernels.grids):
        for shift in [i % 3] if kernels.is_slow else range(3):
            params = [Param(3 * c + 7, shifts=(0, shift, 0, 0, 0)), Param(100)]
            sums.add(Model(kernels, params, (F32, dtype, F32, F32), chunk_size=c).norm(grid)[0])
    assert len(sums) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@grad_dtypes
def test_norm_of_bad_gradients(kernels, dtype, bad):
    model = Model(kernels, [Param(700), Param(700)], (F32, dtype, F32, F32), chunk_size=256)
    g = model.buffers[0][1]
    values = g.values
    values[413] = bad
    g.write(values)
    total, partials = model.norm()
    assert total == abs(bad) or (math.isnan(bad) and math.isnan(total))
    assert [math.isfinite(x) for x in partials] == [True, False, True, True, True, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nonfinite_gradient(kernels, bad):
    """Skipped if asked for; else as torch's clip_grad_norm_: an infinite norm makes 0, NaN makes NaN."""
    model = Model(kernels, [Param(kernels.block + 9), Param(20)])
    g = model.buffers[0][1]
    values = g.values
    values[kernels.block + 3] = bad
    g.write(values)
    total, _ = model.norm()
    assert not math.isfinite(total)
    for skip_nonfinite in (True, False):
        model.update(sums=[total], skip_nonfinite=skip_nonfinite)


def test_norm_is_finite_where_squares_overflow_float32(kernels):
    model = Model(kernels, [Param(600)], grad_scale=1e30)
    np.testing.assert_allclose(model.norm()[0], math.fsum(model.squares()), rtol=1e-14)
