"""Random module trees: nothing is lost, nothing is twice, and no policy or wrapper changes that."""

import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fused_adamw.groups import (
    POLICIES,
    build_param_groups,
    get_optimizer_grouped_parameters,
    new_param_groups,
)

from .helpers import assert_partition, decays
from .models import RMSNorm

# Leaf -> does its weight decay. Names are drawn at random, and must not matter for modules we know.
LEAVES = {
    "linear": (lambda: nn.Linear(2, 3), True),
    "conv": (lambda: nn.Conv2d(2, 2, 1), True),
    "layer_norm": (lambda: nn.LayerNorm(2), False),
    "batch_norm": (lambda: nn.BatchNorm1d(2), False),
    "rms_norm": (lambda: RMSNorm(2), False),
    "embedding": (lambda: nn.Embedding(3, 2), False),
    "prelu": (lambda: nn.PReLU(), False),
    "relu": (lambda: nn.ReLU(), None),
}
NAMES = st.sampled_from(
    [
        "a",
        "norm",
        "bias",
        "embed",
        "ln_1",
        "layernorm",
        "module",
        "weight_head",
        "unbiased",
        "gamma",
        "wte",
        "pos_embed",
    ]
)


@st.composite
def leaf(draw):
    kind = draw(st.sampled_from(sorted(LEAVES)))
    module = LEAVES[kind][0]()
    module.expected = LEAVES[kind][1]
    if draw(st.booleans()):
        module.requires_grad_(False)
    return module


@st.composite
def branch(draw, children):
    modules = draw(st.lists(st.tuples(NAMES, children), max_size=4))
    parent = nn.Module()
    for name, module in modules:
        parent.add_module(name, module)
    if modules and draw(st.booleans()):  # the same module at two places
        parent.add_module("shared", modules[0][1])
    if draw(st.booleans()):
        parent.register_parameter("layer_gamma", nn.Parameter(torch.ones(2)))
    return parent


TREES = st.recursive(leaf(), branch, max_leaves=12)
# A floor under every tree, so that there is always something to train.
MODELS = TREES.map(lambda tree: nn.ModuleDict({"tree": tree, "last": nn.Linear(2, 2)}))


@settings(max_examples=60, deadline=None)
@given(MODELS, st.sampled_from(sorted(POLICIES)), st.sampled_from([0.0, 0.1]))
def test_partition(model, policy, weight_decay):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = build_param_groups(model, weight_decay, policy=policy)
    assert_partition(model, groups)
    assert all(group["params"] for group in groups)
    assert_partition(model, get_optimizer_grouped_parameters(model, weight_decay))
    torch.optim.AdamW(groups)
    order = [name for name, _ in model.named_parameters()]
    for group in groups:
        assert [order.index(name) for name in group["param_names"]] == sorted(
            map(order.index, group["param_names"])
        )


@settings(max_examples=60, deadline=None)
@given(MODELS)
def test_known_modules_decide_whatever_their_names(model):
    answers = decays(build_param_groups(model, 0.1))
    for name, module in model.named_modules():
        expected = getattr(module, "expected", None)
        if expected is not None and module.weight.requires_grad:
            assert answers[f"{name}.weight"] is expected
            assert not answers.get(f"{name}.bias", False)


@settings(max_examples=30, deadline=None)
@given(MODELS)
def test_unfreezing_completes_the_partition(model):
    groups = build_param_groups(model, 0.1)
    model.requires_grad_(True)
    added = new_param_groups(model, groups, 0.1)
    assert_partition(model, [*groups, *added])
    assert decays([*groups, *added]) == decays(build_param_groups(model, 0.1))
