"""Evidence by use where a product says more than "a map": queries, rows, routers, first maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_adamw.groups import Role, explain_param_groups

from .test_use import B, D, T, X, role_of


def attend(scores, x):
    return scores.softmax(-1) @ x


class Compared(nn.Module):
    """Rows `p` that keys or queries, results of a map, are compared with."""

    def __init__(self, shape, use):
        super().__init__()
        self.p = nn.Parameter(torch.rand(shape))
        self.q, self.k, self.after = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.use = use

    def forward(self, x):
        return self.after(self.use(x, self.q(x), self.k(x), self.p))


def heads(x):
    return x.unflatten(-1, (2, D // 2)).transpose(1, 2)


def skewed(scores):
    """Shift row i by i places, as relative attention does."""
    padded = F.pad(scores, (1, 0))
    return padded.view(B, T + 1, T)[:, 1:]


class TestQueriesAndKeys:
    """A query times a key is no map, although activations are multiplied by a parameter."""

    @pytest.mark.parametrize(
        ("shape", "use"),
        [
            ((3, D), lambda x, q, k, p: attend(p @ k.mT, x)[:, :1] + x),
            ((3, D), lambda x, q, k, p: attend((k @ p.t()).mT / D**0.5, x)[:, :1] + x),
            ((3, D), lambda x, q, k, p: attend(torch.einsum("nd,btd->bnt", p, k), x)[:, :1] + x),
            (
                (2, 3, D // 2),
                lambda x, q, k, p: attend(p @ heads(k).mT, heads(x)).sum((1, 2, 3))[:, None, None] + x,
            ),
        ],
    )
    def test_queries(self, shape, use):
        assert role_of(Compared(shape, use)) is Role.QUERY

    @pytest.mark.parametrize(
        ("shape", "use"),
        [
            ((T, D), lambda x, q, k, p: attend(q @ k.mT + q @ p.t(), x)),
            ((T, D), lambda x, q, k, p: attend((q @ k.mT + skewed(q @ p.t())) / D**0.5, x)),
            ((T, D), lambda x, q, k, p: attend(q @ p.t() + q @ k.mT * 0.5, x)),
            (
                (T, D // 2),
                lambda x, q, k, p: (
                    attend(heads(q) @ heads(k).mT + heads(q) @ p.t(), heads(x)).transpose(1, 2).flatten(2)
                ),
            ),
        ],
    )
    def test_relative_positions(self, shape, use):
        assert role_of(Compared(shape, use)) is Role.POSITION

    @pytest.mark.parametrize(
        ("shape", "use"),
        [
            ((D, D), lambda x, q, k, p: (k @ p).softmax(-1)),
            ((D, D), lambda x, q, k, p: F.relu(k) @ p),
            ((D, D), lambda x, q, k, p: attend((q @ p) @ k.mT, x)),
            ((D, 1), lambda x, q, k, p: (k @ p).softmax(1) * x),
            ((D, D), lambda x, q, k, p: (F.relu(k) @ p).softmax(1)),
        ],
    )
    def test_maps(self, shape, use):
        model = Compared(shape, use)
        assert explain_param_groups(model, 0.1, example_inputs=X).decision("p").decays


def test_a_map_per_feature():
    class Tokenizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.c = nn.Parameter(torch.rand(D, 4)), nn.Parameter(torch.rand(D, 4))
            self.after = nn.Linear(4, 4)

        def forward(self, x):
            return self.after(x[..., None] * self.p + self.c)

    report = explain_param_groups(Tokenizer(), 0.1, example_inputs=X)
    assert report.decision("p").role is Role.MATRIX
    assert "a map per feature" in report["p"]
    assert not report.decision("c").decays


class Rows(nn.Module):
    """`tokens` is a name for rows; here it may be the matrix of a layer."""

    def __init__(self, use):
        super().__init__()
        self.tokens, self.c = nn.Parameter(torch.rand(T, D)), nn.Parameter(torch.rand(T))
        self.before, self.after = nn.Linear(D, D), nn.Linear(T, D)
        self.use = use

    def forward(self, x):
        return self.after(self.use(F.relu(self.before(x)), self.tokens, self.c))


@pytest.mark.parametrize(
    ("use", "decays"),
    [
        (lambda x, p, c: F.linear(x, p, c), True),
        (lambda x, p, c: x @ p.t() + c, True),
        (lambda x, p, c: F.gelu(x @ p.t()), True),
        (lambda x, p, c: (x @ p.t()).softmax(-1), False),
    ],
)
def test_names_of_rows_on_the_matrix_of_a_layer(use, decays):
    assert explain_param_groups(Rows(use), 0.1, example_inputs=X).decision("tokens").decays is decays


class Mixture(nn.Module):
    def __init__(self, mix, n=3):
        super().__init__()
        self.before, self.choose, self.mix = nn.Linear(D, D), nn.Linear(D, n), mix
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(n))
        self.w = nn.Parameter(torch.rand(n, D, D))
        self.after = nn.Linear(D, D)

    def forward(self, x):
        x = F.relu(self.before(x))
        return self.after(self.mix(x, self.choose(x), self.experts, self.w))


def loop(x, logits, experts, w):
    share = logits.softmax(-1)
    return sum(share[..., i, None] * expert(x) for i, expert in enumerate(experts))


def stacked(x, logits, experts, w):
    return (logits.softmax(-1)[..., None] * torch.stack([e(x) for e in experts], -2)).sum(-2)


def batched(x, logits, experts, w):
    return torch.einsum("bte,ebtd->btd", logits.softmax(-1), torch.einsum("btd,edf->ebtf", x, w))


def picked(x, logits, experts, w):
    best = logits.softmax(-1).argmax(-1)
    return sum((best == i)[..., None] * expert(x) for i, expert in enumerate(experts))


def one_hot(x, logits, experts, w):
    mask = F.one_hot(logits.argmax(-1), 3)
    return torch.einsum("bte,ebtd->btd", mask.to(x), torch.einsum("btd,edf->ebtf", x, w))


def picked_matrices(x, logits, experts, w):
    return torch.einsum("btd,btdf->btf", x, w[logits.argmax(-1)])


def glu(x, logits, experts, w):
    return experts[0](x).softmax(-1) * experts[1](x)


def pooled(x, logits, experts, w):
    return (logits.softmax(-1).mT @ x).sum(1, keepdim=True) + experts[1](x)


@pytest.mark.parametrize("mix", [loop, stacked, batched, picked, one_hot, picked_matrices])
def test_routers(mix):
    assert role_of(Mixture(mix), name="choose.weight") is Role.ROUTER


def codes(x, logits, experts, w):
    one_hot = torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    return one_hot @ w[0, :3] + experts[1](x)


def confident(x, logits, experts, w):
    return torch.where(logits.amax(-1, keepdim=True) > 0, x, experts[1](x))


@pytest.mark.parametrize("mix", [glu, pooled, codes, confident])
def test_neither_softmax_nor_a_choice_alone_makes_a_router(mix):
    roles = {d.role for d in explain_param_groups(Mixture(mix), example_inputs=X).decisions}
    assert Role.ROUTER not in roles


class TwoInputs(nn.Module):
    """Data, more data with a layer of its own, a condition that every block reads, a number per sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.time = nn.Linear(D, D), nn.Linear(4, D), nn.Linear(1, D)
        self.blocks = nn.ModuleList(nn.Linear(3, D) for _ in range(2))
        self.after = nn.Linear(D, D)

    def forward(self, x, wave, condition, time):
        x = F.relu(self.a(x) + self.b(wave) + self.time(time[:, None, None]))
        for block in self.blocks:
            x = F.relu(x + block(condition))
        return self.after(x)


def test_the_first_map_on_every_input():
    report = explain_param_groups(
        TwoInputs(), example_inputs=(X, *(torch.zeros(B, T, n) for n in (4, 3)), torch.zeros(B))
    )
    roles = {d.name: d.role for d in report.decisions}
    assert roles["a.weight"] is Role.INPUT
    assert roles["b.weight"] is Role.INPUT
    assert roles["time.weight"] is Role.MATRIX
    assert roles["blocks.0.weight"] is roles["blocks.1.weight"] is Role.MATRIX
