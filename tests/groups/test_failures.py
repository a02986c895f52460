"""The cases on which builders fail, one test per row; answers from the models' authors and papers.

Modules here are written as in the libraries that they are named after, with torch alone, so that these tests
always run. The same parameters inside the real models are in test_architectures.py.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fused_adamw.groups import Role, build_param_groups, explain_param_groups, register_type

from .helpers import decays
from .models import RMSNorm

pytestmark = pytest.mark.filterwarnings("ignore:not recognised", "ignore:`torch.nn.utils.weight_norm`")


def param(*shape):
    return nn.Parameter(torch.ones(shape))


def raw(class_name, **tensors):
    """A module of a class that nobody knows, holding raw parameters; upper-case names stay upper-case."""
    module = type(class_name, (nn.Module,), {})()
    for name, shape in tensors.items():
        module.register_parameter(name, param(*shape))
    return module


def nest(path, module):
    """Hangs a module at a dotted path."""
    root = tip = nn.Module()
    *parents, last = path.split(".")
    for part in parents:
        tip.add_module(part, nn.Module())
        tip = getattr(tip, part)
    tip.add_module(last, module)
    return root


def answers(module, **kwargs):
    return decays(build_param_groups(module, 0.1, **kwargs))


def role(module, name):
    return explain_param_groups(module).decision(name).role


class TestNorms:
    @pytest.mark.parametrize(
        "path", ["transformer.ln_f", "bn1", "downsample.1", "merger.ln_q", "rwkv.ln1", "x"]
    )
    @pytest.mark.parametrize(
        "norm",
        [
            nn.LayerNorm(4),
            nn.RMSNorm(4),
            nn.BatchNorm2d(4),
            nn.SyncBatchNorm(4),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4, affine=True),
            RMSNorm(4),
        ],
        ids=lambda norm: type(norm).__name__,
    )
    def test_norm_without_norm_in_its_name(self, path, norm):
        assert not any(answers(nest(path, norm)).values())

    @pytest.mark.parametrize(
        "name",
        [
            "T5LayerNorm",
            "Qwen2_5_VLRMSNorm",
            "LlamaRMSNorm",
            "RmsNorm",
            "RMSnorm",
            "ScaleNorm",
            "LayerNorm2d",
        ],
    )
    def test_custom_norm_by_structure(self, name):
        model = nest("blocks.0.x", raw(name, weight=(4,), bias=(4,)))
        assert answers(model) == {"blocks.0.x.weight": False, "blocks.0.x.bias": False}
        assert explain_param_groups(model).decision("blocks.0.x.weight").rule == "structure"

    def test_norm_with_non_vector_shape(self):
        assert not any(answers(raw("ConvNextV2GRN", weight=(1, 1, 1, 4), bias=(1, 1, 1, 4))).values())
        assert not any(answers(raw("MyNorm2d", weight=(1, 4, 1, 1))).values())
        assert not any(answers(raw("MultiHeadRMSNorm", gamma=(2, 1, 4))).values())
        assert not any(answers(nn.LayerNorm([3, 4, 5])).values())
        assert not any(answers(raw("Affine", alpha=(1, 1, 4), beta=(1, 1, 4))).values())  # ResMLP

    @pytest.mark.parametrize(
        "path", ["norm.linear", "norm1.linear", "ada_rms_norm.linear1", "input_layernorm.mlp.fc1"]
    )
    def test_linear_inside_a_module_called_norm(self, path):
        expected = {f"{path}.weight": True, f"{path}.bias": False}
        assert answers(nest(path, nn.Linear(4, 4))) == expected

    def test_adaptive_norm_class_that_owns_a_linear(self):
        norm = raw("AdaLayerNormZero")
        norm.linear = nn.Linear(4, 8)
        norm.norm = nn.LayerNorm(4)
        expected = {"linear.weight": True, "linear.bias": False, "norm.weight": False, "norm.bias": False}
        assert answers(norm) == expected

    def test_a_matrix_of_a_norm_with_children_decays(self):
        norm = raw("ConditionalNorm", weight=(4, 4))
        norm.projection = nn.Linear(4, 4)
        assert answers(norm) == {"weight": True, "projection.weight": True, "projection.bias": False}

    def test_fused_norm_and_linear(self):
        fused = raw("LayerNormLinear", layer_norm_weight=(4,), layer_norm_bias=(4,), weight=(8, 4), bias=(8,))
        expected = {"layer_norm_weight": False, "layer_norm_bias": False, "weight": True, "bias": False}
        assert answers(fused) == expected

    def test_a_head_named_after_norm_is_a_matrix(self):
        assert answers(raw("NormHead", weight=(8, 4))) == {"weight": True}
        assert answers(nest("normal_head", nn.Linear(4, 8, bias=False))) == {"normal_head.weight": True}

    def test_zero_centred_norms_are_a_knob(self):
        gemma = nest("layers.0.norm", raw("Gemma2RMSNorm", weight=(4,)))
        assert answers(gemma) == {"layers.0.norm.weight": False}
        assert answers(gemma, roles={"zero_centered_norm": True}) == {"layers.0.norm.weight": True}
        assert answers(gemma, roles={"norm": True}) == {"layers.0.norm.weight": False}
        te = raw("RMSNorm", weight=(4,))
        te.zero_centered_gamma = True
        assert role(te, "weight") is Role.ZERO_CENTERED_NORM


class TestBiases:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("in_proj_bias", (12,)),
            ("q_bias", (4,)),
            ("gate_up_proj_bias", (2, 8)),
            ("r_w_bias", (2, 4)),
            ("pos_bias_u", (2, 4)),
            ("dt_proj_bias", (3, 4)),
            ("dt_projs_bias", (4, 8)),
            ("bias_k", (1, 1, 4)),
            ("logit_bias", ()),
            ("e_score_correction_bias", (4,)),
            ("input_gate_bias", (2, 4)),
        ],
    )
    def test_bias_by_another_name(self, name, shape):
        assert answers(raw("Thing", **{name: shape})) == {name: False}

    def test_torch_modules(self):
        attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
        assert answers(attention) == {
            "q_proj_weight": True,
            "k_proj_weight": True,
            "v_proj_weight": True,
            "in_proj_bias": False,
            "bias_k": False,
            "bias_v": False,
            "out_proj.weight": True,
            "out_proj.bias": False,
        }
        assert answers(nn.MultiheadAttention(4, 2))["in_proj_weight"]
        lstm = answers(nn.LSTM(3, 4, bidirectional=True, proj_size=2))
        assert {n.split("_l0")[0] for n, d in lstm.items() if d} == {"weight_ih", "weight_hh", "weight_hr"}
        assert {n.split("_l0")[0] for n, d in lstm.items() if not d} == {"bias_ih", "bias_hh"}
        assert answers(nn.Bilinear(2, 3, 4)) == {"weight": True, "bias": False}
        transformer = answers(nn.TransformerEncoderLayer(4, 2, 8))
        assert {name for name, d in transformer.items() if d} == {
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        }

    @pytest.mark.parametrize(
        "module",
        [
            nest("kernel_predictor.bias_conv", nn.Conv1d(2, 2, 1, bias=False)),
            nest("unbiased_proj", nn.Linear(2, 2, bias=False)),
            nest("patch_embedding", nn.Conv2d(2, 2, 1, bias=False)),
            nest("input_embedding", nn.Linear(2, 2, bias=False)),
            nest("pos_embed.proj", nn.Conv2d(2, 2, 1, bias=False)),
            nest("class_embed.0", nn.Linear(2, 2, bias=False)),
            nest("time_embedding.linear_1", nn.Linear(2, 2, bias=False)),
            raw("Thing", bias_proj_weight=(3, 4)),
        ],
    )
    def test_weight_with_a_misleading_name(self, module):
        assert set(answers(module).values()) == {True}


class Tied(nn.Module):
    def __init__(self, head_first=False):
        super().__init__()
        if head_first:
            self.head = nn.Linear(4, 8, bias=False)
        self.embed_tokens = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False) if not head_first else self.head
        self.head.weight = self.embed_tokens.weight


class TestEmbeddings:
    @pytest.mark.parametrize("path", ["wte", "embed_tokens", "token_embedding", "shared", "codebook"])
    def test_token_embedding_is_a_knob(self, path):
        for module in (nn.Embedding(8, 4), nn.EmbeddingBag(8, 4)):
            model = nest(path, module)
            name = f"{path}.weight"
            assert answers(model) == {name: False}
            assert answers(model, roles={"embedding": True}) == {name: True}
            assert role(model, name) is Role.EMBEDDING

    @pytest.mark.parametrize("head_first", [False, True])
    def test_tied_head_is_one_decision_with_both_names(self, head_first):
        model = Tied(head_first)
        (group,) = build_param_groups(model, 0.1)
        assert (len(group["params"]), group["weight_decay"]) == (1, 0.0)
        decision = explain_param_groups(model).decision("head.weight")
        assert {decision.name, *decision.aliases} == {"embed_tokens.weight", "head.weight"}
        assert decision.role is Role.TIED_EMBEDDING
        assert set(answers(model, roles={"tied_embedding": True}).values()) == {True}
        assert set(answers(model, roles={"embedding": True}).values()) == {False}

    @pytest.mark.parametrize("name", ["VocabParallelEmbedding", "ParallelEmbedding", "TokenEmbed"])
    def test_embedding_without_torchs_base_class(self, name):
        model = nest("word_embeddings", raw(name, weight=(8, 4)))
        assert role(model, "word_embeddings.weight") is Role.EMBEDDING
        assert not any(answers(model).values())

    def test_linear_layers_without_torchs_base_class(self):
        for name in ("ColumnParallelLinear", "RowParallelLinear", "QuantLinear"):
            assert answers(raw(name, weight=(8, 4), bias=(8,))) == {"weight": True, "bias": False}

    def test_an_embedding_that_is_a_projection(self):
        patch = raw("PatchEmbedding")
        patch.projection = nn.Conv2d(3, 4, 2)
        assert answers(patch)["projection.weight"]

    def test_untied_head_decays(self):
        assert answers(nest("lm_head", nn.Linear(4, 8, bias=False))) == {"lm_head.weight": True}

    @pytest.mark.parametrize(
        "name", ["pos_embed", "pos_embed_0", "patch_pos", "pixel_pos", "position_embeddings"]
    )
    def test_raw_position(self, name):
        model = raw("ViT", **{name: (1, 5, 4)})
        assert answers(model) == {name: False}
        assert role(model, name) is Role.POSITION

    @pytest.mark.parametrize(
        "path", ["wpe", "position_embeddings", "embed_positions", "relative_attention_bias"]
    )
    def test_position_table(self, path):
        model = nest(f"decoder.{path}", nn.Embedding(8, 4))
        assert role(model, f"decoder.{path}.weight") is Role.POSITION
        assert not any(answers(model).values())

    @pytest.mark.parametrize(
        "name",
        [
            "relative_position_bias_table",
            "attention_biases",
            "rel_pos_h",
            "rel_pos_w",
            "height_rel",
            "width_rel",
            "rel_embeddings",
            "emb_rel_k",
        ],
    )
    def test_relative_position(self, name):
        model = raw("Attention", **{name: (7, 4)})
        assert answers(model) == {name: False}
        assert role(model, name) is Role.POSITION

    @pytest.mark.parametrize(
        "path", ["attn.cpb_mlp.0", "rel_pos.mlp.fc1", "pos_block.proj", "pos_conv_embed.conv"]
    )
    def test_position_network_is_a_knob(self, path):
        model = nest(path, nn.Linear(2, 4, bias=False))
        name = f"{path}.weight"
        assert answers(model) == {name: True}
        assert answers(model, roles={"position_network": False}) == {name: False}

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("cls_token", (1, 1, 4)),
            ("dist_token", (1, 1, 4)),
            ("reg_token", (1, 3, 4)),
            ("register_tokens", (1, 3, 4)),
            ("mask_token", (1, 4)),
            ("class_embedding", (4,)),
            ("masked_spec_embed", (4,)),
            ("probe", (1, 1, 4)),
            ("image_newline", (4,)),
            ("mem_k", (2, 3, 4)),
        ],
    )
    def test_tokens(self, name, shape):
        model = raw("ViT", **{name: shape})
        assert answers(model) == {name: False}
        assert role(model, name) is Role.TOKEN

    @pytest.mark.parametrize("name", ["query_tokens", "latents", "latent", "queries", "query"])
    def test_learned_queries_are_a_knob(self, name):
        model = raw("Resampler", **{name: (8, 4)})
        assert answers(model) == {name: False}
        assert answers(model, roles={"query": True}) == {name: True}

    def test_query_tables(self):
        for path in ("query_position_embeddings", "query_embed"):
            assert role(nest(path, nn.Embedding(8, 4)), f"{path}.weight") is Role.QUERY
        assert role(nest("mask_tokens", nn.Embedding(4, 4)), "mask_tokens.weight") is Role.TOKEN

    def test_an_attentions_own_query_matrix(self):
        attention = raw("Attention", query=(4, 4), key=(4, 4), value=(4, 4))
        assert answers(attention)["query"]


class TestGains:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("gamma_1", (4,)),
            ("lambda1", (4,)),
            ("layer_scale", (4, 1, 1)),
            ("ls1", (4,)),
            ("gate_attn", (1,)),
            ("scale", (4,)),
            ("resweight", (1,)),
            ("gamma", (1, 4, 1, 1)),
            ("alpha", (4, 8)),  # EfficientViM: one gate per branch
            ("skipinit_gain", ()),
            ("temperature", (3, 1, 1)),
            ("logit_scale", ()),
            ("logit_scale", (3, 1, 1)),
            ("sinks", (8,)),
        ],
    )
    def test_gains_gates_and_temperatures(self, name, shape):
        assert answers(raw("Block", **{name: shape})) == {name: False}

    def test_layer_scale_modules(self):
        assert not any(answers(raw("LayerScale2d", gamma=(4, 1, 1))).values())
        assert not any(answers(raw("Dinov2LayerScale", lambda1=(4,))).values())

    def test_scaled_standardised_convolution(self):
        class ScaledStdConv2d(nn.Conv2d):
            def __init__(self):
                super().__init__(2, 4, 3)
                self.gain = param(4, 1, 1, 1)

        assert answers(ScaledStdConv2d()) == {"weight": True, "bias": False, "gain": False}

    def test_learnable_activations(self):
        assert answers(nn.PReLU(4)) == {"weight": False}
        assert answers(raw("Snake1d", alpha=(1, 4, 1))) == {"alpha": False}
        assert answers(raw("StarReLU", scale=(1,), bias=(1,))) == {"scale": False, "bias": False}
        for name in ("PReLU", "Snake1d", "SnakeBeta", "StarReLU", "XIELUActivation"):
            assert role(raw(name, alpha=(1, 4, 1)), "alpha") is Role.ACTIVATION
        assert role(raw("StarReLU", bias=(1,)), "bias") is Role.BIAS
        assert role(raw("Contract", alpha=(1,)), "alpha") is Role.GAIN  # ends with "act", is none


class TestRecurrence:
    def test_mamba(self):
        mixer = raw("MambaMixer", A_log=(8, 4), D=(8,), dt_bias=(8,))
        mixer.conv1d = nn.Conv1d(8, 8, 4, groups=8)
        mixer.in_proj = nn.Linear(4, 8, bias=False)
        assert answers(mixer) == {
            "A_log": False,
            "D": False,
            "dt_bias": False,
            "conv1d.weight": True,
            "conv1d.bias": False,
            "in_proj.weight": True,
        }
        assert not answers(mixer, roles={"ssm_convolution": False})["conv1d.weight"]

    def test_other_recurrences(self):
        zamba = raw(
            "ZambaMambaMixer", x_proj_weight=(2, 6, 8), A_log=(2, 8, 4), D=(2, 8), dt_proj_bias=(2, 8)
        )
        assert answers(zamba) == {"x_proj_weight": True, "A_log": False, "D": False, "dt_proj_bias": False}
        vmamba = raw("SS2D", A_logs=(8, 4), Ds=(8,), x_proj_weight=(4, 6, 8))
        assert answers(vmamba) == {"A_logs": False, "Ds": False, "x_proj_weight": True}
        rwkv = raw("RwkvSelfAttention", time_decay=(8,), time_first=(8,), time_mix_key=(1, 1, 8))
        assert not any(answers(rwkv).values())
        assert answers(raw("Rglru", recurrent_param=(8,), recurrent_gate_weight=(2, 4, 4))) == {
            "recurrent_param": False,
            "recurrent_gate_weight": True,
        }
        assert answers(raw("Rwkv6Attention", time_decay=(2, 4), time_maa_w1=(8, 10))) == {
            "time_decay": False,
            "time_maa_w1": True,
        }


class TestMatrices:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("gate_up_proj", (2, 4, 8)),  # experts
            ("weight", (8, 4)),  # a router
            ("q", (8, 2, 4)),  # XLNet
            ("x_proj_weight", (2, 4, 8)),
            ("proj", (8, 4)),  # CLIP
            ("text_projection", (8, 4)),
            ("r_kernel", (8, 2, 4)),
            ("att_src", (1, 2, 4)),  # graph attention
            ("att_src", (1, 1, 4)),  # with one head
            ("root", (4, 4)),
        ],
    )
    def test_raw_matrices(self, name, shape):
        assert answers(raw("Thing", **{name: shape})) == {name: True}

    def test_matrices_with_one_row_or_column(self):
        assert answers(nn.Linear(4, 1)) == {"weight": True, "bias": False}
        assert answers(nn.Linear(1, 4))["weight"]
        assert answers(nest("shared_expert_gate", nn.Linear(4, 1, bias=False))) == {
            "shared_expert_gate.weight": True
        }
        assert answers(nn.Conv1d(1, 1, 1)) == {"weight": True, "bias": False}

    def test_unrecognised_decays_with_low_confidence(self):
        decision = explain_param_groups(raw("Thing", zeta=(3, 4))).decision("zeta")
        assert decision.decays
        assert decision.confidence == "low"
        assert decision.role is Role.UNKNOWN

    def test_unrecognised_vector(self):
        decision = explain_param_groups(raw("Thing", zeta=(3,))).decision("zeta")
        assert not decision.decays
        assert (decision.role, decision.rule) == (Role.VECTOR, "shape")

    def test_holders_are_looked_through(self):
        class Mixer(nn.Module):
            def __init__(self):
                super().__init__()
                self.gates = nn.ParameterList([param(4), param(4)])
                self.projections = nn.ParameterDict({"proj_a": param(4, 4)})
                self.pos_embed = nn.ParameterList([param(2, 4)])

        expected = {"gates.0": False, "gates.1": False, "projections.proj_a": True, "pos_embed.0": False}
        assert answers(Mixer()) == expected
        report = explain_param_groups(Mixer())
        assert report.decision("gates.0").owner == "Mixer"


class TestParametrized:
    @pytest.mark.parametrize("apply", [parametrizations.weight_norm, nn.utils.weight_norm])
    def test_weight_norm(self, apply):
        model = nn.Sequential(apply(nn.Linear(3, 4)))
        gain, direction = sorted(n for n, p in model.named_parameters() if p.ndim == 2)
        assert answers(model) == {"0.bias": False, gain: False, direction: True}
        assert role(model, gain) is Role.WEIGHT_NORM_GAIN
        assert answers(model, roles={"weight_norm_gain": True})[gain]

    @pytest.mark.parametrize("apply", [parametrizations.spectral_norm, nn.utils.spectral_norm])
    def test_spectral_norm(self, apply):
        model = nn.Sequential(apply(nn.Linear(3, 4)))
        assert [d for name, d in answers(model).items() if name != "0.bias"] == [True]

    def test_host_decides_not_the_list(self):
        embedding = parametrizations.spectral_norm(nn.Embedding(8, 4))
        assert answers(embedding) == {"parametrizations.weight.original": False}

    def test_orthogonal_is_a_knob(self):
        model = parametrizations.orthogonal(nn.Linear(4, 4, bias=False))
        name = "parametrizations.weight.original"
        assert answers(model) == {name: True}
        assert answers(model, roles={"orthogonal": False}) == {name: False}


class TestAdapters:
    """The shapes of PEFT's layers, without PEFT."""

    def test_lora_dora_ia3_and_modules_to_save(self):
        layer = raw("LoraLinear")
        layer.base_layer = nn.Linear(4, 4).requires_grad_(False)
        layer.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        layer.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
        layer.lora_embedding_A = nn.ParameterDict({"default": param(2, 8)})
        layer.lora_magnitude_vector = nn.ModuleDict({"default": raw("DoraLinearLayer", weight=(4,))})
        layer.ia3_l = nn.ParameterDict({"default": param(4, 1)})
        layer.norm = raw("ModulesToSaveWrapper")
        layer.norm.modules_to_save = nn.ModuleDict({"default": RMSNorm(4)})
        layer.head = raw("ModulesToSaveWrapper")
        layer.head.modules_to_save = nn.ModuleDict({"default": nn.Linear(4, 2)})
        expected = {
            "lora_A.default.weight": True,
            "lora_B.default.weight": True,
            "lora_embedding_A.default": True,
            "lora_magnitude_vector.default.weight": False,
            "ia3_l.default": False,
            "norm.modules_to_save.default.weight": False,
            "head.modules_to_save.default.weight": True,
            "head.modules_to_save.default.bias": False,
        }
        assert answers(layer) == expected
        without = answers(layer, roles={"adapter_matrix": False})
        assert {name for name, d in without.items() if d} == {"head.modules_to_save.default.weight"}


def test_registering_a_type():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta_a = param(4, 4)
            self.theta_b = param(4, 4)

    class Stranger(Strange):
        pass

    model = Stranger()
    assert answers(model) == {"theta_a": True, "theta_b": True}
    from fused_adamw.groups.roles import TYPES

    before = dict(TYPES)
    try:
        register_type(Strange, {"theta_a": "gain"})
        assert answers(model) == {"theta_a": False, "theta_b": True}
        register_type("Stranger", {"theta_?": Role.GAIN})
        assert answers(model) == {"theta_a": False, "theta_b": False}
        with pytest.raises(ValueError, match="unknown role 'gains'"):
            register_type(Strange, {"*": "gains"})
        with pytest.raises(TypeError, match="expected a class or the name of a class, got 3"):
            register_type(3, {})
    finally:
        TYPES.clear()
        TYPES.update(before)
