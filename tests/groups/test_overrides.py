"""Selectors, settings and precedence of overrides and knobs."""

import re

import pytest
import torch
from torch import nn

from fused_adamw.groups import ParamGroupWarning, Role, build_param_groups, explain_param_groups

from .helpers import decays
from .models import GPT2, RMSNorm, on_meta


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2), RMSNorm(2)))


def options(groups, name):
    (group,) = [group for group in groups if name in group["param_names"]]
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


class TestSelectors:
    def test_glob(self, model):
        groups = build_param_groups(model, 0.1, overrides={"2.*.weight": False})
        assert [n for n, d in decays(groups).items() if d] == ["0.weight"]

    def test_regex_is_searched(self, model):
        groups = build_param_groups(model, 0.1, overrides={re.compile(r"bias$"): True})
        assert {n for n, d in decays(groups).items() if d} == {
            "0.weight",
            "2.0.weight",
            "0.bias",
            "1.bias",
            "2.0.bias",
        }

    def test_module_type_covers_what_is_below_it(self, model):
        groups = build_param_groups(model, 0.1, overrides={nn.LayerNorm: True})
        assert {n for n, d in decays(groups).items() if d} == {"0.weight", "1.weight", "1.bias", "2.0.weight"}

        class Head(nn.Sequential):
            pass

        model.append(Head(nn.Linear(2, 2)))
        assert not decays(build_param_groups(model, 0.1, overrides={Head: 0.0}))["3.0.weight"]

    def test_module_type_reaches_through_parametrizations(self):
        model = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
        assert not any(decays(build_param_groups(model, 0.1, overrides={nn.Linear: False})).values())

    def test_predicate(self, model):
        groups = build_param_groups(model, 0.1, overrides=[(lambda name, p: p.ndim == 1, True)])
        assert set(decays(groups).values()) == {True}

    def test_module_instance_covers_what_is_below_it(self, model):
        assert not any(decays(build_param_groups(model, 0.1, overrides={model: False})).values())
        groups = build_param_groups(
            model, 0.1, overrides={model[2]: False, model[2][0]: {"weight_decay": 0.3}}
        )
        assert options(groups, "0.weight") == {"weight_decay": 0.1}
        assert options(groups, "2.0.bias") == {"weight_decay": 0.3}
        assert options(groups, "2.1.weight") == {"weight_decay": 0.0}
        report = explain_param_groups(model, overrides={model[2][1]: True})
        assert (
            report["2.1.weight"]
            == "2.1.weight decays (0.01): override 'this RMSNorm' sets weight_decay=True."
        )

    def test_module_instance_reaches_shared_and_parametrized_tensors(self):
        model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        model["head"].weight = model["embed"].weight
        assert decays(build_param_groups(model, overrides={model["head"]: True})) == {"embed.weight": True}
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        assert not any(decays(build_param_groups(layer, overrides={layer: False})).values())
        wrapped = torch.compile(model)
        assert decays(build_param_groups(wrapped, overrides={wrapped: True})) == {"embed.weight": True}

    def test_module_of_another_model_matches_nothing(self, model):
        with pytest.raises(ValueError, match="override 'this Linear' matches no parameter"):
            build_param_groups(model, overrides={nn.Linear(2, 2): False})

    def test_alias_matches(self):
        groups = build_param_groups(on_meta(GPT2, layers=1), 0.1, overrides={"lm_head.weight": 0.05})
        assert options(groups, "transformer.wte.weight") == {"weight_decay": 0.05}


class TestSettings:
    def test_number_is_the_decay(self, model):
        groups = build_param_groups(model, 0.1, overrides={"0.weight": 0.3, "1.weight": 0.2})
        assert [group["weight_decay"] for group in groups] == [0.3, 0.2, 0.1, 0.0]

    def test_bool_is_the_default_decay_or_none(self, model):
        groups = build_param_groups(model, 0.1, overrides={"0.weight": False, "0.bias": True})
        assert (decays(groups)["0.weight"], decays(groups)["0.bias"]) == (False, True)
        assert len(groups) == 2

    def test_scale_multiplies_what_is_there(self, model):
        groups = build_param_groups(model, 0.1, overrides={"*": {"weight_decay_scale": 0.5}})
        assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
        assert not decays(groups)["1.weight"]

    def test_any_group_option(self, model):
        groups = build_param_groups(model, 0.1, overrides={"0.*": {"betas": (0.5, 0.9), "lr": 0.7}})
        assert options(groups, "0.weight") == {"weight_decay": 0.1, "betas": (0.5, 0.9), "lr": 0.7}
        assert options(groups, "0.bias") == {"weight_decay": 0.0, "betas": (0.5, 0.9), "lr": 0.7}
        assert options(groups, "2.0.weight") == {"weight_decay": 0.1}
        torch.optim.AdamW(groups)

    def test_lr_scale_writes_lr_to_every_group(self, model):
        groups = build_param_groups(model, 0.1, overrides={"2.*": {"lr_scale": 0.1}}, lr=0.5)
        assert options(groups, "0.weight") == {"weight_decay": 0.1, "lr": 0.5}
        assert options(groups, "2.0.weight") == {"weight_decay": 0.1, "lr": 0.05}
        assert options(groups, "2.1.weight") == {"weight_decay": 0.0, "lr": 0.05}

    def test_lr_alone_adds_no_key(self, model):
        assert all("lr" not in group for group in build_param_groups(model, 0.1, lr=0.5))

    def test_tensor_lr(self, model):
        groups = build_param_groups(model, 0.1, overrides={"2.*": {"lr_scale": 0.5}}, lr=torch.tensor(0.5))
        lrs = [group["lr"] for group in groups]
        assert sorted(map(float, lrs)) == [0.25, 0.25, 0.5, 0.5]
        assert len({id(lr) for lr in lrs}) == 4  # schedulers write into them

    def test_equal_options_share_a_group(self, model):
        overrides = {"0.weight": {"betas": [0.5, 0.9]}, "2.0.weight": {"betas": [0.5, 0.9]}}
        groups = build_param_groups(model, 0.1, overrides=overrides)
        assert groups[0]["param_names"] == ["0.weight", "2.0.weight"]


class TestPrecedence:
    def test_later_overrides_win_option_by_option(self, model):
        overrides = [("*", {"weight_decay": 0.5, "betas": (0.1, 0.2)}), ("0.*", 0.0), ("0.weight", 0.3)]
        groups = build_param_groups(model, 0.1, overrides=overrides)
        assert options(groups, "0.weight") == {"weight_decay": 0.3, "betas": (0.1, 0.2)}
        assert options(groups, "0.bias") == {"weight_decay": 0.0, "betas": (0.1, 0.2)}
        assert options(groups, "1.bias") == {"weight_decay": 0.5, "betas": (0.1, 0.2)}

    def test_a_later_absolute_decay_forgets_an_earlier_scale(self, model):
        overrides = [("0.weight", {"weight_decay_scale": 0.5}), ("0.weight", 0.2)]
        assert options(build_param_groups(model, 0.1, overrides=overrides), "0.weight") == {
            "weight_decay": 0.2
        }
        assert options(build_param_groups(model, 0.1, overrides=overrides[::-1]), "0.weight") == {
            "weight_decay": 0.1
        }

    def test_override_over_mark_over_role_over_policy(self, model):
        model[0].weight._no_weight_decay = True
        roles = {"matrix": True}
        assert not decays(build_param_groups(model, 0.1, roles=roles))["0.weight"]
        assert decays(build_param_groups(model, 0.1, roles=roles, overrides={"0.weight": True}))["0.weight"]
        assert not decays(build_param_groups(model, 0.1, roles={"matrix": False}))["2.0.weight"]

    def test_overrides_apply_to_every_policy(self, model):
        for policy in ("huggingface", "timm", "nanogpt", "megatron", "all", "recipe"):
            groups = build_param_groups(model, 0.1, policy=policy, overrides={"0.*": 0.7})
            assert options(groups, "0.bias") == {"weight_decay": 0.7}

    def test_roles_take_the_same_settings(self, model):
        roles = {Role.NORM: 0.02, "bias": {"weight_decay_scale": 2.0}, "matrix": {"betas": (0.1, 0.2)}}
        groups = build_param_groups(model, 0.1, roles=roles)
        assert options(groups, "1.weight") == {"weight_decay": 0.02}
        assert options(groups, "1.bias") == {"weight_decay": 0.0}
        assert options(groups, "0.weight") == {"weight_decay": 0.1, "betas": (0.1, 0.2)}

    def test_the_report_names_the_override(self, model):
        report = explain_param_groups(model, 0.1, overrides={"0.*": 0.5, "1.*": {"lr_scale": 0.1}}, lr=1.0)
        assert report["0.bias"] == "0.bias decays (0.5): override '0.*' sets weight_decay=0.5."
        assert report.decision("0.bias").rule == "override"
        assert report["1.weight"] == (
            "1.weight does not decay: 1 is a LayerNorm; decay would pull a norm's gain to zero, not to one; "
            "override '1.*' sets lr_scale=0.1; its learning rate is scaled by 0.1."
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("selector", "hint"),
        [
            ("transformer.wte.wieght", "'transformer.wte.weight'"),
            ("*.ln_f.weigth", "'transformer.ln_f.weight'"),
            ("*.wtee.*", "'transformer.wte.weight'"),
            ("wpe", "'transformer.wpe.weight'"),
            (re.compile(r"\.LN_F\."), "'transformer.ln_f.weight'"),
        ],
    )
    def test_no_match_suggests_close_names(self, selector, hint):
        with pytest.raises(ValueError, match="matches no parameter; did you mean") as error:
            build_param_groups(on_meta(GPT2, layers=1), overrides={selector: False})
        assert hint in str(error.value)

    def test_no_match_without_anything_close(self, model):
        with pytest.raises(
            ValueError, match=r"override 'zzzz' matches no parameter; names look like '0.weight'"
        ):
            build_param_groups(model, overrides={"zzzz": False})

    def test_type_that_is_not_there(self, model):
        message = (
            "override 'Conv2d' matches no parameter; the modules that own parameters are: LayerNorm, Linear"
        )
        with pytest.raises(ValueError, match=message):
            build_param_groups(model, overrides={nn.Conv2d: False})

    def test_predicate_without_match(self, model):
        with pytest.raises(ValueError, match="override '<lambda>' matches no parameter"):
            build_param_groups(model, overrides=[(lambda name, p: False, 0.0)])

    def test_only_frozen_warns(self, model):
        model[0].requires_grad_(False)
        with pytest.warns(ParamGroupWarning, match=r"'0.\*' matches only frozen parameters, e.g. '0.weight'"):
            build_param_groups(model, overrides={"0.*": 0.0})

    @pytest.mark.parametrize(
        ("overrides", "error", "message"),
        [
            (
                {3: 0.0},
                TypeError,
                "override 3: expected a glob, a compiled regular expression, a module type or instance, or a",
            ),
            (["0.weight"], TypeError, r"override '0.weight': expected a pair \(selector, setting\)"),
            ({"*": "no"}, TypeError, "expected a bool, a weight decay or a mapping of options, got 'no'"),
            (
                {"*": -1.0},
                ValueError,
                r"override '\*': weight_decay: expected a finite number >= 0, got -1.0",
            ),
            (
                {"*": {"lr_scale": float("nan")}},
                ValueError,
                "lr_scale: expected a finite number >= 0, got nan",
            ),
            ({"*": {"params": []}}, ValueError, "'params' is written by the builder and cannot be set"),
            ({"*": {"lr_scale": 0.1}}, ValueError, "scale a learning rate; expected lr=, got None"),
        ],
    )
    def test_bad_overrides(self, model, overrides, error, message):
        with pytest.raises(error, match=message):
            build_param_groups(model, overrides=overrides)
