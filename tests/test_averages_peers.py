"""Averages that the step keeps, against those that others make after it: torch, timm, diffusers."""

from __future__ import annotations

import pytest
import torch
from common import NATIVE, assert_same_path, give_grads, parameters
from groups.torchvision_stub import torchvision_stub
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_adamw import EMA

STEPS = 14
SHAPES = [(700,), (3, 7), (0,), ()]
LR = 0.1  # parameters move so far that a wrong weight, or one at a wrong step, shows


def model_of(params):
    """A model that others average; it shares the parameters."""
    return nn.ParameterList(params)


def follow(target, ema, update, steps=STEPS, params=None, **options):
    """Step, and let somebody else average after each step; returns the parameters and our averages.

    Args:
        target: The backend.
        ema: What ours is asked for.
        update: Called with the number of the step, 1 for the first.
        steps: How many.
        params: What to step.
        options: Of the optimizer.
    """
    optimizer = target.adamw(params, lr=LR, ema=ema, **options)
    for step in range(1, steps + 1):
        give_grads(params, step)
        optimizer.step()
        update(step)
    return [optimizer.state[p]["ema"] for p in params]


# torch


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_torch(target, decay, clip):
    params = parameters(SHAPES, device=target.device)
    peer = AveragedModel(model := model_of(params), multi_avg_fn=get_ema_multi_avg_fn(decay))
    ours = follow(
        target, EMA(decay), lambda _: peer.update_parameters(model), params=params, max_grad_norm=clip
    )
    assert_same_path(ours, list(peer.module.parameters()), STEPS)


@pytest.mark.parametrize(("start", "every"), [(3, 1), (0, 4), (3, 4), (STEPS - 1, 1)])
def test_torch_at_some_of_the_steps(start, every):
    """As a loop that calls `update_parameters` at every so many steps after the first `start`."""
    params = parameters(SHAPES)
    peer = AveragedModel(model := model_of(params), multi_avg_fn=get_ema_multi_avg_fn(0.7))

    def update(step):
        if step > start and (step - start) % every == 0:
            peer.update_parameters(model)

    ours = follow(NATIVE, EMA(0.7, start_step=start, every=every), update, params=params)
    assert_same_path(ours, list(peer.module.parameters()), STEPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_torch_in_other_dtypes(dtype):
    params = parameters([(5, 3)], dtype=dtype)
    peer = AveragedModel(model := model_of(params), multi_avg_fn=get_ema_multi_avg_fn(0.8))
    ours = follow(NATIVE, EMA(0.8), lambda _: peer.update_parameters(model), params=params)
    assert ours[0].dtype == dtype
    torch.testing.assert_close(ours[0], next(peer.module.parameters()).detach(), rtol=1e-6, atol=1e-6)


def test_torch_of_a_float32_model_where_there_is_a_master(target):
    """No average outside of the optimizer sees what is below a bfloat16: the peer has float32 parameters."""
    params = parameters([(700,), (3, 7)], dtype=torch.bfloat16, device=target.device)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    peer = AveragedModel(model := model_of(wide), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs = target.adamw(wide, lr=LR)

    def update(_):
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        theirs.step()
        peer.update_parameters(model)

    ours = follow(target, EMA(0.9), update, params=params, master_weights="split", state_dtype=torch.float32)
    assert all(average.dtype == torch.float32 for average in ours)
    assert_same_path(ours, list(peer.module.parameters()), STEPS)


def test_a_half_life_is_a_decay_of_torch():
    params = parameters(SHAPES)
    peer = AveragedModel(model := model_of(params), multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (2 / 6)))

    def update(step):
        if step % 2 == 0:
            peer.update_parameters(model)

    ours = follow(NATIVE, EMA(half_life=6, every=2), update, params=params)
    assert_same_path(ours, list(peer.module.parameters()), STEPS)


# timm


def timm_average(model, **options):
    with torchvision_stub():
        utils = pytest.importorskip("timm.utils")
    return utils.ModelEmaV3(model, **options)


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [None, "timm"])
@pytest.mark.parametrize("start", [0, 4])
def test_timm(target, warmup, start):
    """With its train.py, which counts updates from 1."""
    params = parameters(SHAPES, device=target.device)
    model = model_of(params)
    settings = {"use_warmup": warmup is not None, "update_after_step": start}
    peer = timm_average(model, decay=0.8, **settings)
    ema = EMA(0.8, warmup=warmup, start_step=start)
    ours = follow(target, ema, lambda step: peer.update(model, step), params=params)
    assert_same_path(ours, list(peer.module.parameters()), STEPS)


@pytest.mark.slow
def test_timm_in_bfloat16():
    """Both round by chance, each with noise of its own: what they are right about is the mean."""
    n, decay = 40_000, 0.99
    params = [nn.Parameter(torch.ones(n))]
    model, exact = model_of(params), torch.tensor(0.0, dtype=torch.float64)
    peer = timm_average(model, decay=decay, dtype=torch.bfloat16)
    optimizer = NATIVE.adamw(params, lr=2e-3, weight_decay=0.0, ema=EMA(decay, dtype=torch.bfloat16))
    for step in range(1, 101):
        params[0].grad = torch.ones(n)
        optimizer.step()
        peer.update(model, step)
        p = params[0].detach()[0].double()
        exact = p if step == 1 else exact + (1 - decay) * (p - exact)
    # A rounding is off by 2^-8 at most, for values up to 2, and by half of it in the mean square. A hundred
    # are made, and decay forgets a few of them.
    allowed = 5 * 2.0**-9 * (100 / n) ** 0.5
    for average in (optimizer.state[params[0]]["ema"], peer.module[0].detach()):
        assert average.dtype == torch.bfloat16
        assert average.double().mean().item() == pytest.approx(exact.item(), abs=allowed)
    assert abs(exact.item() - p.item()) > 10 * allowed, "the average is the parameter"


# diffusers


@pytest.mark.slow
@pytest.mark.parametrize(("warmup", "is_theirs_warm"), [("diffusers", False), ("timm", True)])
@pytest.mark.parametrize("start", [0, 4])
def test_diffusers(target, warmup, is_theirs_warm, start):
    """Its default is the one that is called "diffusers"; its `use_ema_warmup` is the one of timm."""
    utils = pytest.importorskip("diffusers.training_utils")
    params = parameters(SHAPES, device=target.device)
    peer = utils.EMAModel(params, decay=0.6, use_ema_warmup=is_theirs_warm, update_after_step=start)
    ema = EMA(0.6, warmup=warmup, start_step=start)
    ours = follow(target, ema, lambda _: peer.step(params), params=params)
    assert_same_path(ours, peer.shadow_params, STEPS)
