"""What low precision does to AdamW's updates, on gradients that part good formats from bad ones."""

from dataclasses import dataclass, field

import pytest
import torch

from fused_adamw.formats import FORMATS, Field
from fused_adamw.tables import Hyper

from .training import MOMENTS, shadow, step_fields

ROOT = ("root_signed", "root_unsigned")
BFLOAT16 = ("bfloat16", "bfloat16_stochastic")
OUTLIER = slice(1, None)  # all columns but the one with the outlier
EIGHT = slice(0, 8)


def fall_after(t0):
    """Gradients fall tenfold."""
    return lambda g, t: g * (0.1 if t > t0 else 1.0)


def outlier(factor):
    """One column is larger."""
    return lambda g, t: torch.cat([g[:, :1] * factor, g[:, 1:]], 1)


def rarely_active(seed=5):
    """Each of eight columns has a gradient in 2 % of the steps."""
    rng = torch.Generator().manual_seed(seed)

    def gradient(g, t):
        return torch.cat([g[:, EIGHT] * (torch.rand(8, generator=rng) < 0.02), g[:, 8:]], 1)

    return gradient


def dead_after(t0):
    """Eight columns have gradients only at first."""
    return lambda g, t: torch.cat([g[:, EIGHT] * (t <= t0), g[:, 8:]], 1)


@dataclass(frozen=True)
class Setting:
    """How to train, and what is asked of root codes: bounds of the norm of updates, the least cosine."""

    steps: int
    beta2: float
    norm: tuple[float, float]
    cosine: float
    more: dict = field(default_factory=dict)

    def shadow(self, moments):
        return shadow(moments, self.steps, self.beta2, **self.more)


def beside_outlier(factor):
    return {"gradient": outlier(factor), "columns": OUTLIER}


SETTINGS = {
    "steady, .95": Setting(400, 0.95, (0.99, 1.01), 0.997),
    "steady, .999": Setting(1000, 0.999, (0.985, 1.02), 0.992),
    "steady, .9999": Setting(1500, 0.9999, (0.98, 1.02), 0.99),
    "gradients fall": Setting(1500, 0.999, (0.98, 1.02), 0.99, {"gradient": fall_after(375)}),
    "tiny gradients": Setting(500, 0.999, (0.98, 1.02), 0.99, {"scale": 1e-7}),
    "outlier, 1e2": Setting(500, 0.999, (0.97, 1.03), 0.98, beside_outlier(1e2)),
    "outlier, 1e3": Setting(500, 0.999, (0.97, 1.06), 0.96, beside_outlier(1e3)),
    "outlier, 1e4": Setting(500, 0.999, (0.97, 1.15), 0.92, beside_outlier(1e4)),
}
LONG = [pytest.param(k, marks=pytest.mark.slow) if s.steps > 500 else k for k, s in SETTINGS.items()]


@pytest.mark.parametrize("setting", LONG)
def test_root_codes_give_the_updates_of_float32(setting):
    setting = SETTINGS[setting]
    result = setting.shadow(ROOT)
    assert setting.norm[0] < result.norm < setting.norm[1]
    assert result.cosine > setting.cosine
    assert result.largest[0] < 3 * result.largest[1]


@pytest.mark.parametrize("setting", LONG)
def test_stochastic_bfloat16_gives_the_updates_of_float32(setting):
    result = SETTINGS[setting].shadow(BFLOAT16)
    assert 0.99 < result.norm < 1.01
    assert result.cosine > 0.999


@pytest.mark.parametrize(("moments", "norm"), [(ROOT, (0.97, 1.04)), (BFLOAT16, (0.99, 1.01))])
def test_inputs_that_are_rarely_active_are_learned_from(moments, norm):
    result = shadow(moments, steps=800, beta2=0.999, gradient=rarely_active(), columns=EIGHT)
    assert norm[0] < result.norm < norm[1]
    assert result.cosine > 0.985


@pytest.mark.parametrize("beta2", [pytest.param(0.95, marks=pytest.mark.slow), 0.98])
def test_weights_without_a_gradient_come_to_rest(beta2):
    """Their signed codes reach 0, and stay there while the others of the block go on."""
    moving = []

    def watch(fields, t):
        moving.append(fields["exp_avg"].values[:, EIGHT].any())

    shadow(ROOT, steps=1600, beta2=beta2, gradient=dead_after(400), watch=watch)
    assert len(moving) == 800
    assert not torch.stack(moving).any()


@pytest.mark.slow
def test_second_moments_of_root_codes_are_near_those_of_float32():
    result = shadow(ROOT, steps=1000, beta2=0.999)
    ratio = (result.exact_v / result.fields["exp_avg_sq"].load()).sqrt().flatten()
    low, middle, high = ratio.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
    assert low > 0.75
    assert 0.97 < middle < 1.03
    assert high < 1.35


@pytest.mark.slow
def test_rounding_to_nearest_would_show():
    """The measures tell bad schemes from good ones: why second moments and signed codes take noise."""
    nearest = ("bfloat16", "bfloat16")
    assert not 0.99 < SETTINGS["steady, .9999"].shadow(nearest).norm < 1.01
    assert SETTINGS["gradients fall"].shadow(nearest).norm < 0.8
    rare = shadow(ROOT, 800, 0.999, gradient=rarely_active(), columns=EIGHT, nearest=["exp_avg_sq"])
    assert rare.norm < 0.8
    dead = shadow(ROOT, steps=1600, beta2=0.98, gradient=dead_after(400), nearest=["exp_avg"])
    assert dead.fields["exp_avg"].values[:, EIGHT].any()


@pytest.mark.parametrize("moments", [ROOT, BFLOAT16])
def test_every_state_survives_a_checkpoint(moments):
    """Decoding and encoding to nearest gives the same bits, after any step."""

    def watch(fields, t):
        for kept in (fields[name] for name in MOMENTS):
            again = kept.format.encode(kept.as_torch(), kept.values)
            assert again.values.equal(kept.values)
            assert kept.side is None or again.side.equal(kept.side)

    shadow(moments, steps=120, beta2=0.999, gradient=outlier(1e3), watch=watch)


# ---- Parameters


def train(param, moments, steps, lr, after=lambda p, t: None, seed=0):
    """Step a parameter, a `Field`, on gradients that depend on the step alone."""
    zero = torch.zeros(24, 40)
    fields = {"param": param}
    fields |= {k: FORMATS[name].zeros(zero) for k, name in zip(MOMENTS, moments, strict=True)}
    rng = torch.Generator().manual_seed(seed)
    for t in range(1, steps + 1):
        grad = torch.randn(zero.shape, generator=rng).bfloat16()
        step_fields(fields, grad, t, Hyper(lr, 0.9, 0.999, 1e-8, 0.01, False))
        after(fields, t)
    return fields


def start():
    return (0.05 * torch.randn(24, 40, generator=torch.Generator().manual_seed(1))).bfloat16()


def to_bfloat16_ties_away(x):
    """float32 rounded to bfloat16, ties away from zero."""
    return ((x.view(torch.int32) + 0x8000) >> 16 << 16).view(torch.float32).bfloat16()


@pytest.mark.parametrize("moments", [("float32", "float32"), ROOT, BFLOAT16])
@pytest.mark.parametrize("lr", [1e-3, pytest.param(1e-7, marks=pytest.mark.slow)])
def test_split_parameters_train_as_float32_ones_bit_for_bit(lr, moments):
    """200 steps; the bfloat16 values are at every step those of the float32 weight, rounded."""
    split = FORMATS["bfloat16_split"]
    path = []
    exact = Field(FORMATS["float32"], start().float())
    train(exact, moments, 200, lr, lambda fields, t: path.append(fields["param"].values.clone()))

    def compare(fields, t):
        p = fields["param"]
        assert p.load().equal(path[t - 1])
        assert p.values.equal(to_bfloat16_ties_away(path[t - 1]))

    p = start()
    train(Field(split, p, split.new_side(p)), moments, 200, lr, compare)


def test_stochastic_parameters_move_as_far_as_float32_ones():
    """At a learning rate where nearest rounding makes a small part of the way, they make all of it."""
    moved = {}
    for name in ("float32", "bfloat16", "bfloat16_stochastic"):
        format = FORMATS[name]
        p = start().to(format.dtype)
        rng = torch.Generator().manual_seed(2)
        drift = torch.randn(24, 40, generator=rng).sign()
        fields = {"param": Field(format, p), **{k: FORMATS["float32"].zeros(p.float()) for k in MOMENTS}}
        for t in range(1, 401):
            step_fields(fields, drift, t, Hyper(2e-6, 0.9, 0.999, 1e-8, 0.0, False))
        moved[name] = (fields["param"].load() - start().float()) * -drift
    share = {name: float(m.mean() / moved["float32"].mean()) for name, m in moved.items()}
    assert 0.9 < share["bfloat16_stochastic"] < 1.1
    assert share["bfloat16"] < 0.5


def test_a_step_with_the_same_noise_gives_the_same_bits():
    """And another seed gives others."""
    runs = []
    for seed in (0, 0, 1):
        fields = {"param": Field(FORMATS["bfloat16_stochastic"], start())}
        fields |= {k: FORMATS[name].zeros(start()) for k, name in zip(MOMENTS, ROOT, strict=True)}
        for t in range(1, 5):
            step_fields(fields, torch.ones(24, 40), t, Hyper(1e-3, 0.9, 0.999, 1e-8, 0.0, False), seed=seed)
        runs.append([t for field in fields.values() for t in field[1:] if t is not None])
    assert all(a.equal(b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(a.equal(b) for a, b in zip(runs[0], runs[2], strict=True))
