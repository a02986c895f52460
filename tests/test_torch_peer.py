"""The same training with torch.optim.AdamW: options, schedulers, and what users do to an optimizer."""

import pytest
import torch
from common import assert_same_path, give_grads, parameters, twins
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

SHAPES = [(65,), (3, 7), ()]


def assert_same_states(optimizer, peer, params, peers, steps):
    """Same keys, dtypes and counts, and moments within two units in the last place per step.

    Each moment is rounded twice per step; torch's vectorised lerp and addcmul contract one of the two away.
    """
    for p, q in zip(params, peers, strict=True):
        ours, theirs = optimizer.state.get(p, {}), peer.state.get(q, {})
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype, key
            if value.numel() == 0:
                continue
            eps = torch.finfo(value.dtype).eps
            biggest = value.abs().max().item()
            torch.testing.assert_close(
                ours[key].cpu(), value.cpu(), rtol=0, atol=0 if key == "step" else 2 * steps * eps * biggest
            )


class Race:
    """Our optimizer and torch's, on equal parameters, stepped with equal gradients."""

    def __init__(self, target, shapes=SHAPES, dtype=torch.float32, params=None, groups=None, **options):
        self.target = target
        self.params = parameters(shapes, dtype=dtype, device=target.device) if params is None else params
        self.peers = twins(self.params)
        groups = groups or (lambda params: params)
        self.ours = target.adamw(groups(self.params), **options)
        self.theirs = torch.optim.AdamW(groups(self.peers), foreach=False, **options)
        self.steps = 0

    @property
    def optimizers(self):
        return self.ours, self.theirs

    def run(self, steps=None, without=lambda step: ()):
        """Take steps, in which the parameters of the indices `without(step)` have no gradient."""
        for _ in range(steps or (3 if self.target.slow else 20)):
            give_grads(self.params, self.steps)
            for i, (p, q) in enumerate(zip(self.params, self.peers, strict=True)):
                if i in without(self.steps):
                    p.grad = None
                q.grad = None if p.grad is None else p.grad.clone()
            for optimizer in self.optimizers:
                optimizer.step()
            self.steps += 1
        self.check()

    def check(self):
        assert_same_path(self.params, self.peers, self.steps)
        assert_same_states(self.ours, self.theirs, self.params, self.peers, self.steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 1e-2, "weight_decay": 0.3},
        {"weight_decay": 0.0},
        {"betas": (0.3, 0.5)},
        {"betas": (0.0, 0.0)},
        {"eps": 0.0},
        {"amsgrad": True},
        {"maximize": True},
        {"amsgrad": True, "maximize": True, "weight_decay": 0.3},
    ],
    ids=str,
)
def test_options(target, options, dtype):
    Race(target, dtype=dtype, **options).run()


def test_tensor_betas(target):
    """Torch then works the bias corrections out in float32, where 1 - 0.99 has a relative error of 1e-5."""
    lr, steps = 1e-3, 5
    race = Race(target, [(65,)], lr=lr, betas=(torch.tensor(0.9), torch.tensor(0.99)))
    for step in range(steps):
        give_grads(race.params, step)
        give_grads(race.peers, step)
        for optimizer in race.optimizers:
            optimizer.step()
    # An update is at most lr / sqrt(1 - beta2) = 10 lr.
    torch.testing.assert_close(race.params[0], race.peers[0], rtol=0, atol=steps * 10 * lr * 1e-5)
    assert_same_states(race.ours, race.theirs, race.params, race.peers, steps)


def test_amsgrad_keeps_the_maximum_when_gradients_shrink(target):
    race = Race(target, amsgrad=True)
    race.run(1)
    first = [race.ours.state[p]["max_exp_avg_sq"].clone() for p in race.params]
    for _ in range(5):
        for p, q in zip(race.params, race.peers, strict=True):
            p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        race.ours.step()
        race.theirs.step()
        race.steps += 1
    race.check()
    for p, v_max in zip(race.params, first, strict=True):
        assert torch.equal(race.ours.state[p]["max_exp_avg_sq"], v_max)
        assert (race.ours.state[p]["exp_avg_sq"] < v_max).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr_filled_in_place(target, shape):
    race = Race(target, [(9,)], groups=lambda params: [{"params": params, "lr": torch.full(shape, 1e-2)}])
    for lr in (1e-2, 3e-3, 0.0, 2e-2):
        for optimizer in race.optimizers:
            optimizer.param_groups[0]["lr"].fill_(lr)
        race.run(2)
    assert race.ours.param_groups[0]["lr"].shape == shape


def test_tensor_lr_as_argument(target):
    race = Race(target, [(9,)], lr=torch.tensor(1e-2))
    race.run(2)


@pytest.mark.parametrize("lr", [1e-2, "tensor"])
def test_one_cycle_with_cycled_betas(target, lr):
    lr = torch.tensor(1e-2) if lr == "tensor" else lr
    race = Race(target, lr=lr)
    schedulers = [OneCycleLR(o, max_lr=0.05, total_steps=12, cycle_momentum=True) for o in race.optimizers]
    for _ in range(3 if target.slow else 10):
        race.run(1)
        for scheduler in schedulers:
            scheduler.step()
    ours, theirs = (o.param_groups[0] for o in race.optimizers)
    assert ours["betas"] == theirs["betas"] != (0.9, 0.999)
    assert float(ours["lr"]) == float(theirs["lr"]) != 1e-2


def test_lambda_schedulers_of_two_groups(target):
    race = Race(target, groups=lambda p: [{"params": p[:1], "lr": 1e-2}, {"params": p[1:], "lr": 1e-3}])
    schedulers = [LambdaLR(o, [lambda s: 0.9**s, lambda s: 1 / (1 + s)]) for o in race.optimizers]
    for _ in range(4):
        race.run(1)
        for scheduler in schedulers:
            scheduler.step()


def test_closure_runs_once_with_gradients_enabled_and_its_loss_returned(target):
    race = Race(target, [(5,)])
    losses = []
    for optimizer, params in ((race.ours, race.params), (race.theirs, race.peers)):
        calls = []

        def closure(optimizer=optimizer, params=params, calls=calls):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = (params[0] ** 2).sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append(optimizer.step(closure))
            optimizer.step(closure=closure)
        assert calls == [True, True]
    assert torch.equal(*losses)
    race.steps = 2
    race.check()
    assert race.ours.step() is None


def test_gradients_come_and_go(target):
    """As in a mixture of experts: another set of parameters at every step, one that never has a gradient."""
    shapes = [(4,), (2, 3), (70,), (5,), (6,)]
    absent = [{0, 4}, {1, 4}, {0, 1, 2, 3, 4}, {4}, {2, 3, 4}, {0, 1, 4}]
    race = Race(target, shapes)
    race.run(len(absent), without=lambda step: absent[step])
    assert race.params[4] not in race.ours.state
    assert [race.ours.state[p]["step"].item() for p in race.params[:4]] == [3, 3, 4, 4]


def test_no_gradient_at_all(target):
    race = Race(target)
    race.run(2, without=lambda step: range(3))
    assert not race.ours.state


def test_freeze_and_unfreeze(target):
    params = parameters(SHAPES, device=target.device)
    params[1].requires_grad_(False)
    race = Race(target, params=params)
    race.run(3, without=lambda step: (1,))
    for p in (race.params[1], race.peers[1]):
        p.requires_grad_(True)
    race.run(3)
    for p in (race.params[0], race.peers[0]):
        p.requires_grad_(False)
    race.run(3, without=lambda step: (0,))
    assert [race.ours.state[p]["step"].item() for p in race.params] == [6, 6, 9]


def test_empty_groups(target):
    def groups(params):
        return [{"params": []}, {"params": params[:1]}, {"params": [], "lr": 1.0}, {"params": params[1:]}]

    Race(target, groups=groups).run(3)


def test_zero_size_tensors(target):
    """At the start, the end and in between: their count advances and their neighbours move."""
    race = Race(target, [(0,), (3,), (2, 0), (), (0,), (0, 4)])
    race.run(3)
    assert all(race.ours.state[p]["step"].item() == 3 for p in race.params)


def test_options_of_groups(target):
    def groups(params):
        return [
            {"params": params[:1], "lr": 0.05, "weight_decay": 0.4, "betas": (0.5, 0.9)},
            {"params": params[1:2], "eps": 1e-3, "amsgrad": True},
            {"params": params[2:], "maximize": True},
        ]

    Race(target, groups=groups).run()


def test_add_param_group_during_training(target):
    race = Race(target)
    race.run(3)
    more = parameters([(4,), (66,)], seed=5, device=target.device)
    copies = twins(more)
    race.ours.add_param_group({"params": more, "lr": 0.02, "weight_decay": 0.5})
    race.theirs.add_param_group({"params": copies, "lr": 0.02, "weight_decay": 0.5})
    race.params += more
    race.peers += copies
    race.run(3)
    assert race.ours.state[more[0]]["step"].item() == 3


def test_group_options_changed_between_steps(target):
    race = Race(target)
    changes = [
        {"lr": 0.05},
        {"betas": (0.4, 0.7)},
        {"weight_decay": 0.9},
        {"eps": 1e-2},
        {"maximize": True},
        {"lr": 1e-4, "maximize": False, "betas": (0.95, 0.98)},
    ]
    for change in changes:
        for optimizer in race.optimizers:
            optimizer.param_groups[0].update(change)
        race.run(2)


def test_named_parameters(target):
    def groups(params):
        return [(f"layer.{i}", p) for i, p in enumerate(params)]

    race = Race(target, groups=groups)
    race.run(2)
    assert race.ours.param_groups[0]["param_names"] == ["layer.0", "layer.1", "layer.2"]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(target, dtype, amsgrad):
    params = [
        torch.nn.Parameter(torch.view_as_complex(p.detach().clone()))
        for p in parameters([(5, 2), (2, 3, 2)], dtype=dtype.to_real(), device=target.device)
    ]
    params += parameters([(4,)], device=target.device)
    race = Race(target, params=params, amsgrad=amsgrad)
    for _ in range(3):
        for i, (p, q) in enumerate(zip(race.params, race.peers, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype).to(
                p.device
            )
            q.grad = p.grad.clone()
        for optimizer in race.optimizers:
            optimizer.step()
        race.steps += 1
    for p, q in zip(race.params, race.peers, strict=True):
        assert race.ours.state[p]["exp_avg"].dtype == p.dtype
        torch.testing.assert_close(p, q, rtol=0, atol=race.steps * 4 * torch.finfo(p.dtype).eps * 4)
    assert race.ours.state[params[0]].keys() == race.theirs.state[race.peers[0]].keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(target, dtype):
    """Torch rounds after every operation, ours only when it stores: a few ulps of the storage per step."""
    race = Race(target, [(65,)], dtype=dtype, lr=1e-2, eps=1e-4)
    for step in range(3):
        give_grads(race.params, step)
        race.peers[0].grad = race.params[0].grad.clone()
        for optimizer in race.optimizers:
            optimizer.step()
    eps = torch.finfo(dtype).eps
    (p,), (q,) = race.params, race.peers
    torch.testing.assert_close(p, q, rtol=0, atol=3 * 2 * eps * q.detach().abs().max().item())
    for key in ("exp_avg", "exp_avg_sq"):
        ours, theirs = race.ours.state[p][key], race.theirs.state[q][key]
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3 * 4 * eps * theirs.abs().max().item())


def test_foreach_and_fused_change_nothing(target):
    results = []
    for options in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
        params = parameters(SHAPES, device=target.device)
        optimizer = target.adamw(params, **options)
        for step in range(2):
            give_grads(params, step)
            optimizer.step()
        results.append(params)
    for params in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(params, results[0], strict=True))


def test_a_model_trains_as_with_torch(target):
    """Forward, backward, clipping by hand on torch's side, groups by `build_param_groups` on both."""
    from fused_adamw import build_param_groups

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 9), torch.nn.LayerNorm(9), torch.nn.GELU(), torch.nn.Linear(9, 1)
        ).to(target.device)

    ours, theirs = model(), model()
    optimizer = target.adamw(ours, lr=1e-2, weight_decay=0.2, max_grad_norm=0.1)
    peer = torch.optim.AdamW(build_param_groups(theirs, 0.2), lr=1e-2, foreach=False)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [
        g["weight_decay"] for g in peer.param_groups
    ]
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).to(target.device)
    losses = []
    for _ in range(5):
        for m, o in ((ours, optimizer), (theirs, peer)):
            o.zero_grad()
            loss = (m(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            if o is peer:
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            o.step()
            losses.append(loss.item())
    # Differences feed back through the gradients; one percent of the smallest change that lr can make.
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
    assert losses[-2] < 0.9 * losses[0]
    assert_same_path(list(ours.parameters()), list(theirs.parameters()), 5, grad_error=1e-4)
