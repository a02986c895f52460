"""A complex parameter is stepped as the pairs of reals that it is kept in, whatever a step does besides."""

import math

import numpy as np
import oracle
import pytest
import torch
from common import NATIVE, array, randn, snapshot, unchanged_since
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fused_adamw import EMA, SpikeGuard

DTYPES = [torch.complex64, torch.complex128]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def complex_normal(*shape, seed=0, dtype=torch.complex64, device="cpu"):
    real, imaginary = (randn(*shape, seed=2 * seed + i, dtype=dtype.to_real()) for i in range(2))
    return torch.complex(real, imaginary).to(device)


OPTIONS = st.fixed_dictionaries(
    {
        "max_grad_norm": st.sampled_from([None, 0.1, 1e6]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "nesterov": st.booleans(),
        "cautious_weight_decay": st.booleans(),
        "ema": st.sampled_from([None, EMA(0.7)]),
        "stats": st.booleans(),
    }
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
)
def test_pairs_of_reals(target, shape, order, dtype, options):
    """Bit for bit, in any order of dimensions."""
    if target.slow and not (options["amsgrad"] and options["max_grad_norm"]):
        return
    dims = order.sample(range(len(shape)), len(shape))
    start = complex_normal(*(shape[d] for d in dims), dtype=dtype, device=target.device)
    start = start.permute(np.argsort(dims).tolist())
    complex_ = nn.Parameter(start.clone(memory_format=torch.preserve_format))
    real = nn.Parameter(torch.view_as_real(start).clone(memory_format=torch.preserve_format))
    one, other = (target.adamw([("x", p)], lr=0.1, weight_decay=0.5, **options) for p in (complex_, real))
    for step in range(2):
        grad = torch.empty_like(start).copy_(complex_normal(*shape, seed=1 + step, dtype=dtype))
        complex_.grad, real.grad = grad, torch.view_as_real(grad).clone(memory_format=torch.preserve_format)
        before = grad.clone()
        one.step()
        other.step()
        assert torch.equal(grad, before)
    assert not one._plan.fallbacks
    assert torch.equal(torch.view_as_real(complex_.detach()), real.detach())
    a, b = one.state[complex_], other.state[real]
    assert a.keys() == b.keys()
    for key in a.keys() - {"step"}:
        assert (a[key].dtype, a[key].stride()) == (dtype, complex_.stride())
        assert torch.equal(torch.view_as_real(a[key]), b[key])
    if options["stats"] or options["max_grad_norm"] is not None:
        assert one.param_stats() == other.param_stats()
    if options["max_grad_norm"] is not None:
        assert torch.equal(one.grad_norm, other.grad_norm)


@dtypes
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_same_checkpoint_as_torch_s(target, dtype, amsgrad):
    """Keys and dtypes; and what torch has begun, ours goes on with."""
    p = nn.Parameter(complex_normal(4, 3, dtype=dtype, device=target.device))
    q = nn.Parameter(p.detach().clone())
    ours, theirs = target.adamw([p], amsgrad=amsgrad), torch.optim.AdamW([q], amsgrad=amsgrad, foreach=False)
    for step in range(4):
        q.grad = complex_normal(4, 3, seed=step, dtype=dtype, device=target.device)
        if step >= 2:
            p.grad = q.grad.clone()
            ours.step()
        theirs.step()
        if step == 1:
            p.data.copy_(q.data)
            ours.load_state_dict(theirs.state_dict())
    assert not ours._plan.fallbacks
    torch.testing.assert_close(p, q, rtol=0, atol=2 * 4 * torch.finfo(dtype).eps * 4)
    (mine,), (its,) = ours.state_dict()["state"].values(), theirs.state_dict()["state"].values()
    assert {k: (t.dtype, t.shape) for k, t in mine.items()} == {k: (t.dtype, t.shape) for k, t in its.items()}


@dtypes
def test_clip_and_stats_against_numpy(target, dtype):
    """The norm of a complex vector is that of its real and imaginary parts together."""
    p = nn.Parameter(complex_normal(300, dtype=dtype, device=target.device))
    start, grad = array(p).astype(complex), complex_normal(300, seed=1, dtype=dtype, device=target.device)
    optimizer = target.adamw([("z", p)], lr=0.1, weight_decay=0.3, max_grad_norm=0.5, stats=True)
    p.grad = grad
    optimizer.step()
    g = array(grad).astype(complex)
    norm = math.sqrt((np.abs(g) ** 2).sum())
    halves = [
        oracle.AdamW([([x], oracle.Hypers(lr=0.1, weight_decay=0.3))], "float64")
        for x in (start.real, start.imag)
    ]
    for half, x in zip(halves, (g.real, g.imag), strict=True):
        half.step([x * 0.5 / (norm + 1e-6)])
    expected = halves[0].slots[0].p + 1j * halves[1].slots[0].p
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(array(p), expected, rtol=0, atol=8 * eps)
    rtol = 20 * eps
    found = optimizer.param_stats()["z"]
    assert optimizer.grad_norm.item() == pytest.approx(norm, rel=rtol)
    assert found.grad_norm == pytest.approx(norm, rel=rtol)
    assert found.grad_max == pytest.approx(max(abs(g.real).max(), abs(g.imag).max()), rel=rtol)
    assert found.update_norm == pytest.approx(np.linalg.norm(expected - start), rel=20 * rtol)
    assert found.param_norm == pytest.approx(np.linalg.norm(expected), rel=rtol)
    assert (found.nonfinite, found.lost_updates) == (False, 0)


@pytest.mark.parametrize("bad", [complex(0, math.nan), complex(math.inf, 0), complex(0, -math.inf)])
def test_who_was_not_finite(target, bad):
    """Also where only the imaginary part is not."""
    params = [nn.Parameter(complex_normal(7, seed=i, device=target.device)) for i in range(2)]
    optimizer = target.adamw(list(zip("ab", params, strict=True)), skip_nonfinite=True)
    for step in range(2):
        for p in params:
            p.grad = complex_normal(7, seed=step, device=target.device)
        if step:
            params[1].grad[3] = bad
            before = snapshot(optimizer)
        optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.nonfinite_params() == ["b"]
    assert unchanged_since(optimizer, before)


def test_the_guard_sees_a_spike(target):
    p = nn.Parameter(complex_normal(20, device=target.device))
    optimizer = target.adamw([p], guard=SpikeGuard(sigmas=6.0, window=8, warmup=4))
    for step in range(6):
        p.grad = complex_normal(20, seed=step, device=target.device) * (1j * 1000 if step == 5 else 1)
        before = snapshot(optimizer)
        optimizer.step()
    assert optimizer.skipped_steps_by_reason["spike"] == 1
    assert unchanged_since(optimizer, before)


@pytest.mark.parametrize("view", ["conjugate", "negated"])
def test_gradients_that_are_lazy_views(target, view):
    """Their memory holds other values than they have: it is not what kernels read."""
    results = []
    for is_lazy in (False, True):
        p = nn.Parameter(complex_normal(5, 3, device=target.device))
        if view == "negated":
            p = nn.Parameter(p.detach().real.clone())
        optimizer = target.adamw([p], max_grad_norm=0.1)
        for step in range(2):
            memory = complex_normal(5, 3, seed=step, device=target.device)
            grad = memory.conj() if view == "conjugate" else memory.conj().imag
            assert grad.is_conj() or grad.is_neg()
            p.grad = grad if is_lazy else grad.resolve_conj().resolve_neg().contiguous()
            kept = memory.clone()
            optimizer.step()
            assert torch.equal(memory, kept)
            assert (p.grad.is_conj() or p.grad.is_neg()) == is_lazy
        assert not optimizer._plan.fallbacks
        results.append(p)
    assert torch.equal(*results)


def test_beside_real_ones_in_one_launch():
    """What is kept in the same numbers is stepped together."""
    params = [nn.Parameter(complex_normal(5)), nn.Parameter(randn(7))]
    optimizer = NATIVE.adamw(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [bucket.slots for bucket, _, _ in optimizer._plan.launches] == [[0, 1]]
