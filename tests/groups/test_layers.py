"""Layer-wise learning-rate decay: depths by hand, and against timm."""

import pytest
import torch
from torch import nn

from fused_adamw.groups import build_param_groups, explain_param_groups

from .helpers import assert_partition
from .models import GPT2, on_meta

pytestmark = pytest.mark.filterwarnings("ignore:not recognised")


def scales(model, **kwargs):
    return {d.name: d.lr_scale for d in explain_param_groups(model, 0.1, lr=1.0, **kwargs).decisions}


def layers(model):
    return {d.name: d.layer for d in explain_param_groups(model, 0.1, lr=1.0, layer_decay=0.5).decisions}


def block():
    return nn.Sequential(nn.Linear(2, 2, bias=False))


class ViT(nn.Module):
    """The parts that BEiT's rule names."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.patch_embed = nn.Conv2d(3, 2, 4, bias=False)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 4, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 2))  # registered last, still at the bottom


def test_beits_rule():
    assert layers(ViT()) == {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed.weight": 0,
        "blocks.0.0.weight": 1,
        "blocks.1.0.weight": 2,
        "blocks.2.0.weight": 3,
        "norm.weight": 4,
        "norm.bias": 4,
        "head.weight": 4,
    }
    assert scales(ViT(), layer_decay=0.5)["cls_token"] == 0.5**4
    assert scales(ViT(), layer_decay=0.5)["head.weight"] == 1


def test_groups_are_merged_by_equal_options():
    groups = build_param_groups(ViT(), 0.1, layer_decay=0.5, lr=0.8)
    assert [(g["weight_decay"], g["lr"], g["param_names"]) for g in groups] == [
        (0.1, 0.8 * 0.5**4, ["patch_embed.weight"]),
        (0.1, 0.8 * 0.5**3, ["blocks.0.0.weight"]),
        (0.1, 0.8 * 0.5**2, ["blocks.1.0.weight"]),
        (0.1, 0.8 * 0.5, ["blocks.2.0.weight"]),
        (0.1, 0.8, ["head.weight"]),
        (0.0, 0.8 * 0.5**4, ["cls_token", "pos_embed"]),
        (0.0, 0.8, ["norm.weight", "norm.bias"]),
    ]
    assert all(set(group) == {"params", "param_names", "weight_decay", "lr"} for group in groups)
    torch.optim.AdamW(groups)


def test_gpt2():
    model = on_meta(GPT2)
    depths = layers(model)
    assert depths["transformer.wte.weight"] == depths["transformer.wpe.weight"] == 0
    assert [depths[f"transformer.h.{i}.ln_1.weight"] for i in range(12)] == list(range(1, 13))
    assert depths["transformer.ln_f.weight"] == 13
    groups = build_param_groups(model, 0.1, layer_decay=0.75, lr=1.0)
    assert len(groups) == 26  # 12 blocks x 2, embeddings, ln_f
    assert_partition(model, groups)


def test_two_stacks_count_on():
    class EncoderDecoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Embedding(4, 2)
            self.encoder = nn.ModuleList([block(), block()])
            self.between = nn.LayerNorm(2)
            self.decoder = nn.ModuleList([block(), block()])
            self.head = nn.Linear(2, 2)

    depths = layers(EncoderDecoder())
    assert [depths[f"{part}.{i}.0.weight"] for part in ("encoder", "decoder") for i in (0, 1)] == [1, 2, 3, 4]
    assert (depths["shared.weight"], depths["between.weight"], depths["head.weight"]) == (0, 2, 5)


def test_experts_are_not_layers():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(block() for _ in range(4))

    depths = layers(nn.ModuleList([Layer(), Layer()]))
    assert set(depths.values()) == {1, 2}


def test_wrapping_changes_nothing():
    model = ViT()
    model.blocks[1] = torch.compile(model.blocks[1])
    assert layers(model) == layers(ViT())
    assert layers(torch.compile(ViT())) == layers(ViT())


def test_group_matcher_of_the_model_wins():
    class Matched(ViT):
        def group_matcher(self, coarse=False):
            assert not coarse
            return {
                "stem": r"^cls_token|pos_embed|patch_embed",
                "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
            }

    depths = layers(Matched())
    assert depths == layers(ViT()) | {"norm.weight": 3, "norm.bias": 3}  # with the block before
    assert layers(torch.compile(Matched())) == depths


def test_frozen_layers_keep_their_depth():
    model = ViT()
    model.blocks[0].requires_grad_(False)
    assert layers(model)["blocks.1.0.weight"] == 2


def test_scales_multiply():
    got = scales(ViT(), layer_decay=0.5, overrides={"blocks.2.*": {"lr_scale": 0.1}, "norm.*": {"lr": 0.3}})
    assert got["blocks.2.0.weight"] == pytest.approx(0.05)
    groups = build_param_groups(ViT(), layer_decay=0.5, lr=1.0, overrides={"blocks.0.*": {"lr": 0.3}})
    assert [g["lr"] for g in groups if g["param_names"] == ["blocks.0.0.weight"]] == [0.3]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layer_decay": 0.5}, "layer_decay scales a learning rate; expected lr=, got None"),
        ({"layer_decay": 0.0, "lr": 1.0}, r"layer_decay: expected a factor in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.5, "lr": 1.0}, r"layer_decay: expected a factor in \(0, 1\], got 1.5"),
        ({"layer_decay": -1.0, "lr": 1.0}, "layer_decay: expected a finite number >= 0, got -1.0"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_param_groups(ViT(), **kwargs)


def test_no_layers():
    with pytest.raises(
        ValueError, match=r"layer_decay needs layers: expected a model with a group_matcher\(\)"
    ):
        build_param_groups(nn.Linear(2, 2), layer_decay=0.5, lr=1.0)


TIMM_MODELS = [
    "vit_tiny_patch16_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "resnet50",
    "efficientnet_b0",
    "xcit_nano_12_p16_224",
    "dm_nfnet_f0",
    "levit_128s",
    "cait_xxs24_224",
    "maxvit_tiny_tf_224",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_same_scales_as_timm(timm, name):
    from timm.optim import param_groups_layer_decay

    model = on_meta(timm.create_model, name)
    theirs = {
        id(param): group["lr_scale"]
        for group in param_groups_layer_decay(model, 0.05, layer_decay=0.75)
        for param in group["params"]
    }
    report = explain_param_groups(model, 0.05, layer_decay=0.75, lr=1.0)
    assert {id(d.param): d.lr_scale for d in report.decisions} == pytest.approx(theirs)


@pytest.mark.slow
def test_same_scales_as_beit(timm):
    """`get_num_layer_for_vit` of microsoft/unilm, in our words, on a BEiT without its group_matcher."""
    model = on_meta(timm.create_model, "beit_base_patch16_224")
    type(model).group_matcher, kept = None, type(model).group_matcher
    try:
        got = layers(model)
    finally:
        type(model).group_matcher = kept

    def beit(name):
        if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else 13

    assert got == {name: beit(name) for name, _ in model.named_parameters()}
