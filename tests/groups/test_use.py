"""Evidence by use: small modules in which nothing but the forward pass tells what a parameter is for."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from fused_adamw import FusedHygieneAdamW
from fused_adamw.groups import ParamGroupWarning, Role, build_param_groups, explain_param_groups
from fused_adamw.groups.use import observe
from fused_adamw.groups.walk import walk

from .helpers import decays

B, T, D = 2, 5, 6
X = torch.zeros(B, T, D)


class Uses(nn.Module):
    """One parameter `p`, whose name tells nothing, and what `use(x, p)` does with it between two layers."""

    def __init__(self, shape, use, around=True):
        super().__init__()
        self.p = nn.Parameter(torch.rand(shape))
        self.before = nn.Linear(D, D) if around else nn.Identity()
        self.after = nn.Linear(D, D) if around else nn.Identity()
        self.use = use

    def forward(self, x):
        return self.after(self.use(self.before(x), self.p))


def role_of(model, inputs=X, name="p"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return explain_param_groups(model, example_inputs=inputs).decision(name).role


# Role -> shape and use, several ways each.
USES = {
    "matrix": [
        ((D, D), lambda x, p: x @ p),
        ((D, D), lambda x, p: F.linear(x, p)),
        ((D, D), lambda x, p: F.linear(x, p.t().contiguous().double().float())),
        ((D * D,), lambda x, p: x @ p.view(D, D)),
        ((2, D, 3), lambda x, p: torch.einsum("btd,hdk->bthk", x, p).flatten(2)),
        ((D, 2, 3), lambda x, p: torch.einsum("btd,dhk->bthk", x, p).flatten(2)),
        ((D, D), lambda x, p: x @ F.softplus(p)),
        ((D, D), lambda x, p: x @ (p / p.norm())),
        ((D, D), lambda x, p: (x[..., None, :] * p).sum(-1)),
        ((D, D), lambda x, p: torch.bmm(x, p.expand(B, D, D))),
        ((D, D), lambda x, p: x @ (p * x.mean((0, 1)).unsqueeze(-1))),
        ((3, D, D), lambda x, p: torch.stack([x @ w for w in p]).sum(0)),
        ((T, T), lambda x, p: torch.tril(p) @ x),
        ((D, D), lambda x, p: F.linear(x, torch.round(p * 8) / 8)),
        ((D, D), lambda x, p: checkpoint(lambda x: x @ p, x, use_reentrant=False)),
        ((D, 1), lambda x, p: x * (x @ p)),
    ],
    "convolution": [
        ((D, D, 1), lambda x, p: F.conv1d(x.mT, p).mT),
        ((D, 3), lambda x, p: F.conv1d(x.mT, p[:, None], padding=1, groups=D).mT),
    ],
    "embedding": [
        ((9, D), lambda x, p: x + p[x.argmax(-1)]),
        ((9, D), lambda x, p: x + F.embedding(x.argmax(-1), p)),
        ((9, D), lambda x, p: x + p.index_select(0, x.argmax(-1).flatten()).view_as(x)),
    ],
    "position": [
        ((T, D), lambda x, p: x + p),
        ((1, T, D), lambda x, p: x + p.expand(B, -1, -1)),
        ((9, D), lambda x, p: x + p[:T]),
        ((9, D), lambda x, p: x + p[torch.arange(T)]),
        ((T, T), lambda x, p: (x @ x.mT + p).softmax(-1) @ x),
    ],
    "bias": [((1, D), lambda x, p: x + p), ((D,), lambda x, p: x.add_(p))],
    "token": [
        ((1, 1, D), lambda x, p: torch.cat([p.expand(B, -1, -1), x], 1)),
        ((3, D), lambda x, p: torch.cat([p[None].repeat(B, 1, 1), x], 1)),
        ((1, 1, D), lambda x, p: torch.where(x.sum(-1, keepdim=True) > 0, p, x)),
    ],
    "gain": [
        ((1, D), lambda x, p: x * p),
        ((T, D), lambda x, p: x * p),
        ((1, 1, D), lambda x, p: x / p),
        ((D,), lambda x, p: F.layer_norm(x, (D,), p)),
    ],
    "temperature": [((), lambda x, p: x * p.exp()), ((1,), lambda x, p: F.softplus(p) * x)],
    "frequency": [
        ((D, 4), lambda x, p: torch.cos(6.28 * p * x[..., None]).sum(-1)),
        ((T, D), lambda x, p: x + torch.sin(p)),
    ],
    "recurrence": [
        ((T, D), lambda x, p: x * torch.sigmoid(p)),
        ((D, 4), lambda x, p: torch.exp(x[..., None] * -torch.exp(p)).sum(-1)),
        ((T, D), lambda x, p: x * p.softmax(0).cumsum(0)),
    ],
}
CASES = [(role, i) for role, ways in USES.items() for i in range(len(ways))]


@pytest.mark.parametrize(("role", "way"), CASES)
def test_kinds(role, way):
    shape, use = USES[role][way]
    assert role_of(Uses(shape, use)) == role


@pytest.mark.parametrize(("role", "way"), CASES)
def test_kinds_with_values(role, way, monkeypatch):
    """The same where fake tensors cannot go."""
    shape, use = USES[role][way]

    def needs_values(x, p):
        return use(x, p) if float(x.sum()) < 1e9 else x

    assert role_of(Uses(shape, needs_values)) == role


class Bayesian(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.rand(D, D)), nn.Parameter(torch.rand(D, D))

    def forward(self, x):
        return x @ (self.one + F.softplus(self.two) * torch.randn_like(self.one))


def test_spread_beside_a_mean():
    assert role_of(Bayesian(), name="two") is Role.SPREAD
    assert explain_param_groups(Bayesian(), 0.1, example_inputs=X).decision("one").decays


class LearnedRows(nn.Module):
    """Latents that go through a map before they meet the input, and a bias that is added to their result."""

    def __init__(self):
        super().__init__()
        self.rows, self.w = nn.Parameter(torch.rand(3, D)), nn.Parameter(torch.rand(D, D))
        self.c = nn.Parameter(torch.rand(3, D))

    def forward(self, x):
        q = self.rows.expand(B, -1, -1) @ self.w
        return (q @ x.mT).softmax(-1) @ x


def test_rows_that_go_through_a_map():
    report = explain_param_groups(LearnedRows(), 0.1, example_inputs=X)
    assert report.decision("rows").role is Role.QUERY
    assert report.decision("w").decays
    assert "do not reach it" in report["c"]


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.rand(D, 2)), nn.Parameter(torch.rand(2, D))

    def forward(self, x):
        return x @ (self.one @ self.two)


def test_factors_of_a_map_are_maps():
    report = explain_param_groups(LowRank(), 0.1, example_inputs=X)
    assert all(d.decays and d.confidence == "high" for d in report.decisions)


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: parametrize.register_parametrization(m, "p", Negative()),
        lambda m: parametrizations.weight_norm(m, "p"),
        lambda m: parametrizations.spectral_norm(m, "p"),
        lambda m: nn.utils.weight_norm(m, "p"),
        lambda m: nn.utils.spectral_norm(m, "p"),
        torch.compile,
        lambda m: (m.compile(), m)[1],
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm:DeprecationWarning")
def test_seen_through(wrap):
    model = wrap(Uses((D, D), lambda x, p: x @ p))
    large = [
        d for d in explain_param_groups(model, 0.1, example_inputs=X).decisions if d.param.numel() == D * D
    ]
    assert len(large) == 3
    assert all(d.decays and d.confidence == "high" for d in large)


class TestContradictions:
    def test_name(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.rand(T, D))

            def forward(self, x):
                return x + self.weight

        with pytest.warns(ParamGroupWarning, match="a matrix by name, a position by use"):
            groups = build_param_groups(Model(), 0.1, example_inputs=X)
        assert decays(groups) == {"weight": False}
        report = explain_param_groups(Model(), 0.1, example_inputs=X)
        assert [remark.code for remark in report.lints] == ["use-disagrees"]
        assert report["weight"].startswith(
            "weight does not decay: it is added to every token's activation: a position, although"
        )

    def test_type_stands(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(D, T)

            def forward(self, x):
                return x + self.layer.weight

        report = explain_param_groups(Model(), 0.1, example_inputs=X)
        assert report.decision("layer.weight").decays
        assert [remark.code for remark in report.lints] == ["use-disagrees"]
        assert "a matrix by type, a position by use" in str(report.lints[0])

    def test_overrides_stand(self):
        model = Uses((T, D), lambda x, p: x + p)
        report = explain_param_groups(model, 0.1, overrides={"p": True}, example_inputs=X)
        assert report.decision("p").decays

    def test_rows_by_name_that_queries_are_multiplied_with(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.rel_pos = nn.Parameter(torch.rand(T, D))

            def forward(self, x):
                return (x @ self.rel_pos.t()).softmax(-1) @ x

        report = explain_param_groups(Model(), 0.1, example_inputs=X)
        assert report.decision("rel_pos").role is Role.POSITION
        assert not report.lints


def test_tied_by_a_function():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, D)

        def forward(self, ids):
            return F.linear(self.embed(ids), self.embed.weight)

    report = explain_param_groups(Model(), example_inputs=torch.zeros(B, T, dtype=torch.long))
    assert report.decision("embed.weight").role is Role.TIED_EMBEDDING


class TestEnds:
    def test_by_use(self):
        model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        roles = {d.name: d.role for d in explain_param_groups(model, example_inputs=X).decisions}
        assert (roles["0.weight"], roles["2.weight"], roles["4.weight"]) == ("input", "matrix", "output")

    def test_router(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.before, self.choose = nn.Linear(D, D), nn.Linear(D, 4)
                self.w = nn.Parameter(torch.rand(4, D, D))

            def forward(self, x):
                share, chosen = self.choose(self.before(x)).softmax(-1).topk(2)
                return torch.einsum("btd,btkdf,btk->btf", x, self.w[chosen], share)

        report = explain_param_groups(Experts(), 0.1, example_inputs=X)
        assert report.decision("choose.weight").role is Role.ROUTER
        assert report.decision("w").decays
        assert report.decision("w").role is Role.MATRIX

    def test_what_is_asked_of_matrices_is_asked_of_them(self):
        model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
        for roles, expected in [
            ({"matrix": False}, (False, False)),
            ({"matrix": False, "output": True}, (False, True)),
            ({"input": False}, (False, True)),
            (None, (True, True)),
        ]:
            groups = build_param_groups(model, 0.1, roles=roles, example_inputs=X)
            answers = decays(groups)
            assert (answers["0.weight"], answers["1.weight"]) == expected


class Everything(nn.Module):
    """Has whatever a forward pass may change: statistics, random numbers, caches, a gradient, a hook."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.norm = nn.BatchNorm1d(T)
        self.drop = nn.Dropout()
        self.cache = {}
        self.calls = 0

    def forward(self, x):
        random.random(), np.random.rand()
        self.calls += 1
        self.cache["x"] = self.last = self.layer(x) + torch.rand(D)
        with torch.no_grad():
            self.layer.weight.mul_(2)
        return self.drop(self.norm(self.last))


@pytest.mark.parametrize("needs_values", [False, True])
def test_the_model_stays_as_it_was(needs_values):
    model = Everything()
    model.norm.eval()
    model(X).sum().backward()
    model.layer.register_forward_hook(
        lambda module, args, out: out if not needs_values else out * float(out.sum())
    )
    before = copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    grads = [p.grad for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    inputs = X.clone()
    explain_param_groups(model, example_inputs=inputs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items())
    assert model.cache["x"] is model.last
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert torch.equal(inputs, X)


class TestFailures:
    def test_a_forward_that_raises(self):
        def fails(x, p):
            raise RuntimeError("no such shape")

        model = Uses((T, D), fails)
        with pytest.warns(
            ParamGroupWarning, match=r"example_inputs: the forward pass raised RuntimeError: no such"
        ):
            groups = build_param_groups(model, 0.1, example_inputs=X)
        with pytest.warns(ParamGroupWarning):
            plain = build_param_groups(model, 0.1)
        assert [group["param_names"] for group in groups] == [group["param_names"] for group in plain]

    def test_a_forward_on_meta_that_needs_values(self):
        with torch.device("meta"):
            model = Uses((T, D), lambda x, p: x + p if float(x.sum()) > 0 else x)
        with pytest.warns(ParamGroupWarning, match="example_inputs: the forward pass raised"):
            build_param_groups(model, example_inputs=X)

    def test_copied_policies_watch_nothing(self):
        def fails(x, p):
            raise AssertionError

        build_param_groups(Uses((T, D), fails), policy="timm", example_inputs=X)


def test_a_module_that_converts_itself():
    class Model(Uses):
        def forward(self, x):
            self.to(torch.float32)
            self.before = self.before.to(x.dtype)
            return super().forward(x)

    with torch.device("meta"):  # where no second run with values could hide a failure
        model = Model((T, D), lambda x, p: x + p)
    assert role_of(model) is Role.POSITION


def test_a_layer_with_a_fast_path_is_seen_through():
    model = nn.TransformerEncoderLayer(D, 2, 8, batch_first=True)
    located = walk(model)
    seen = observe(model, located, X)
    assert torch.backends.mha.get_fastpath_enabled()
    kinds = {item.name: {str(k.value.role) for k in seen.kinds[id(item.param)]} for item in located}
    assert kinds["self_attn.in_proj_weight"] == kinds["linear1.weight"] == {"matrix"}
    assert kinds["norm1.weight"] == {"gain"}


def test_a_gain_among_parameters():
    """`p` scales the rows of a matrix before activations meet it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.w = nn.Parameter(torch.rand(D, 1)), nn.Parameter(torch.rand(D, D))

        def forward(self, x):
            return x @ (self.w / self.w.norm(dim=1, keepdim=True) * self.p)

    assert role_of(Model()) is Role.GAIN


class Quantized(torch.Tensor):
    """An int8 weight with a scale per row, as quantised training has it: `linear` takes it apart."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, requires_grad=True)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *_ = args
            return x @ weight.values.t().to(x.dtype) * weight.scale
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        (self, *_), name = args, func._schema.name
        assert name in ("aten::detach", "aten::clone", "aten::alias"), name
        made = [func(t, *args[1:], **(kwargs or {})) for t in (self.values, self.scale)]
        return cls(*made)


def test_quantised_weights():
    """The operators see the parts of such a weight; its own type is unknown."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            quantized = Quantized(torch.zeros(D, D, dtype=torch.int8), torch.ones(D))
            self.something = nn.Parameter(quantized)

        def forward(self, x):
            return F.linear(x, self.something)

    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), Layer(), nn.ReLU(), Layer())
    roles = {d.name: d.role for d in explain_param_groups(model, example_inputs=X).decisions}
    assert roles["2.something"] is Role.MATRIX
    assert roles["4.something"] is Role.OUTPUT


def test_a_model_on_meta():
    with torch.device("meta"):
        model = Uses((T, D), lambda x, p: x + p + torch.arange(D))
    assert role_of(model) is Role.POSITION


@pytest.mark.parametrize("inputs", [X, (X,), [X], {"x": X}])
def test_ways_to_pass_inputs(inputs):
    assert role_of(Uses((T, D), lambda x, p: x + p), inputs) is Role.POSITION


def test_optimizer():
    model = Uses((T, D), lambda x, p: x + p)
    groups = FusedHygieneAdamW(model, weight_decay=0.1, example_inputs=X).param_groups
    assert not decays(groups)["p"]


STEPS = {
    "view": lambda p: p.view(p.shape),
    "twice transposed": lambda p: p.mT.contiguous().mT if p.dim() > 1 else p,
    "cast": lambda p: p.double().float(),
    "detached": lambda p: p.detach(),
    "clone": lambda p: p.clone(),
    "negated": lambda p: -p,
    "scaled": lambda p: 0.5 * p,
    "pruned": lambda p: p * torch.ones_like(p),
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(CASES), min_size=1, max_size=4),
    st.lists(st.sampled_from(sorted(STEPS)), max_size=3),
)
def test_random_models(cases, steps):
    """A parameter has the role of the use that was drawn, whatever is around it and happens to it before."""

    def make(shape, use):
        def after_steps(x, p):
            for step in steps:
                p = STEPS[step](p)
            return use(x.clone(), p)[:, :T]

        return Uses(shape, after_steps)

    used = [(role, *USES[role][way]) for role, way in cases]
    model = nn.Sequential(*(make(shape, use) for _, shape, use in used), nn.Linear(D, D))
    decisions = explain_param_groups(model, example_inputs=X)
    for i, (role, _, _) in enumerate(used):
        assert decisions.decision(f"{i}.p").role == role
