"""Which parameters go to Muon: answers written from the models' sources, and small modules for each rule."""

import fnmatch
import warnings

import pytest
import torch
from torch import nn

from fused_adamw import split_for_muon
from fused_adamw.cli.targets import load_target
from fused_adamw.groups import MuonHint, ParamGroupWarning

from .helpers import assert_partition

# Target -> globs of what has two dimensions or more and goes to Muon, for Keller Jordan's; the rest does not.
HIDDEN = {
    "transformers:gpt2": "*.attn.c_*.weight *.mlp.c_*.weight",
    "transformers:llama": "*_proj.weight",
    "transformers:mixtral": "*_proj.weight *.experts.gate_up_proj *.experts.down_proj",
    "transformers:gpt_oss": "*_proj.weight *.experts.gate_up_proj *.experts.down_proj",
    "transformers:mamba": "*.in_proj.weight *.x_proj.weight *.dt_proj.weight *.out_proj.weight",
    "transformers:whisper": "*_proj.weight *.fc?.weight",
    "timm:vit_base_patch16_224": "blocks.*.attn.*.weight blocks.*.mlp.*.weight",
    "timm:resnet50": "layer*.conv?.weight layer*.downsample.0.weight",
    "timm:convnext_tiny": "*.mlp.fc?.weight *.downsample.1.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("target", HIDDEN)
def test_models(target, timm, transformers):
    model = load_target(target)
    split = split_for_muon(model, for_="keller", convolutions="flatten")
    globs = HIDDEN[target].split()
    expected = {
        name
        for name, p in model.named_parameters()
        if p.dim() > 1 and any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    }
    assert set(split.hints) == expected


@pytest.mark.slow
def test_lora(peft, transformers):
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), peft.LoraConfig(r=2))
    with pytest.warns(ParamGroupWarning, match="low-rank factors"):
        split = split_for_muon(model)
    assert not split.muon
    split = split_for_muon(model, overrides={"*lora_*": {"muon": True}})
    assert not split.adamw
    assert all("lora" in name for name in split.hints)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.rand(3, 8, 20))
        self.down_proj = nn.Parameter(torch.rand(3, 10, 8))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.qkv = nn.MultiheadAttention(8, 2), nn.Linear(8, 16)
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 2
        self.router, self.experts, self.one = nn.Linear(8, 3), Experts(), nn.Linear(8, 1)
        self.lstm, self.norm = nn.LSTM(8, 8), nn.LayerNorm(8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv, self.depthwise = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.channels = nn.Conv2d(8, 16, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 5)


def split_of(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return split_for_muon(model, **options)


class TestRules:
    def test_every_parameter_is_in_one_part(self):
        for options in ({}, {"for_": "dion", "convolutions": "flatten"}, {"for_": "timm"}):
            model = Net()
            model.head.bias.requires_grad_(False)
            split = split_of(model, **options)
            assert_partition(model, [*split.muon, *split.adamw])
            assert set(split.hints) == {name for group in split.muon for name in group["param_names"]}
            assert set(split.reasons) == set(split.decisions)

    def test_what_stays_with_adamw(self):
        reasons = split_of(Net(), for_="dion", convolutions="flatten").reasons
        for name, why in {
            "stem.weight": "first map",
            "depthwise.weight": "depthwise",
            "channels.weight": "depthwise",
            "head.weight": "last map",
            "blocks.0.router.weight": "router",
            "blocks.0.one.weight": "no matrix",
            "blocks.0.norm.weight": "norm",
            "head.bias": "bias",
        }.items():
            assert why in reasons[name]

    def test_hints(self):
        hints = split_of(Net(), for_="dion", convolutions="flatten").hints
        assert hints["conv.weight"] == MuonHint(8, 72, is_flattened=True)
        assert hints["up.weight"] == MuonHint(6, 32, is_transposed=True, is_flattened=True)
        assert hints["blocks.1.attn.in_proj_weight"] == MuonHint(24, 8, splits=(8, 8, 8))
        assert hints["blocks.1.attn.out_proj.weight"] == MuonHint(8, 8)
        assert hints["blocks.1.qkv.weight"] == MuonHint(16, 8, splits=(8, 4, 4))
        assert hints["blocks.1.lstm.weight_hh_l0"] == MuonHint(32, 8, splits=(8,) * 4)
        assert hints["blocks.1.experts.gate_up_proj"] == MuonHint(20, 8, 3, True, (10, 10))
        assert hints["blocks.1.experts.down_proj"] == MuonHint(8, 10, 3, True)

    def test_hints_by_class(self):
        """Halves that alternate are not cut; keys and values of a cross attention are two."""

        class GptOssExperts(Experts):
            pass

        class Conv1D(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.rand(8, 16))

        model = nn.Sequential(nn.Linear(8, 8), GptOssExperts(), nn.Module(), nn.Linear(8, 8))
        model[2].c_attn = Conv1D()
        hints = split_of(model, for_="dion").hints
        assert hints["1.gate_up_proj"] == MuonHint(20, 8, 3, True)
        assert hints["2.c_attn.weight"] == MuonHint(16, 8, is_transposed=True, splits=(8, 8))

    def test_stacks_and_convolutions_depend_on_the_implementation(self):
        stack, conv = "blocks.0.experts.down_proj", "conv.weight"
        for for_, takes_stack in {"torch": False, "timm": False, "dion": True, "keller": True}.items():
            assert (stack in split_of(Net(), for_=for_).hints) is takes_stack
        for for_ in ("timm", "dion", "keller"):
            assert conv in split_of(Net(), for_=for_, convolutions="flatten").hints
            assert conv not in split_of(Net(), for_=for_).hints
        model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
        assert "1.weight" in split_of(model, for_="dion", convolutions="flatten").hints
        assert "1.weight" not in split_of(model, for_="keller", convolutions="flatten").hints

    def test_keys_for_optimizers_that_take_both_parts(self):
        dion = split_of(Net(), for_="dion", convolutions="flatten")
        assert {(g["algorithm"], g.get("flatten")) for g in dion.muon} == {("muon", None), ("muon", True)}
        assert {g["algorithm"] for g in dion.adamw} == {"adamw"}
        timm = split_of(Net(), for_="timm")
        assert all(g["use_fallback"] for g in timm.adamw)
        keller = split_of(Net(), for_="keller")
        assert {tuple(g) for g in (*keller.muon, *keller.adamw)} == {("params", "weight_decay", "use_muon")}
        assert {tuple(g) for g in split_of(Net()).muon} == {("params", "param_names", "weight_decay")}

    def test_decay(self):
        split = split_of(Net(), weight_decay=0.3)
        assert {g["weight_decay"] for g in split.muon} == {0.3}
        assert {g["weight_decay"] for g in split.adamw} == {0.3, 0.0}


class TestOverrides:
    def test_both_ways(self):
        overrides = {"head.weight": {"muon": True}, "*.qkv.weight": {"muon": False, "weight_decay": 0.5}}
        split = split_of(Net(), overrides=overrides)
        assert "head.weight" in split.hints
        assert split.reasons["blocks.0.qkv.weight"] == "an override says so"
        (group,) = [g for g in split.adamw if "blocks.0.qkv.weight" in g["param_names"]]
        assert group["weight_decay"] == 0.5
        assert not any("muon" in g for g in (*split.muon, *split.adamw))

    @pytest.mark.parametrize("name", ["blocks.0.norm.weight", "blocks.0.experts.down_proj", "conv.weight"])
    def test_what_muon_cannot_take(self, name):
        with pytest.raises(ValueError, match=f"sends '{name}' to Muon, but "):
            split_of(Net(), overrides={name: {"muon": True}})


class TestWarnings:
    def test_unknown(self):
        model = Net()
        model.something = nn.Parameter(torch.rand(8, 8))
        with pytest.warns(ParamGroupWarning, match=r"override \{'muon': True\} sends it to Muon: something"):
            split = split_for_muon(model)
        assert "something" not in split.hints
        assert "something" in split_of(model, overrides={"something": {"muon": True}}).hints

    def test_few_values(self):
        with pytest.warns(
            ParamGroupWarning, match="only .*go to Muon; most others: torch.optim.Muon takes no"
        ):
            split_for_muon(nn.Sequential(nn.Linear(2, 2), *(Experts() for _ in range(3)), nn.Linear(8, 8)))
        layers = [nn.Linear(8, 8, bias=False) for _ in range(6)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            split_for_muon(nn.Sequential(nn.Embedding(999, 8), *layers, nn.Linear(8, 999, bias=False)))

    def test_log(self, caplog):
        with caplog.at_level("INFO", logger="fused_adamw"):
            split = split_of(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))))
        assert (
            caplog.messages == [f"[Muon Groups] {split}"] == ["[Muon Groups] muon: 2 params, adamw: 6 params"]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"for_": "jax"}, "for_='jax': expected one of torch, dion, timm, keller"),
        ({"convolutions": "skip"}, "convolutions='skip': expected 'adamw' or 'flatten'"),
        ({"convolutions": "flatten"}, "torch.optim.Muon takes matrices only"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        split_for_muon(Net(), **options)


def test_by_use():
    """What the forward pass shows: a last map with no telling name or place."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.mid = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.mid(self.first(x).relu()).relu())

    split = split_of(Model(), example_inputs=torch.zeros(2, 8))
    assert set(split.hints) == {"mid.weight"}
