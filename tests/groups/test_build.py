"""The functions most users call: counts of known models, the shape of the groups, every refusal."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from fused_adamw.groups import (
    ParamGroupWarning,
    build_param_groups,
    get_optimizer_grouped_parameters,
    new_param_groups,
    summarize_param_groups,
)

from .helpers import assert_partition, counts, decays
from .models import GPT2, ResNet50, RMSNorm, on_meta


@pytest.fixture(scope="module")
def gpt2():
    return on_meta(GPT2)


class TestGPT2Small:
    def test_the_model_is_gpt2_small(self, gpt2):
        parameters = list(gpt2.parameters())
        assert len(parameters) == 148
        assert sum(p.numel() for p in parameters) == 124_439_808

    def test_default(self, gpt2):
        groups = build_param_groups(gpt2, 0.1)
        assert counts(groups) == ((48, 100), (84_934_656, 39_505_152))
        assert_partition(gpt2, groups)

    def test_wte_decaying(self, gpt2):
        for kwargs in ({"roles": {"tied_embedding": True}}, {"overrides": {"transformer.wte.weight": True}}):
            groups = build_param_groups(gpt2, 0.1, **kwargs)
            assert counts(groups) == ((49, 99), (123_532_032, 907_776))

    def test_recipe(self, gpt2):
        groups = get_optimizer_grouped_parameters(gpt2, 0.1)
        assert counts(groups) == ((50, 98), (124_318_464, 121_344))
        assert_partition(gpt2, groups)

    def test_named_parameters(self, gpt2):
        decision = decays(build_param_groups(gpt2, 0.1))
        assert decision["transformer.h.0.attn.c_attn.weight"]
        assert decision["transformer.h.11.mlp.c_proj.weight"]
        for name in ("ln_f.weight", "ln_f.bias", "h.0.ln_1.weight", "h.0.attn.c_attn.bias", "wte.weight"):
            assert not decision["transformer." + name]
        assert "lm_head.weight" not in decision  # tied: it is transformer.wte.weight

    def test_summary(self, gpt2):
        groups = build_param_groups(gpt2, 0.1)
        assert summarize_param_groups(groups) == "decay: 48 params, no_decay: 100 params"

    def test_real_training_step_uses_the_groups(self):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2))
        weight, gain = model[0].weight.detach().clone(), model[1].weight.detach().clone()
        optimizer = torch.optim.AdamW(build_param_groups(model, 0.5), lr=0.1)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        torch.testing.assert_close(model[0].weight, weight * (1 - 0.1 * 0.5))
        torch.testing.assert_close(model[1].weight, gain, rtol=0, atol=0)


def test_resnet50_decays_54_of_161():
    model = on_meta(ResNet50)
    for build in (build_param_groups, get_optimizer_grouped_parameters):
        groups = build(model, 0.1)
        assert counts(groups)[0] == (54, 107)  # 53 convolutions and fc; 53 norms x 2 and fc.bias
        assert_partition(model, groups)
        decision = decays(groups)
        assert decision["layer1.0.downsample.0.weight"]
        assert not decision["layer1.0.downsample.1.weight"]
        assert not decision["bn1.weight"]


class TestTwoGroupFunction:
    """What projects usually test of such a function."""

    def test_mlp(self):
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        for build in (build_param_groups, get_optimizer_grouped_parameters):
            groups = build(model, weight_decay=0.01)
            assert len(groups) == 2
            assert groups[0]["weight_decay"] == 0.01
            assert groups[1]["weight_decay"] == 0.0
            assert len(groups[0]["params"]) == 2
            assert len(groups[1]["params"]) == 4

    def test_lone_linear_loses_nothing(self):
        model = nn.Linear(4, 4)
        for build in (build_param_groups, get_optimizer_grouped_parameters):
            groups = build(model, 0.01)
            assert [group["param_names"] for group in groups] == [["weight"], ["bias"]]

    def test_recipe_always_has_two_groups(self):
        groups = get_optimizer_grouped_parameters(nn.LayerNorm(4), 0.01)
        assert [len(group["params"]) for group in groups] == [0, 2]
        torch.optim.AdamW(groups)

    def test_recipe_lets_embeddings_positions_and_tokens_decay(self):
        class ViT(nn.Module):
            def __init__(self):
                super().__init__()
                self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
                self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
                self.embed = nn.Embedding(3, 4)
                self.norm = RMSNorm(4)

        decision = decays(get_optimizer_grouped_parameters(ViT(), 0.1))
        assert decision == {"cls_token": True, "pos_embed": True, "embed.weight": True, "norm.weight": False}
        assert not any(decays(build_param_groups(ViT(), 0.1)).values())

    def test_no_weight_decay_key_lost_when_decay_is_zero(self):
        model = nn.Linear(2, 2)
        assert [g["weight_decay"] for g in build_param_groups(model, 0.0)] == [0.0, 0.0]


class TestShapeOfTheGroups:
    def test_keys(self):
        for group in build_param_groups(nn.Linear(2, 2), 0.1):
            assert set(group) == {"params", "param_names", "weight_decay"}

    def test_no_empty_group(self):
        assert len(build_param_groups(nn.LayerNorm(4), 0.1)) == 1
        assert len(build_param_groups(nn.Linear(4, 4, bias=False), 0.1)) == 1

    def test_shape_does_not_depend_on_the_value_of_weight_decay(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        names = [[g["param_names"] for g in build_param_groups(model, decay)] for decay in (0.0, 0.1)]
        assert names[0] == names[1]

    def test_order_is_that_of_named_parameters_and_stable(self, gpt2):
        groups = build_param_groups(gpt2, 0.1)
        order = [name for name, _ in gpt2.named_parameters()]
        for group in groups:
            assert group["param_names"] == sorted(group["param_names"], key=order.index)
        again = build_param_groups(copy.deepcopy(gpt2), 0.1)
        assert [g["param_names"] for g in groups] == [g["param_names"] for g in again]

    def test_names_survive_torchs_state_dict(self):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(build_param_groups(model, 0.1))
        names = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
        assert names == [["weight"], ["bias"]]

    def test_defaults(self):
        assert [g["weight_decay"] for g in build_param_groups(nn.Linear(2, 2))] == [0.01, 0.0]
        assert [g["weight_decay"] for g in get_optimizer_grouped_parameters(nn.Linear(2, 2))] == [0.01, 0.0]


class TestFrozenAndTied:
    def test_frozen_are_absent(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        names = [name for g in build_param_groups(model, 0.1) for name in g["param_names"]]
        assert names == ["1.weight", "1.bias"]

    def test_unfreezing_uses_the_same_policy(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        model[1].requires_grad_(False)
        optimizer = torch.optim.AdamW(build_param_groups(model, 0.1))
        assert new_param_groups(model, optimizer.param_groups, 0.1) == []
        model.requires_grad_(True)
        for group in (added := new_param_groups(model, optimizer.param_groups, 0.1)):
            optimizer.add_param_group(group)
        assert decays(added) == {"0.weight": True, "0.bias": False, "1.weight": False, "1.bias": False}
        assert_partition(model, optimizer.param_groups)
        assert new_param_groups(model, optimizer.param_groups, 0.1) == []

    def test_unfreezing_compares_identity_not_values(self):
        model = nn.Sequential(nn.LayerNorm(2), nn.LayerNorm(2))  # equal values
        optimizer = torch.optim.AdamW(build_param_groups(model[0], 0.1))
        (added,) = new_param_groups(model, optimizer.param_groups, 0.1)
        assert added["param_names"] == ["1.weight", "1.bias"]

    def test_unfreezing_with_nothing_trainable(self):
        assert new_param_groups(nn.Linear(2, 2).requires_grad_(False), []) == []

    def test_a_group_may_be_a_single_tensor(self):
        model = nn.Linear(3, 2)
        groups = [{"params": model.weight}]
        assert summarize_param_groups(groups) == "decay: 1 params, no_decay: 0 params"
        (added,) = new_param_groups(model, groups, 0.1)
        assert added["param_names"] == ["bias"]

    def test_shared_module_counts_once(self):
        shared = nn.Linear(2, 2)
        groups = build_param_groups(nn.Sequential(shared, nn.ReLU(), shared), 0.1)
        assert [g["param_names"] for g in groups] == [["0.weight"], ["0.bias"]]

    def test_module_that_contains_itself(self):
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].add_module("parent", model)
        assert counts(build_param_groups(model, 0.1))[0] == (1, 1)


class FakeQuantized(nn.Parameter):
    """Stands for a quantized tensor that says it is trainable; torch refuses the honest way."""

    requires_grad = True


class FlatParameter(nn.Parameter):
    """Has the name of FSDP1's class, which cannot be built without a process group."""


def _with(param):
    model = nn.Module()
    model.block = nn.Linear(2, 2)
    model.block.extra = param
    return model


class TestRefusals:
    def test_not_a_module(self):
        message = re.escape("expected a torch.nn.Module, got list")
        with pytest.raises(TypeError, match=message):
            build_param_groups([torch.zeros(2)])

    def test_empty_model(self):
        with pytest.raises(ValueError, match="ReLU has no parameters; expected a model with at least one"):
            build_param_groups(nn.ReLU())

    def test_all_frozen(self):
        model = nn.Linear(2, 2).requires_grad_(False)
        message = r"all 2 parameters of Linear are frozen \(the first is 'weight'\); expected at least one"
        for build in (build_param_groups, get_optimizer_grouped_parameters):
            with pytest.raises(ValueError, match=message):
                build(model)

    def test_trainable_integers(self):
        model = _with(FakeQuantized(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
        message = r"'block.extra' requires a gradient but has dtype torch.uint8; expected a floating-point or"
        with pytest.raises(TypeError, match=message):
            build_param_groups(model)

    def test_frozen_integers_are_skipped(self):
        model = _with(nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
        assert counts(build_param_groups(model, 0.1))[0] == (1, 1)

    def test_complex_is_allowed(self):
        model = nn.Linear(2, 2, dtype=torch.complex64)
        assert decays(build_param_groups(model, 0.1)) == {"weight": True, "bias": False}

    @pytest.mark.parametrize("frozen", [False, True])
    def test_flat_parameter(self, frozen):
        model = _with(FlatParameter(torch.zeros(8), requires_grad=not frozen))
        with pytest.raises(ValueError, match=r"'block.extra' is an FSDP FlatParameter.*use_orig_params=True"):
            build_param_groups(model)

    def test_lazy_parameter(self):
        with pytest.raises(ValueError, match=r"'0.weight' is lazy and has no shape yet.*one forward pass"):
            build_param_groups(nn.Sequential(nn.LazyLinear(2)))

    def test_lazy_parameter_after_a_forward_pass(self):
        model = nn.Sequential(nn.LazyLinear(2))
        model(torch.zeros(1, 3))
        assert decays(build_param_groups(model, 0.1)) == {"0.weight": True, "0.bias": False}

    @pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
    def test_weight_decay_out_of_range(self, value):
        with pytest.raises(ValueError, match=r"weight_decay: expected a finite number >= 0, got"):
            build_param_groups(nn.Linear(2, 2), value)

    def test_weight_decay_of_a_wrong_type(self):
        with pytest.raises(TypeError, match=r"weight_decay: expected a number, got '0.1'"):
            build_param_groups(nn.Linear(2, 2), "0.1")

    def test_unknown_policy(self):
        with pytest.raises(
            ValueError, match=r"unknown policy 'best'; expected one of: hygiene, recipe, hugg"
        ):
            build_param_groups(nn.Linear(2, 2), policy="best")

    def test_unknown_role(self):
        with pytest.raises(ValueError, match=r"unknown role 'embeddings'; expected one of: matrix, convol"):
            build_param_groups(nn.Linear(2, 2), roles={"embeddings": True})

    def test_roles_with_a_copied_policy(self):
        with pytest.raises(
            ValueError, match="policy 'timm' copies the rule of another tool and knows no roles"
        ):
            build_param_groups(nn.Linear(2, 2), policy="timm", roles={"norm": True})

    def test_nothing_changes_on_refusal(self):
        model = nn.Linear(2, 2)
        with pytest.raises(ValueError, match="matches no parameter"):
            build_param_groups(model, overrides={"nothing": 0.0})
        assert all(param.requires_grad for param in model.parameters())


def test_no_warning_for_ordinary_models(gpt2):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParamGroupWarning)
        build_param_groups(gpt2)
        build_param_groups(on_meta(ResNet50))
