"""MuonWithAdamW: the two optimizers run by hand with one clip are the peer."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from fused_adamw import EMA, FusedHygieneAdamW, MuonWithAdamW, SpikeGuard, split_for_muon

D, V = 8, 16
IDS = torch.arange(20).view(4, 5) % V


def make_model():
    torch.manual_seed(0)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(D, D), nn.GELU())]
    return nn.Sequential(nn.Embedding(V, D), nn.LayerNorm(D), *hidden, nn.Linear(D, V))


def make(model=None, **options):
    model = make_model() if model is None else model
    split = split_for_muon(model, weight_decay=0.1)
    return model, MuonWithAdamW(split, **{"lr": 0.02, "adamw_lr": 1e-3, **options})


class ByHand:
    """torch's two optimizers on the same split, clipped together."""

    def __init__(self, max_grad_norm):
        self.model = make_model()
        split = split_for_muon(self.model, weight_decay=0.1)
        self.muon = torch.optim.Muon(split.muon, lr=0.02)
        self.adamw = torch.optim.AdamW(split.adamw, lr=1e-3)
        self.max_grad_norm = max_grad_norm

    def step(self, factor=1.0):
        backward(self.model, factor)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or math.inf)
        self.muon.step()
        self.adamw.step()
        return norm


def backward(model, factor=1.0):
    model.zero_grad()
    (model(IDS).square().mean() * factor).backward()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_close(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_against_the_two_by_hand(max_grad_norm, backend):
    """Factors differ from step to step, so that a clip changes what momenta hold."""
    model, optimizer = make(max_grad_norm=max_grad_norm, backend=backend)
    peer = ByHand(max_grad_norm)
    for factor in (100.0, 1.0, 0.01, 30.0):
        norm = peer.step(factor)
        backward(model, factor)
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for p, grad in zip(model.parameters(), before, strict=True):
            assert torch.equal(p.grad, grad)
        if max_grad_norm is not None:
            torch.testing.assert_close(optimizer.grad_norm, norm)
    assert_close(model, peer.model)


def test_it_is_an_optimizer_of_both_parts():
    model, optimizer = make()
    assert {g["lr"] for g in optimizer.param_groups} == {0.02, 1e-3}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = values(model)
    backward(model)
    optimizer.step()
    scheduler.step()
    assert {g["lr"] for g in optimizer.param_groups} == {0.01, 5e-4}
    assert {g["lr"] for g in optimizer._muon.param_groups} == {0.01}
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_runs_once_with_gradients():
    model, optimizer = make(max_grad_norm=1.0)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        backward(model)
        return 7

    assert optimizer.step(closure) == 7
    assert calls == [True]


@pytest.mark.parametrize("part", ["muon", "adamw"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_both_skip(part, value):
    model, optimizer = make(skip_nonfinite=True)
    backward(model)
    optimizer.step()
    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    backward(model)
    getattr(optimizer, f"_{part}").param_groups[0]["params"][0].grad.view(-1)[0] = value
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for i, of_p in optimizer.state_dict()["state"].items():
        for key, saved in state[i].items():
            assert torch.equal(of_p[key], saved)
    assert optimizer.skipped_steps == 1
    backward(model)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"ema": EMA(0.9)}, {"guard": SpikeGuard()}, {"stats": True}],
    ids=lambda options: next(iter(options)),
)
def test_what_would_leave_out_the_muon_part_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is for FusedHygieneAdamW alone"):
        make(**options)


@pytest.mark.parametrize(("max_grad_norm", "skips"), [(None, False), (0.5, False), (None, True)])
def test_grad_scaler(max_grad_norm, skips):
    """With `skips`, the scaler leaves unscaling to the step although nothing is clipped."""
    model, optimizer = make(max_grad_norm=max_grad_norm, skip_nonfinite=skips)
    peer = ByHand(max_grad_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for overflows in (False, True, False):
        model.zero_grad()
        scaler.scale(model(IDS).square().mean() * 100).backward()
        if overflows:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = math.inf
        before = values(model)
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) is overflows
        if not overflows:
            peer.step(100.0)
    assert scaler.get_scale() == 512.0
    peer.step(2.0)
    backward(model, 2.0)
    optimizer.step()  # without the scaler, whose scale is forgotten
    assert_close(model, peer.model)


class TestCheckpoints:
    def run(self, model, optimizer, steps):
        for i in range(steps):
            backward(model, 10.0 * (i + 1))
            optimizer.step()

    def test_round_trip(self):
        model, optimizer = make(max_grad_norm=1.0)
        self.run(model, optimizer, 2)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        saved_model, saved = torch.load(file, weights_only=True)
        other, resumed = make(lr=9.0, adamw_lr=9.0, max_grad_norm=1.0)
        other.load_state_dict(saved_model)
        resumed.load_state_dict(saved)
        assert {g["lr"] for g in resumed.param_groups} == {0.02, 1e-3}
        scheduler = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1.0)
        self.run(model, optimizer, 2)
        self.run(other, resumed, 2)
        scheduler.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))

    def test_groups_are_live_after_a_load(self):
        model, optimizer = make()
        self.run(model, optimizer, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            group["weight_decay"] = 0.0
        before = values(model)
        self.run(model, optimizer, 1)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    def test_bfloat16_state(self):
        model, optimizer = make(state_dtype=torch.bfloat16)
        self.run(model, optimizer, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        dtypes = {s["exp_avg"].dtype for s in optimizer.state.values() if "exp_avg" in s}
        assert dtypes == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda d: d["param_groups"].pop(), "groups of"),
            (lambda d: d["param_groups"].reverse(), "moved|another|AdamW|groups of"),
            (lambda d: d["state"][max(d["state"])].pop("exp_avg"), "exp_avg"),
        ],
    )
    def test_a_load_that_fails_changes_nothing(self, spoil, message):
        model, optimizer = make()
        self.run(model, optimizer, 1)
        before = copy.deepcopy(optimizer.state_dict())
        spoiled = copy.deepcopy(before)
        spoil(spoiled)
        with pytest.raises((ValueError, RuntimeError), match=message):
            optimizer.load_state_dict(spoiled)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, of_p in before["state"].items():
            for key, value in of_p.items():
                assert torch.equal(after["state"][i][key], value)
        self.run(model, optimizer, 1)

    def test_where_muons_part_does_not_load_adamws_part_is_put_back(self, monkeypatch):
        model, optimizer = make()
        self.run(model, optimizer, 1)
        other = copy.deepcopy(optimizer.state_dict())
        for group in other["param_groups"]:
            group["lr"] = 7.0
        before = copy.deepcopy(optimizer.state_dict())

        def fails(state_dict):
            raise RuntimeError("not mine")

        with monkeypatch.context() as patch:
            patch.setattr(optimizer._muon, "load_state_dict", fails)
            with pytest.raises(RuntimeError, match="not mine"):
                optimizer.load_state_dict(other)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        values_before = values(model)
        self.run(model, optimizer, 1)  # both parts still follow the groups that everybody sees
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), values_before, strict=True))
        assert {float(s["step"]) for s in optimizer.state.values() if "step" in s} == {2.0}

    def test_hooks(self):
        model, optimizer = make()
        seen = []
        optimizer.register_load_state_dict_pre_hook(lambda opt, d: seen.append(sorted(d)))
        optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(len(opt.state)))
        self.run(model, optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == [["param_groups", "state"], len(list(model.parameters()))]

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
    def test_copies(self, copied):
        model, optimizer = make(max_grad_norm=1.0)
        self.run(model, optimizer, 1)
        assert optimizer._adamw.norm_process_group is None  # it belongs to the step alone
        both = copied({"model": model, "optimizer": optimizer})
        self.run(model, optimizer, 2)
        self.run(both["model"], both["optimizer"], 2)
        assert all(
            torch.equal(p, q) for p, q in zip(model.parameters(), both["model"].parameters(), strict=True)
        )
        assert both["optimizer"].grad_norm == optimizer.grad_norm


class Rude(torch.optim.Optimizer):
    """A Muon that writes to gradients and fills in those that are missing, as some do."""

    def __init__(self, params, lr, fails=False):
        super().__init__(params, {"lr": lr})
        self.fails = fails
        self.seen = []

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                self.seen.append(p.grad.clone())
                self.state[p]["momentum"] = torch.zeros_like(p)
                if self.fails:
                    raise RuntimeError("no memory")
                p.grad.zero_()


class TestAnotherMuon:
    def test_gradients_are_lent(self):
        model, optimizer = make(muon=Rude, max_grad_norm=0.5)
        backward(model, 100.0)
        optimizer.param_groups[0]["params"][1].grad = None
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        total = torch.nn.utils.get_total_norm([g for g in before if g is not None])
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, total)
        for p, grad in zip(model.parameters(), before, strict=True):
            assert p.grad is None if grad is None else torch.equal(p.grad, grad)
        first = optimizer.param_groups[0]["params"][0]
        torch.testing.assert_close(optimizer._muon.seen[0], first.grad * 0.5 / (total + 1e-6))

    def test_a_step_that_fails_changes_nothing(self):
        model, optimizer = make(muon=Rude, muon_options={"fails": True}, max_grad_norm=0.5)
        backward(model)
        before, grads = values(model), [p.grad.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="no memory"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        assert not any(of_p for of_p in optimizer.state.values())
        optimizer._muon.fails = False
        optimizer.step()
        assert optimizer._adamw.state[model[0].weight]["step"] == 1


class TestRefusals:
    def test_before_a_step(self):
        model, optimizer = make(max_grad_norm=1.0)
        backward(model)
        before = values(model)
        optimizer.param_groups[0]["lr"] = "1e-3"
        with pytest.raises(TypeError, match="lr of Muon's group 0 must be a number, got '1e-3'"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-3
        p = optimizer.param_groups[0]["params"][0]
        dense, p.grad = p.grad, p.grad.to_sparse()
        with pytest.raises(RuntimeError, match=r"gradient of 2.weight is sparse"):
            optimizer.step()
        p.grad = dense
        optimizer.param_groups[-1]["eps"] = "small"
        with pytest.raises(TypeError, match="eps"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        optimizer.param_groups[-1]["eps"] = 1e-8
        optimizer.step()

    def test_at_construction(self):
        with pytest.raises(TypeError, match="expected what split_for_muon returns, got list"):
            MuonWithAdamW([])
        split = split_for_muon(make_model())
        split.muon.clear()
        with pytest.raises(ValueError, match="no parameter goes to Muon"):
            MuonWithAdamW(split)
        with pytest.raises(ValueError, match="max_grad_norm"):
            make(max_grad_norm=-1.0)
        with pytest.raises(TypeError, match="nonsense"):
            make(nonsense=1)


def test_a_second_clip_is_noticed():
    model, optimizer = make(max_grad_norm=0.5)

    def clip_twice():
        backward(model, 1000.0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    for _ in range(7):
        clip_twice()
    with pytest.warns(UserWarning, match="clipped before"):
        clip_twice()


def test_add_param_group():
    model, optimizer = make(max_grad_norm=1.0)
    extra = nn.ParameterList([torch.ones(D, D), torch.ones(D)])
    names = {"param_names": ["extra"]}
    optimizer.add_param_group({"params": [extra[0]], "muon": True, **names})
    optimizer.add_param_group({"params": [extra[1]], "weight_decay": 0.0, "param_names": ["other"]})
    backward(model)
    for p in extra:
        p.grad = torch.ones_like(p) * 0.1
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[extra[0]]
    assert "exp_avg" in optimizer.state[extra[1]]
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[extra[1]]["step"] == 2
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [extra[0]], "param_names": ["again"]})
    assert len(optimizer.param_groups) == count == len(optimizer._parts())


def test_other_processes_are_summed_over():
    """A callable adds what other processes hold: the clip is by the norm of all."""
    model, optimizer = make(max_grad_norm=0.5, norm_process_group=lambda sums: 4 * sums)
    backward(model)
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, 2 * total)


def test_no_line_says_that_no_hygiene_is_applied(caplog):
    with caplog.at_level("INFO", logger="fused_adamw"):
        make()
        FusedHygieneAdamW([{"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.0}])
    assert not any("no hygiene" in message for message in caplog.messages)
