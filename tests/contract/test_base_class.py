"""What the rest of torch, and its users, do with any optimizer: nothing may notice which one it is."""

import gc
import inspect
import weakref

import pytest
import torch
from common import NATIVE, assert_same_path, give_grads, parameters, twins
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fused_adamw import FusedHygieneAdamW


def pair(target, groups=list, shapes=((9,), (3, 4)), **options):
    """Ours and torch's with their parameters; `options` may be functions that make a value."""
    params = parameters(shapes, device=target.device)
    peers = twins(params)
    made = [{key: value() if callable(value) else value for key, value in options.items()} for _ in range(2)]
    ours = target.adamw(groups(params), **made[0])
    theirs = torch.optim.AdamW(groups(peers), foreach=False, **made[1])
    return (ours, params), (theirs, peers)


def step_all(pairs, step):
    for optimizer, params in pairs:
        give_grads(params, step)
        optimizer.step()


# Schedulers

SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.5),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-3, 5e-2, step_size_up=2, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 5e-2, total_steps=8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
}


def test_every_scheduler_of_torch_is_here():
    assert set(SCHEDULERS) == set(schedulers.__all__) - {"LRScheduler"}


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*before", "ignore:The epoch parameter")
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(target, name, tensor_lr):
    """Of two groups. A tensor lr stays the same tensor; betas are cycled with it."""

    def groups(params):
        lrs = [torch.tensor(lr) if tensor_lr else lr for lr in (1e-2, 2e-2)]
        return [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)]

    pairs = pair(target, groups)
    tensors = [group["lr"] for group in pairs[0][0].param_groups]
    lrs = {float(tensors[0])}
    made = [SCHEDULERS[name](optimizer) for optimizer, _ in pairs]
    betas = set()
    for step in range(2 if target.slow else 5):
        step_all(pairs, step)
        for scheduler in made:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        ours, theirs = ([(float(g["lr"]), g["betas"]) for g in o.param_groups] for o, _ in pairs)
        assert ours == theirs
        lrs.add(ours[0][0])
        betas.add(ours[0][1])
        assert_same_path(pairs[0][1], pairs[1][1], step + 1)
    assert len(lrs) > 1
    assert (len(betas) > 1) == (name in ("CyclicLR", "OneCycleLR"))
    if tensor_lr:
        assert all(g["lr"] is lr for g, lr in zip(pairs[0][0].param_groups, tensors, strict=True))


# step() as an attribute


def test_step_is_patchable_and_weakly_referable():
    """As schedulers, profilers and frameworks do."""
    params = parameters([(3,)])
    optimizer = NATIVE.adamw(params)
    method = weakref.WeakMethod(optimizer.step)
    assert method() == optimizer.step
    calls = []
    unbound = optimizer.step.__func__

    def patched(self, *args, **kwargs):
        calls.append(self)
        return unbound(self, *args, **kwargs)

    optimizer.step = patched.__get__(optimizer)
    give_grads(params, 0)
    optimizer.step()
    assert calls == [optimizer]
    assert optimizer.state[params[0]]["step"].item() == 1


def test_nothing_keeps_an_optimizer_alive():
    optimizer = NATIVE.adamw(params := parameters([(3,)]))
    give_grads(params, 0)
    optimizer.step()
    dead = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert dead() is None


def test_signatures_are_those_of_torch():
    """Whatever is passed by position or keyword to torch's may be passed to ours."""
    for name in ("__init__", "step", "zero_grad", "add_param_group", "load_state_dict", "state_dict"):
        ours = inspect.signature(inspect.unwrap(getattr(FusedHygieneAdamW, name))).parameters
        theirs = inspect.signature(inspect.unwrap(getattr(torch.optim.AdamW, name))).parameters
        for (key, parameter), ours_at in zip(theirs.items(), ours.values(), strict=False):
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                assert (ours_at.name, ours_at.kind) == (key, parameter.kind)
        assert all(ours[key].default == parameter.default for key, parameter in theirs.items())
    # A parameter of that name would switch GradScaler to the protocol of before 2.0.
    assert "grad_scaler" not in inspect.signature(FusedHygieneAdamW.step).parameters


@pytest.mark.parametrize("call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)])
def test_closure_by_position_or_keyword(target, call):
    params = parameters([(3,)], device=target.device)
    optimizer = target.adamw(params)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].detach().square().sum()
    assert torch.equal(call(optimizer, closure).detach(), before)
    assert params[0].detach().square().sum() < before
    call(optimizer, None)
    assert optimizer.state[params[0]]["step"].item() == 2


def test_an_error_in_the_closure_changes_nothing(target):
    params = parameters([(3,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    before = params[0].detach().clone()

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert torch.equal(params[0], before)
    assert not optimizer.state


# Hooks


def test_hooks_fire_once_whatever_was_built_before(target):
    """Of the instance and of all instances, before and after, also for a class of our class."""

    class Mine(FusedHygieneAdamW):
        pass

    torch.optim.AdamW(parameters([(2,)]))
    for cls in (FusedHygieneAdamW, Mine):
        params = parameters([(2,)], device=target.device)
        optimizer = cls(params, backend=target.backend)
        give_grads(params, 0)
        calls = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_, calls=calls: calls.append("all, before")),
            register_optimizer_step_post_hook(lambda *_, calls=calls: calls.append("all, after")),
        ]
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        try:
            optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        assert calls == ["all, before", "before", "after", "all, after"]


def test_a_pre_hook_may_replace_the_arguments(target):
    params = parameters([(2,)], device=target.device)
    optimizer = target.adamw(params)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 5), {}))
    assert optimizer.step() == 5


def test_a_pre_hook_may_change_gradients_and_options(target):
    (ours, params), (theirs, peers) = pair(target)
    for optimizer in (ours, theirs):

        def halve(o, args, kwargs):
            o.param_groups[0]["lr"] = 0.02
            for p in o.param_groups[0]["params"]:
                p.grad = 0.5 * p.grad

        optimizer.register_step_pre_hook(halve)
    for step in range(2):
        step_all([(ours, params), (theirs, peers)], step)
    assert_same_path(params, peers, 2)


def test_a_profiler_sees_the_step():
    params = parameters([(2,)])
    optimizer = NATIVE.adamw(params)
    give_grads(params, 0)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    seen = {event.name for event in profile.events()}
    assert {
        "Optimizer.step#FusedHygieneAdamW.step",
        "Optimizer.zero_grad#FusedHygieneAdamW.zero_grad",
    } <= seen


# Subclasses and what they change


def test_a_subclass_may_wrap_step(target):
    """With super(), whose hooks then fire for both, as with a subclass of torch's."""

    class Counting(FusedHygieneAdamW):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    params = parameters([(4,)], device=target.device)
    copies = twins(params)
    ours, plain = Counting(params, backend=target.backend), target.adamw(copies)
    for step in range(2):
        step_all([(ours, params), (plain, copies)], step)
    assert ours.calls == 2
    assert torch.equal(params[0], copies[0])
    assert ours.state[params[0]]["step"].item() == 2


def test_a_subclass_may_have_other_defaults():
    class Mine(FusedHygieneAdamW):
        def __init__(self, params, **options):
            super().__init__(params, lr=0.5, max_grad_norm=1.0, **options)

    assert Mine(parameters([(2,)])).param_groups[0]["lr"] == 0.5
    assert Mine(nn.Linear(2, 2)).max_grad_norm == 1.0


def test_isinstance():
    """Frameworks ask."""
    optimizer = NATIVE.adamw(parameters([(2,)]))
    for cls in (torch.optim.AdamW, torch.optim.Adam, torch.optim.Optimizer):
        assert isinstance(optimizer, cls)
    assert isinstance(optimizer.state, dict)
    assert type(optimizer.param_groups) is list
    assert all(isinstance(group, dict) for group in FusedHygieneAdamW(nn.Linear(2, 2)).param_groups)


def test_defaults_feed_groups_added_later(target):
    (ours, params), (theirs, peers) = pair(target, lr=0.03, weight_decay=0.2, amsgrad=True)
    more = parameters([(4,)], seed=3, device=target.device)
    copies = twins(more)
    for optimizer, added in ((ours, more), (theirs, copies)):
        optimizer.defaults["eps"] = 1e-3
        optimizer.add_param_group({"params": added})
    assert ours.defaults == {**theirs.defaults, "foreach": None}
    for step in range(2):
        step_all([(ours, params + more), (theirs, peers + copies)], step)
    assert_same_path(params + more, peers + copies, 2)


def test_a_parameter_list_is_added_to_a_model_s_groups():
    """It is an iterable of tensors to torch; the others are refused as torch refuses them."""
    optimizer = FusedHygieneAdamW(nn.Linear(2, 2))
    added = nn.ParameterList([nn.Parameter(torch.ones(2))])
    optimizer.add_param_group({"params": added})
    assert optimizer.param_groups[-1]["params"] == list(added)
    peer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    for refused in ({"params": nn.Linear(2, 2)}, {"params": 5}, {"params": set(added)}, None):
        with pytest.raises(TypeError) as theirs:
            peer.add_param_group(refused)
        with pytest.raises(TypeError) as ours:
            optimizer.add_param_group(refused)
        assert str(ours.value) == str(theirs.value)
    assert len(optimizer.param_groups) == 3


def test_a_group_is_the_user_s_own_dict(target):
    """As in torch: what is changed in it later counts."""
    (p,) = parameters([(4,)], device=target.device)
    group = {"params": [p]}
    optimizer = target.adamw([group], lr=1e-2)
    assert optimizer.param_groups[0] is group
    group["lr"] = 0.0
    give_grads([p], 0)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


def test_groups_of_a_module_are_plain_to_their_users():
    """Wrappers copy them by their keys, and compare and save the copies."""
    group = FusedHygieneAdamW(nn.Linear(2, 2)).param_groups[0]
    assert type(group) is dict
    assert group["param_names"] == ["weight"]
    assert list(group) == list(group.keys())
    rebuilt = torch.optim.AdamW([{key: group[key] for key in group}])
    assert rebuilt.param_groups[0]["param_names"] == ["weight"]


@pytest.mark.parametrize("kinds", ["generator", "tuple", "single tensor", "dict values", "named generator"])
def test_whatever_torch_takes_as_parameters(kinds):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    given = {
        "generator": lambda: model.parameters(),
        "tuple": lambda: tuple(model.parameters()),
        "single tensor": lambda: [{"params": model[0].weight}],
        "dict values": lambda: dict(model.named_parameters()).values(),
        "named generator": lambda: model.named_parameters(),
    }[kinds]
    ours, theirs = FusedHygieneAdamW(given()), torch.optim.AdamW(given())
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert a.keys() == b.keys()
        assert all(p is q for p, q in zip(a["params"], b["params"], strict=True))
        assert a.get("param_names") == b.get("param_names")


# Gradients and versions


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"skip_nonfinite": True}], ids=str)
def test_versions(target, options):
    """Of parameters: counted up; of gradients: not. A step without a gradient counts nothing."""
    params = parameters([(3,), (2, 2), (4,)], device=target.device)
    optimizer = target.adamw(params, **options)
    give_grads(params, 0)
    params[1].grad = params[1].grad.t()  # for the reference
    params[2].grad = None
    versions = [p._version for p in params]
    grads = [(p.grad, p.grad._version) for p in params[:2]]
    optimizer.step()
    assert [p._version > v for p, v in zip(params, versions, strict=True)] == [True, True, False]
    assert all(p.grad is g and g._version == v for p, (g, v) in zip(params[:2], grads, strict=True))


def test_zero_grad_in_both_ways(target):
    params = parameters([(3,), (4,)], device=target.device)
    optimizer = target.adamw(params, fused=True)
    give_grads(params, 0)
    kept = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, kept, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_that_require_gradients(target):
    """After backward(create_graph=True): read as values, their graph untouched."""
    (p,) = parameters([(3,)], device=target.device)
    optimizer = target.adamw([p], max_grad_norm=1.0)
    p.pow(3).sum().backward(create_graph=True)
    assert p.grad.requires_grad
    before = p.detach().clone()
    optimizer.step()
    assert not torch.equal(p, before)
    assert not optimizer.grad_norm.requires_grad
    assert all(not value.requires_grad for value in optimizer.state[p].values())


# What cannot be differentiated or transformed


def step_inside(target, x):
    p = nn.Parameter(torch.ones(3, device=target.device))
    optimizer = target.adamw([p])
    p.grad = 2 * x
    optimizer.step()
    return p.detach().sum()


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.hessian]
)
def test_torch_func_is_refused(target, transform):
    """In vmap a gradient has an address, of all samples: what is read there belongs to no one sample."""
    x = torch.ones(2, 3) if transform is torch.func.vmap else torch.ones(3)
    with pytest.raises(
        RuntimeError, match=r"cannot run inside a torch.func transform.*torch.optim.adamw.adamw"
    ):
        transform(lambda x: step_inside(target, x))(x.to(target.device))
    step_inside(target, torch.ones(3, device=target.device))


def test_torch_func_is_refused_before_the_closure(target):
    params = parameters([(3,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    optimizer.step()
    before = params[0].detach().clone()

    def inside(x):
        optimizer.step(lambda: pytest.fail("the closure ran"))
        return x.sum()

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(inside)(torch.ones(3, device=target.device))
    assert torch.equal(params[0], before)


def test_gradients_from_torch_func_are_welcome(target):
    """Outside of the transform: the recipe of torch.func for training."""
    model = nn.Linear(3, 1).to(target.device)
    nn.init.ones_(model.weight)
    optimizer = target.adamw(model, lr=0.1)
    x = torch.ones(4, 3, device=target.device)

    def loss(params):
        return torch.func.functional_call(model, params, (x,)).square().mean()

    losses = []
    for _ in range(3):
        grads, value = torch.func.grad_and_value(loss)(dict(model.named_parameters()))
        for name, p in model.named_parameters():
            p.grad = grads[name]
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


def test_differentiable_is_refused_wherever_it_is_said():
    """As an argument, in a group, in a group added later; and the refused group is not added."""
    refused = pytest.raises(RuntimeError, match="`fused` does not support `differentiable`")
    group = {"params": parameters([(2,)]), "differentiable": True}
    with refused:
        FusedHygieneAdamW(parameters([(2,)]), differentiable=True)
    with refused:
        FusedHygieneAdamW([group])
    optimizer = FusedHygieneAdamW(parameters([(2,)]))
    with refused:
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("is_enabled", [True, False])
def test_a_step_gives_back_the_grad_mode(target, is_enabled):
    params = parameters([(3,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    with torch.set_grad_enabled(is_enabled):
        optimizer.step()
        assert torch.is_grad_enabled() is is_enabled
        optimizer.param_groups[0]["lr"] = "high"
        with pytest.raises(TypeError):
            optimizer.step()
        assert torch.is_grad_enabled() is is_enabled
