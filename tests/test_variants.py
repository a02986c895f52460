"""Variants of the rule that torch lacks: by group, through schedules, copies and checkpoints."""

import copy
import pickle

import pytest
import torch
from common import NATIVE, give_grads, parameters, twins
from torch import nn
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from fused_adamw import FusedHygieneAdamW, build_param_groups
from fused_adamw.variants import VARIANT

MODES = ["lr", "schedule", "corrected", "constant"]


def shrinkage(optimizer, p):
    """What a parameter loses of itself in a step without gradient."""
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    optimizer.step()
    (lost,) = {round(x, 6) for x in (1 - p.detach().double() / before).flatten().tolist()}
    return lost


def one(shape=(3,), dtype=torch.float64):
    return nn.Parameter(torch.ones(shape, dtype=dtype))


def expected(mode, lr, decay, lr_ref):
    return {"lr": lr, "schedule": lr / lr_ref, "corrected": lr**2 / lr_ref, "constant": 1.0}[mode] * decay


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_tensor", [False, True])
def test_decay_follows_a_schedule(mode, is_tensor, target):
    p = one().to(target.device).requires_grad_()
    p = nn.Parameter(p.detach())
    lr = torch.tensor(0.1, device=target.device) if is_tensor else 0.1
    optimizer = target.adamw([p], lr=lr, weight_decay=0.2, weight_decay_mode=mode, capturable=is_tensor)
    scheduler = LambdaLR(optimizer, [1.0, 0.5, 0.25].__getitem__)
    for factor in (1.0, 0.5):
        assert shrinkage(optimizer, p) == pytest.approx(expected(mode, 0.1 * factor, 0.2, 0.1), abs=2e-6)
        scheduler.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_tensor", [False, True])
def test_a_loader_of_checkpoints_decays_nothing(mode, is_tensor, target):
    """It creates the state by a step with a learning rate of 0."""
    p = nn.Parameter(one().to(target.device))
    lr = torch.tensor(0.1, device=target.device) if is_tensor else 0.1
    optimizer = target.adamw([p], lr=lr, weight_decay=0.2, weight_decay_mode=mode, capturable=is_tensor)
    _init_optim_state(optimizer)
    assert optimizer.state[p]["step"] == 1
    assert torch.equal(p, one().to(target.device))


@pytest.mark.parametrize("mode", ["schedule", "corrected"])
def test_the_reference_is_the_peak_of_the_group(mode):
    """Not `defaults["lr"]`, nor where a warm-up begins."""
    p, q = one(), one()
    groups = [{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.4}]
    optimizer = NATIVE.adamw(groups, lr=7.0, weight_decay=0.2, weight_decay_mode=mode)
    LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)  # warms up from 0
    assert shrinkage(optimizer, p) == 0.0
    for group, lr in zip(optimizer.param_groups, (0.05, 0.2), strict=True):
        group["lr"] = lr
    q.grad = torch.zeros_like(q)
    assert shrinkage(optimizer, p) == pytest.approx(expected(mode, 0.05, 0.2, 0.1), abs=2e-6)
    assert 1 - q[0].item() == pytest.approx(expected(mode, 0.2, 0.2, 0.4), abs=2e-6)


def test_the_peak_of_one_cycle():
    p = one()
    optimizer = NATIVE.adamw([p], lr=1e-3, weight_decay=0.2, weight_decay_mode="schedule")
    OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    lr = optimizer.param_groups[0]["lr"]
    assert shrinkage(optimizer, p) == pytest.approx(0.2 * lr / 0.5, abs=2e-6)


def test_a_reference_that_is_given():
    p = one()
    optimizer = NATIVE.adamw([p], lr=0.0, weight_decay=0.2, weight_decay_mode="corrected", lr_ref=0.5)
    assert shrinkage(optimizer, p) == 0.0
    optimizer.param_groups[0]["lr"] = 0.25
    assert shrinkage(optimizer, p) == pytest.approx(0.2 * 0.25**2 / 0.5, abs=2e-6)


def test_an_unknown_peak_is_refused_before_anything_is_made():
    p = one()
    with pytest.raises(ValueError, match="lr in parameter group 0 is 0, and weight_decay_mode='schedule'"):
        NATIVE.adamw([p], lr=0.0, weight_decay_mode="schedule")
    optimizer = NATIVE.adamw([p], lr=0.1, weight_decay_mode="schedule")
    with pytest.raises(ValueError, match="lr in parameter group 1 is 0"):
        optimizer.add_param_group({"params": [one()], "lr": 0.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_decay_mode": "linear"}, ValueError, "weight_decay_mode.* must be one of 'lr', 'schedule'"),
        ({"cautious_weight_decay": "yes"}, ValueError, "cautious_weight_decay.* must be True or False"),
        ({"nesterov": 2}, ValueError, "nesterov.* must be True or False"),
        ({"lr_ref": "1e-3"}, TypeError, "lr_ref.* must be None or a number"),
        ({"lr_ref": 0.0}, ValueError, "lr_ref.* must be None or a finite number > 0"),
    ],
)
def test_bad_values(options, error, message):
    with pytest.raises(error, match=message):
        NATIVE.adamw([one()], **options)
    optimizer = NATIVE.adamw([one()])
    with pytest.raises(error, match=f"{message[:6]}.* in parameter group 1"):
        optimizer.add_param_group({"params": [one()], **options})
    assert len(optimizer.param_groups) == 1


def by_group():
    params = parameters([(40,), (30,), (20,)])
    groups = [
        {"params": params[:1], "cautious_weight_decay": True},
        {"params": params[1:2], "nesterov": True, "weight_decay_mode": "constant", "weight_decay": 1e-3},
        {"params": params[2:]},
    ]
    return params, groups


def test_groups_differ():
    """Each is stepped as an optimizer of its own that has the options for all."""
    params, groups = by_group()
    peers = twins(params)
    optimizer = NATIVE.adamw(groups, lr=0.01, weight_decay=0.3)
    assert "nesterov" in groups[1], "groups of the user are left as they were"
    alone = [
        NATIVE.adamw([peers[0]], lr=0.01, weight_decay=0.3, cautious_weight_decay=True),
        NATIVE.adamw([peers[1]], lr=0.01, weight_decay=1e-3, nesterov=True, weight_decay_mode="constant"),
        torch.optim.AdamW([peers[2]], lr=0.01, weight_decay=0.3, foreach=False),
    ]
    for step in range(5):
        give_grads([*params], step)
        for p, q in zip(params, peers, strict=True):
            q.grad = p.grad.clone()
        for one_of in (optimizer, *alone):
            one_of.step()
    for p, q in zip(params[:2], peers[:2], strict=True):
        assert torch.equal(p, q)
    torch.testing.assert_close(params[2], peers[2])


def test_no_group_and_no_checkpoint_has_them():
    params, groups = by_group()
    optimizer = NATIVE.adamw(groups, lr_ref=1.0)
    give_grads(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    for group in (*optimizer.param_groups, *saved["param_groups"]):
        assert not set(VARIANT) & set(group)
    peer = torch.optim.AdamW([{"params": [p]} for p in params])
    peer.load_state_dict(saved)
    optimizer.load_state_dict(peer.state_dict())
    assert optimizer._variants.of(optimizer.param_groups[1]).nesterov, "an argument, not what was loaded"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
def test_copies_go_on_alike(how):
    params, groups = by_group()
    model = nn.ParameterList(params)
    optimizer = NATIVE.adamw(groups, lr=0.01, weight_decay=0.3)
    give_grads(params, 0)
    optimizer.step()
    if how == "checkpoint":
        others = twins(params)
        _, groups = by_group()
        for group, p in zip(groups, others, strict=True):
            group["params"] = [p]
        twin = NATIVE.adamw(groups, lr=0.01, weight_decay=0.3)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "deepcopy":
        _, twin = copy.deepcopy((model, optimizer))
    else:
        _, twin = pickle.loads(pickle.dumps((model, optimizer)))
    others = [p for group in twin.param_groups for p in group["params"]]
    assert not {id(p) for p in others} & {id(p) for p in params}
    for step in range(1, 4):
        give_grads(params, step)
        give_grads(others, step)
        optimizer.step()
        twin.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_groups_may_be_moved_and_removed():
    _, groups = by_group()
    optimizer = NATIVE.adamw(groups)
    optimizer.param_groups.reverse()
    assert optimizer._variants.of(optimizer.param_groups[2]).cautious_weight_decay
    del optimizer.param_groups[1]
    found = [optimizer._variants.of(group) for group in optimizer.param_groups]
    assert [(v.cautious_weight_decay, v.nesterov) for v in found] == [(False, False), (True, False)]


@pytest.mark.parametrize("how", ["in the list", "by another list", "by another list, then loaded"])
def test_they_stay_where_parameters_are_replaced(how):
    """As Accelerate replaces all of them for FSDP2, after the optimizer was built."""
    _, groups = by_group()
    optimizer = NATIVE.adamw(groups, lr=0.01)
    for group in optimizer.param_groups:
        new = twins(group["params"])
        if how == "in the list":
            group["params"][:] = new
        else:
            group["params"] = new
    if "loaded" in how:
        optimizer.load_state_dict(optimizer.state_dict())
    found = [optimizer._variants.of(group) for group in optimizer.param_groups]
    assert [(v.cautious_weight_decay, v.nesterov) for v in found] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    hypers = optimizer._hypers()
    assert [(h.cautious, h.nesterov) for h in hypers] == [(True, False), (False, True), (False, False)]


def test_a_group_that_was_not_added_has_those_of_the_optimizer():
    optimizer = NATIVE.adamw([one()], lr=0.1, weight_decay=0.2, weight_decay_mode="constant", nesterov=True)
    p = one()
    optimizer.param_groups[:] = [{**optimizer.param_groups[0], "params": [p]}]
    assert optimizer._variants.of(optimizer.param_groups[0]).nesterov
    assert shrinkage(optimizer, p) == pytest.approx(0.2, abs=2e-6)


def test_by_overrides_of_a_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    overrides = {"2.weight": {"cautious_weight_decay": True}}
    for optimizer in (
        FusedHygieneAdamW(model, overrides=overrides),
        FusedHygieneAdamW(build_param_groups(model, overrides=overrides)),
    ):
        found = {
            name: optimizer._variants.of(group).cautious_weight_decay
            for group in optimizer.param_groups
            for name in group["param_names"]
        }
        assert [name for name, is_cautious in found.items() if is_cautious] == ["2.weight"]
        assert "of group" in repr(optimizer)
    with pytest.raises(TypeError, match="overrides select parameters of a model"):
        FusedHygieneAdamW(model.parameters(), overrides=overrides)


def test_overrides_may_scale_the_learning_rate():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = FusedHygieneAdamW(model, lr=0.5, overrides={"1.*": {"lr_scale": 0.5}})
    lrs = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert lrs == {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 0.25, "1.bias": 0.25}


def test_they_are_shown():
    optimizer = NATIVE.adamw([one()], weight_decay_mode="constant", nesterov=True)
    assert "weight_decay_mode: constant\nnesterov: True\n" in repr(optimizer)
    assert optimizer.defaults["nesterov"] is True
    assert not set(VARIANT) & set(optimizer.param_groups[0])
    optimizer.add_param_group({"params": [one()]})
    assert optimizer._variants.of(optimizer.param_groups[1]).nesterov


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nesterov_is_nadam(target, dtype):
    """torch.optim.NAdam with a momentum that has warmed up: 0.96^(step * momentum_decay) is 0."""
    params = parameters([(65,), (3, 7)], dtype=dtype, device=target.device)
    peers = twins(params)
    ours = target.adamw(params, lr=1e-2, weight_decay=0.1, nesterov=True)
    theirs = torch.optim.NAdam(
        peers, lr=1e-2, weight_decay=0.1, momentum_decay=1e6, decoupled_weight_decay=True, foreach=False
    )
    for step in range(20):
        give_grads(params, step)
        for p, q in zip(params, peers, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, peers, rtol=1e-5, atol=1e-6)


def test_the_default_dtype_does_not_reach_a_step(target, default_dtype):
    """Where two Python numbers meet in an operator of torch, it takes the default dtype."""
    ends = []
    for dtype in (torch.float64, torch.bfloat16):
        default_dtype(torch.float32)
        params = parameters([(65,)], dtype=torch.float64, device=target.device)
        optimizer = target.adamw(params, lr=0.1, weight_decay=0.3, cautious_weight_decay=True, nesterov=True)
        for step in range(3):
            default_dtype(torch.float32)
            give_grads(params, step)
            default_dtype(dtype)
            optimizer.step()
        ends.append(params[0].detach())
    assert torch.equal(*ends)
