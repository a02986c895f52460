"""`max_grad_norm` against torch.nn.utils.clip_grad_norm_ followed by torch's AdamW, and `grad_norm`."""

import math

import pytest
import torch
from common import NATIVE, TARGETS, assert_same_path, give_grads, parameters, randn, twins

from fused_adamw import FusedHygieneAdamW

SHAPES = [(65,), (0,), (3, 7), ()]
# torch accumulates the norm in float32; its relative error for a few hundred numbers.
NORM_ERROR = 1e-6


def peer_of(params, **options):
    copies = twins(params)
    return copies, torch.optim.AdamW(copies, foreach=False, **options)


def copy_grads(params, copies):
    for p, q in zip(params, copies, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()


@pytest.mark.parametrize("max_norm", [1e-4, 0.5, 1.0, 1e5, math.inf, 1e-30])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_equals_clip_grad_norm(target, max_norm, scale):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params, lr=1e-2, max_grad_norm=max_norm)
    copies, peer = peer_of(params, lr=1e-2)
    steps = 2 if target.slow else 10
    for step in range(steps):
        give_grads(params, step, scale=scale * (1 + step))
        copy_grads(params, copies)
        norm = torch.nn.utils.clip_grad_norm_(copies, max_norm)
        peer.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=NORM_ERROR, atol=0)
    # Where gradients are tiny next to eps = 1e-8 Adam is not scale-free: an error of the factor passes on.
    assert_same_path(params, copies, steps, grad_error=NORM_ERROR)
    for p, q in zip(params, copies, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            ours, theirs = optimizer.state[p][key], peer.state[q][key]
            atol = 3 * steps * NORM_ERROR * (theirs.abs().max().item() if theirs.numel() else 0.0)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_norm_is_over_all_groups_and_dtypes(device):
    """And over what the kernels leave to the reference."""
    params = [
        *parameters([(40,)], seed=1, device=device),
        *parameters([(5, 5)], seed=2, dtype=torch.bfloat16, device=device),
        *parameters([(17,)], seed=3, dtype=torch.float16, device=device),
        *parameters([(9,)], seed=4, dtype=torch.float64, device=device),
        *parameters([(6, 4)], seed=5, device=device),
    ]
    optimizer = FusedHygieneAdamW([{"params": [p]} for p in params], max_grad_norm=1.0)
    give_grads(params, 0)
    params[-1].grad = params[-1].grad.t().contiguous().t()  # a layout for the reference
    expected = torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt()
    optimizer.step()
    assert optimizer.grad_norm.dtype == torch.float64
    # On a GPU a few squares are added in float32 first.
    torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-14 if device == "cpu" else 1e-7, atol=0)


def test_norm_skips_missing_and_empty_gradients(target):
    params = parameters([(70,), (0,), (0,), (70,), (3,)], device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1.0)
    for missing in (1, 0, 3):
        give_grads(params, 0)
        params[missing].grad = None
        grads = [p.grad for p in params if p.grad is not None]
        optimizer.step()
        expected = torch.cat([g.ravel() for g in grads]).double().norm().float()
        torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-7, atol=0)


def test_grad_norm_is_none_without_a_norm(target):
    params = parameters([(3,)], device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    give_grads(params, 0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None
    plain = target.adamw(params)
    plain.step()
    assert plain.grad_norm is None
    assert plain.max_grad_norm is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grad_norm_is_a_fresh_tensor(target, dtype):
    params = parameters([(3,)], dtype=dtype, device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1.0)
    params[0].grad = torch.tensor([0.0, 3.0, 4.0], dtype=dtype, device=target.device)
    optimizer.step()
    first, again = optimizer.grad_norm, optimizer.grad_norm
    assert first.shape == ()
    assert first.dtype == dtype
    assert first.device == params[0].device
    assert not first.requires_grad
    again.fill_(-1.0)
    assert optimizer.grad_norm.item() == 5.0
    params[0].grad.mul_(2)
    optimizer.step()
    assert (first.item(), optimizer.grad_norm.item()) == (5.0, 10.0)


def test_grad_norm_without_any_gradient(target):
    params = parameters([(3,)], device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0.0
    give_grads(params, 0)
    optimizer.step()
    assert optimizer.grad_norm.item() > 0.0
    params[0].grad = None
    optimizer.step()
    assert optimizer.grad_norm.item() == 0.0


def test_gradients_are_not_touched(target):
    params = parameters([(65,), (4, 4)], device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1e-3, amsgrad=True, maximize=True)
    give_grads(params, 0)
    params[1].grad = params[1].grad.t()
    optimizer.grad_scale = torch.tensor(8.0, device=target.device)
    before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
    optimizer.step()
    for p, (grad, value, version) in zip(params, before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)
        assert grad._version == version


@pytest.mark.parametrize("max_norm", [1.0, math.inf, 1e-30])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_nonfinite_gradients_as_in_torch(target, max_norm, bad):
    """An infinite norm makes every finite gradient 0 and the infinite ones NaN; a NaN norm spreads."""
    params = parameters([(7,), (3,)], device=target.device)
    optimizer = target.adamw(params, max_grad_norm=max_norm)
    copies, peer = peer_of(params)
    for step in range(3):
        give_grads(params, step)
        if step == 1:
            params[0].grad[2] = bad
        copy_grads(params, copies)
        norm = torch.nn.utils.clip_grad_norm_(copies, max_norm)
        peer.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=NORM_ERROR, atol=0, equal_nan=True)
        for p, q in zip(params, copies, strict=True):
            assert torch.equal(p.isnan(), q.isnan())
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[p][key].isnan(), peer.state[q][key].isnan())
    assert_same_path(params, copies, 3, grad_error=NORM_ERROR)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_gradients_without_clipping_stay_where_they_are(target, bad):
    params = parameters([(70,)], device=target.device)
    optimizer = target.adamw(params, amsgrad=True)
    copies, peer = peer_of(params, amsgrad=True)
    for step in range(2):
        give_grads(params, step)
        if step == 0:
            params[0].grad[5] = bad
        copy_grads(params, copies)
        optimizer.step()
        peer.step()
    assert params[0].isnan().sum() == 1
    assert_same_path(params, copies, 2)
    ours, theirs = optimizer.state[params[0]], peer.state[copies[0]]
    torch.testing.assert_close(
        ours["max_exp_avg_sq"], theirs["max_exp_avg_sq"], rtol=1e-6, atol=0, equal_nan=True
    )


def test_nan_wins_a_maximum(target):
    """Of amsgrad, on either side: as in torch, and unlike fmax."""
    params = parameters([(70,)], device=target.device)
    optimizer = target.adamw(params, amsgrad=True)
    copies, peer = peer_of(params, amsgrad=True)
    for step in range(2):
        for optim, tensors in ((optimizer, params), (peer, copies)):
            give_grads(tensors, step)
            optim.step()
            optim.state[tensors[0]]["exp_avg_sq"][3] = math.nan
            optim.state[tensors[0]]["max_exp_avg_sq"][66] = math.nan
    assert params[0].isnan().nonzero().ravel().tolist() == [3, 66]
    assert_same_path(params, copies, 2)


def test_squares_beyond_float16(target):
    """1000 gradients of 6e4: torch's norm in float16 is infinite, and its update 0."""
    (p,) = parameters([(1000,)], dtype=torch.float16, device=target.device)
    optimizer = target.adamw([p], lr=1e-2, weight_decay=0.0, max_grad_norm=1.0, state_dtype=torch.float32)
    p.grad = torch.full_like(p, 6e4)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(
        optimizer.grad_norm.item(), float(p.grad[0]) * math.sqrt(1000), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(p, before - 1e-2, rtol=0, atol=2 * 2**-10 * before.abs().max().item())


def test_squares_beyond_float32(target):
    """Where torch's norm overflows to infinity and its clipped gradients are 0, ours is right."""
    (p,) = parameters([(100,)], device=target.device)
    p.grad = torch.full_like(p, 1e30)
    copy = p.grad.clone()
    with torch.no_grad():
        assert copy.norm().isinf()
    optimizer = target.adamw([p], lr=1e-2, weight_decay=0.0, max_grad_norm=1.0)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.item(), 1e31, rtol=1e-6, atol=0)
    torch.testing.assert_close(p, before - 1e-2, rtol=0, atol=1e-6)


def test_zero_gradients_are_not_divided_by_zero(target):
    params = parameters([(5,)], device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1e-30, weight_decay=0.0)
    before = params[0].detach().clone()
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert torch.equal(params[0], before)
    assert optimizer.grad_norm.item() == 0.0


def test_max_grad_norm_changed_between_steps(target):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params, lr=1e-2)
    copies, peer = peer_of(params, lr=1e-2)
    schedule = [None, 1.0, 0.1, None, math.inf, 0.5]
    for step, max_norm in enumerate(schedule):
        optimizer.max_grad_norm = max_norm
        give_grads(params, step, scale=1 + step)
        copy_grads(params, copies)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(copies, max_norm)
        optimizer.step()
        peer.step()
        assert optimizer.max_grad_norm == max_norm
    assert_same_path(params, copies, len(schedule), grad_error=NORM_ERROR)


def test_norm_of_complex_gradients(target):
    p = torch.nn.Parameter(torch.complex(randn(5), randn(5, seed=1)).to(target.device))
    optimizer = target.adamw([p], max_grad_norm=1.0)
    p.grad = torch.full_like(p, 3 + 4j)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.item(), 5 * math.sqrt(5), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_does_not_depend_on_threads(dtype, threads):
    norms = []
    for count in (1, 2, 2):
        threads(count)
        params = parameters([(200_003,), (7,), (64, 1024)], dtype=dtype)
        optimizer = NATIVE.adamw(params, max_grad_norm=1.0)
        give_grads(params, 0)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0].device == "cuda"])
def test_reading_the_norm_is_the_only_synchronisation(target):
    """Nothing of a step reads a tensor's value on the host."""
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1.0)
    for step in range(3):
        give_grads(params, step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
            norm = optimizer.grad_norm
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert norm.item() > 0
