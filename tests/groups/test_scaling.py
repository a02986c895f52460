"""Learning rates by role and by width."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_adamw import FusedHygieneAdamW, WidthScale, build_param_groups, explain_param_groups
from fused_adamw.groups import Role


class Net(nn.Module):
    def __init__(self, width, tied=False):
        super().__init__()
        self.tokens = nn.Embedding(9, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 9, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


class Convolutional(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7)
        self.conv, self.up = nn.Conv2d(width, 2 * width, 3), nn.ConvTranspose2d(2 * width, width, 2)
        self.depthwise, self.last = nn.Conv2d(width, width, 3, groups=width), nn.Conv2d(width, 5, 1)


def options(groups):
    """Name -> (lr, weight decay)."""
    return {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["param_names"]}


class TestByRole:
    def test_factors(self):
        factors = {"embedding": 0.2, Role.NORM: 3, "matrix": 0.5, "output": 0.1}
        found = options(build_param_groups(Net(4), 0.1, lr=1.0, lr_by_role=factors))
        assert found["tokens.weight"] == (0.2, 0.0)
        assert found["blocks.0.0.weight"] == (3.0, 0.0)
        assert found["blocks.1.2.weight"] == (0.5, 0.1)
        assert found["head.weight"] == (0.1, 0.1)
        assert found["blocks.0.1.bias"] == (1.0, 0.0)

    def test_outputs_follow_matrices_unless_told(self):
        found = options(build_param_groups(Net(4), lr=1.0, lr_by_role={"matrix": 0.5}))
        assert found["head.weight"][0] == 0.5

    def test_it_says_nothing_about_decay(self):
        groups = build_param_groups(Net(4), 0.1, lr=1.0, roles={"matrix": False}, lr_by_role={"output": 0.5})
        assert options(groups)["head.weight"] == (0.5, 0.0)

    def test_it_multiplies_with_other_scales(self):
        groups = build_param_groups(
            Net(4),
            lr=1.0,
            layer_decay=0.5,
            lr_by_role={"embedding": 0.1, "output": 0.1},
            overrides={"tokens.*": {"lr_scale": 3}, "head.*": {"lr": 7.0}},
        )
        assert options(groups)["tokens.weight"][0] == pytest.approx(0.5**3 * 0.1 * 3)
        assert options(groups)["head.weight"][0] == 7.0

    def test_nanochat(self):
        groups = build_param_groups(Net(192), 0.1, lr=1e-3, lr_by_role="nanochat")
        by_name = {n: g for g in groups for n in g["param_names"]}
        for name, lr in {"tokens.weight": 0.4, "head.weight": 0.008}.items():
            assert by_name[name]["lr"] == pytest.approx(lr)
            assert (by_name[name]["betas"], by_name[name]["eps"]) == ((0.8, 0.95), 1e-10)
        assert "betas" not in by_name["blocks.0.1.weight"]
        FusedHygieneAdamW(groups, lr=1e-3)

    def test_overrides_beat_a_preset(self):
        overrides = {"tokens.*": {"betas": (0.9, 0.99), "lr": 1.0}}
        groups = build_param_groups(Net(192), lr=1e-3, lr_by_role="nanochat", overrides=overrides)
        (tokens,) = [g for g in groups if "tokens.weight" in g["param_names"]]
        assert (tokens["betas"], tokens["lr"], tokens["eps"]) == ((0.9, 0.99), 1.0, 1e-10)

    @pytest.mark.parametrize(
        ("asked", "error", "message"),
        [
            ({"embeding": 1.0}, ValueError, "unknown role 'embeding'"),
            ({"embedding": -1.0}, ValueError, r"lr_by_role\[embedding\]"),
            ({"embedding": "x"}, TypeError, r"lr_by_role\[embedding\]"),
            ("modded", ValueError, "expected a mapping, or one of nanochat"),
            ([1], TypeError, "expected a mapping of roles to factors"),
        ],
    )
    def test_refusals(self, asked, error, message):
        with pytest.raises(error, match=message):
            build_param_groups(Net(4), lr=1.0, lr_by_role=asked)

    def test_lr_is_needed(self):
        with pytest.raises(ValueError, match="lr_by_role scales a learning rate; expected lr=, got None"):
            build_param_groups(Net(4), lr_by_role={"embedding": 0.1})
        with pytest.raises(ValueError, match="token embedding; found none"):
            build_param_groups(nn.Linear(2, 2), lr_by_role="nanochat")


class TestByWidth:
    def test_hidden_maps_and_outputs(self):
        found = options(build_param_groups(Net(32), 0.1, lr=1.0, width=WidthScale(Net(8))))
        for name in ("blocks.0.1.weight", "blocks.1.2.weight", "head.weight"):
            assert found[name] == pytest.approx((0.25, 0.4))
        for name in ("tokens.weight", "blocks.0.0.weight", "blocks.0.1.bias"):
            assert found[name] == (1.0, 0.0)

    def test_convolutions(self):
        found = options(
            build_param_groups(Convolutional(16), 0.1, lr=1.0, width=WidthScale(Convolutional(8)))
        )
        for name in ("conv.weight", "up.weight", "last.weight"):
            assert found[name] == pytest.approx((0.5, 0.2))
        for name in ("stem.weight", "depthwise.weight", "conv.bias"):
            assert found[name][0] == 1.0

    def test_fan_ins_of_convolutions(self):
        """Over all places of a kernel; a transposed one has its inputs first; the first map is not scaled."""
        model = Convolutional(16)
        fan_in = {"conv.weight": 16 * 9, "up.weight": 32 * 4, "depthwise.weight": 9, "last.weight": 16}
        assert explain_param_groups(model, lr=1.0, width=WidthScale(fan_in)).multipliers == {}
        groups = build_param_groups(model, lr=1.0, width=WidthScale(fan_in))
        assert all("lr" not in group for group in groups)
        half = {"stem.weight": 1, **{name: n / 2 for name, n in fan_in.items()}}
        found = options(build_param_groups(model, lr=1.0, width=WidthScale(half)))
        assert {name for name, (lr, _) in found.items() if lr == 0.5} == set(fan_in)
        assert found["stem.weight"][0] == 1.0

    def test_a_base_of_numbers_is_that_of_a_model(self):
        numbers = {name: p.shape[-1] for name, p in Net(8).named_parameters() if p.dim() > 1}
        with torch.device("meta"):
            base = Net(8)
        model = Net(24)
        expected = options(build_param_groups(model, lr=1.0, width=WidthScale(base)))
        assert options(build_param_groups(model, lr=1.0, width=WidthScale(numbers))) == expected
        width = WidthScale(base)
        for made in (copy.deepcopy(width), pickle.loads(pickle.dumps(width))):
            assert options(build_param_groups(model, lr=1.0, width=made)) == expected

    def test_wrappers_change_nothing(self):
        model = Net(24)
        expected = options(build_param_groups(model, lr=1.0, width=WidthScale(Net(8))))
        wrapped = torch.compile(model)
        assert (
            options(build_param_groups(wrapped, lr=1.0, width=WidthScale(torch.compile(Net(8))))) == expected
        )

    def test_multipliers(self):
        report = explain_param_groups(Net(32), 0.1, lr=1.0, width=WidthScale(Net(8), output="multiplier"))
        assert report.multipliers == {"head.weight": 0.25}
        assert report.decision("head.weight").lr_scale == 1.0
        assert "4 × as wide: multiply its result by 0.25" in report["head.weight"]
        assert "4 × as wide: lr / 4, weight decay × 4" in report["blocks.0.1.weight"]
        (head,) = [p for p in report.to_dict()["parameters"] if p["name"] == "head.weight"]
        assert head["multiplier"] == 0.25

    @pytest.mark.parametrize("output", ["lr", "multiplier"])
    def test_a_tied_head_takes_a_multiplier(self, output):
        width = WidthScale(Net(8, tied=True), output=output)
        report = explain_param_groups(Net(32, tied=True), 0.1, lr=1.0, width=width)
        assert report.multipliers == {"tokens.weight": 0.25}

    def test_eps(self):
        groups = build_param_groups(Net(32), 0.1, lr=1.0, width=WidthScale(Net(8), eps=1e-8))
        eps = {n: g.get("eps") for g in groups for n in g["param_names"]}
        assert eps["blocks.0.1.weight"] == pytest.approx(2.5e-9)
        assert eps["tokens.weight"] is None

    def test_what_was_asked_for_by_hand_stands(self):
        overrides = {"blocks.0.1.weight": {"lr": 0.7}, "blocks.0.2.weight": 0.3}
        found = options(
            build_param_groups(Net(32), 0.1, lr=1.0, width=WidthScale(Net(8)), overrides=overrides)
        )
        assert found["blocks.0.1.weight"][0] == 0.7
        assert found["blocks.0.2.weight"] == pytest.approx((0.25, 0.3))

    def test_the_same_width_changes_nothing(self):
        plain, same = (build_param_groups(Net(8), lr=1.0, **o) for o in ({}, {"width": WidthScale(Net(8))}))
        assert [g["param_names"] for g in plain] == [g["param_names"] for g in same]
        assert all("lr" not in g for g in same)
        report = explain_param_groups(Net(8), lr=1.0, width=WidthScale(Net(8)))
        assert "as wide" not in report["blocks.0.1.weight"]

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: WidthScale(3), TypeError, "base must be a model or a mapping of fan-ins, got 3"),
            (lambda: WidthScale({"a": 0}), ValueError, "fan-in of a must be > 0"),
            (lambda: WidthScale({"a": "x"}), TypeError, "fan-in of a"),
            (lambda: WidthScale({}, output="both"), ValueError, "output must be 'lr' or 'multiplier'"),
            (lambda: WidthScale({}, eps="x"), TypeError, "eps"),
        ],
    )
    def test_refusals(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_refusals_of_groups(self):
        with pytest.raises(ValueError, match=r"the base has no fan-in of 'blocks.0.1.weight'"):
            build_param_groups(Net(8), lr=1.0, width=WidthScale({"head.weight": 4}))
        with pytest.raises(TypeError, match="width: expected a WidthScale, got int"):
            build_param_groups(Net(8), lr=1.0, width=4)
        with pytest.raises(ValueError, match="width scales a learning rate"):
            build_param_groups(Net(8), width=WidthScale(Net(4)))
