"""Policies copied from other tools, against the tools themselves."""

import re

import pytest
import torch
from torch import nn

from fused_adamw.groups import (
    POLICIES,
    build_param_groups,
    explain_param_groups,
    get_optimizer_grouped_parameters,
)

from .helpers import assert_partition, counts, decays
from .models import GPT2, ResNet50, on_meta


def answers(model, policy):
    return decays(build_param_groups(model, 0.1, policy=policy))


class TestCountsOfGPT2Small:
    """Values from the rules applied by hand: 50 matrices and tables, 98 vectors."""

    @pytest.mark.parametrize(
        ("policy", "tensors"),
        [
            ("hygiene", (48, 100)),
            ("recipe", (50, 98)),
            ("huggingface", (50, 98)),
            ("timm", (50, 98)),
            ("nanogpt", (50, 98)),
            ("megatron", (50, 98)),
            ("all", (148, 0)),
        ],
    )
    def test_counts(self, policy, tensors):
        model = on_meta(GPT2)
        groups = build_param_groups(model, 0.1, policy=policy)
        assert counts(groups)[0] == tensors
        assert_partition(model, groups)


class Odd(nn.Module):
    """Parameters on which the rules differ."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Sequential(nn.Linear(2, 2))
        self.bn = nn.BatchNorm1d(2)
        self.gain = nn.Parameter(torch.ones(2, 1, 1))
        self.scalar = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.ones(2, 2))
        self.pos_embed = nn.Parameter(torch.ones(1, 2, 2))

    def no_weight_decay(self):
        return {"pos_*"}


# name: (hygiene, recipe, huggingface, timm, nanogpt, megatron)
ODD = {
    "gain": (False, True, True, True, True, True),
    "scalar": (False, True, True, False, False, True),  # Megatron exempts one dimension, not none
    "bias": (False, False, False, True, True, True),  # "bias" is not "*.bias"
    "pos_embed": (False, True, True, False, True, True),
    "norm.0.weight": (True, True, False, True, True, True),
    "norm.0.bias": (False, False, False, False, False, False),
    "bn.weight": (False, False, True, False, False, False),
    "bn.bias": (False, False, False, False, False, False),
}


@pytest.mark.filterwarnings("ignore:not recognised")
@pytest.mark.parametrize(
    ("column", "policy"), list(enumerate(["hygiene", "recipe", "huggingface", "timm", "nanogpt", "megatron"]))
)
def test_odd_model(column, policy):
    assert answers(Odd(), policy) == {name: row[column] for name, row in ODD.items()}


def test_recipe_policy_is_the_recipe_function():
    for model in (on_meta(GPT2), on_meta(ResNet50)):
        groups = get_optimizer_grouped_parameters(model, 0.1)
        assert decays(groups) == answers(model, "recipe")


def test_a_model_that_is_a_layer_norm():
    assert answers(nn.LayerNorm(2), "huggingface") == {"weight": True, "bias": False}


def test_the_report_names_the_rule():
    report = explain_param_groups(Odd(), policy="huggingface")
    assert report["norm.0.weight"] == (
        r"norm.0.weight does not decay: huggingface: its name matches '(?:^|\\.)norm(?:$|\\.)'."
    )
    assert {policy.name: policy.source for policy in POLICIES.values()}["timm"] == (
        "timm.optim.param_groups_weight_decay"
    )


# The functions below are the rules as their projects publish them, in our words, where no package exists.


def nanogpt_reference(model):
    return {name: param.dim() >= 2 for name, param in model.named_parameters() if param.requires_grad}


def megatron_reference(model):
    def exempt(name, param):
        return re.fullmatch(r".*\.bias", name) or len(param.shape) == 1

    return {name: not exempt(name, param) for name, param in model.named_parameters() if param.requires_grad}


TIMM_MODELS = [
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "convnextv2_atto",
    "dm_nfnet_f0",
    "xcit_nano_12_p16_224",
    "edgenext_xx_small",
    "beit_base_patch16_224",
    "levit_128s",
    "resnet18",
    "resmlp_12_224",
    "samvit_base_patch16",
    "crossvit_tiny_240",
    "botnet26t_256",
]
HF_MODELS = [
    "bert",
    "gpt2",
    "t5",
    "llama",
    "mamba",
    "xlnet",
    "imagegpt",
    "swin",
    "convnextv2",
    "qwen2_5_vl",
    "rwkv",
]


@pytest.mark.slow
class TestAgainstTheLibraries:
    @pytest.mark.parametrize("name", TIMM_MODELS)
    def test_timm(self, timm, name):
        from timm.optim import param_groups_weight_decay

        model = on_meta(timm.create_model, name)
        listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed)
        self.compare(model, theirs, "timm")

    @pytest.mark.parametrize("name", HF_MODELS)
    def test_huggingface(self, transformers, name):
        model = transformers_model(transformers, name)
        # The method uses nothing of the trainer.
        wanted = transformers.Trainer.get_decay_parameter_names(None, model)
        theirs = [
            {"params": [p for n, p in model.named_parameters() if n in wanted], "weight_decay": 0.1},
            {"params": [p for n, p in model.named_parameters() if n not in wanted], "weight_decay": 0.0},
        ]
        self.compare(model, theirs, "huggingface")
        assert answers(model, "nanogpt") == nanogpt_reference(model)
        assert answers(model, "megatron") == megatron_reference(model)

    @staticmethod
    def compare(model, theirs, policy):
        ours = build_param_groups(model, 0.1, policy=policy)
        expected = {id(p): group["weight_decay"] for group in theirs for p in group["params"]}
        found = {id(p): group["weight_decay"] for group in ours for p in group["params"]}
        assert found == expected


def transformers_model(transformers, name):
    """A model of a type from its default configuration, without memory for its values."""
    config = transformers.AutoConfig.for_model(name)
    for mapping in ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_PRETRAINING_MAPPING", "MODEL_MAPPING"):
        known = getattr(transformers, mapping)
        if type(config) in known:
            return on_meta(known[type(config)], config)
    raise LookupError(name)
