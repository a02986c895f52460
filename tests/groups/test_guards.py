"""General guards: what a name's last word suggests yields to evidence, and contradictions are reported."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn

from fused_adamw.groups import ParamGroupWarning, Role, build_param_groups, explain_param_groups

from .helpers import assert_partition, decays

pytestmark = pytest.mark.filterwarnings("ignore:not recognised")


def raw(class_name, **tensors):
    """A module of a class that nobody knows, holding raw parameters."""
    module = type(class_name, (nn.Module,), {})()
    for name, shape in tensors.items():
        module.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return module


def answers(module, **kwargs):
    return decays(build_param_groups(module, 0.1, **kwargs))


def decision(module, name):
    return explain_param_groups(module).decision(name)


def warned(module):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        build_param_groups(module)
    return " ".join(str(w.message) for w in seen if issubclass(w.category, ParamGroupWarning))


class TestLeadingWeight:
    @pytest.mark.parametrize("lead", ["W_", "w_", "weight_", "weights_", "_W_"])
    @pytest.mark.parametrize(
        "rest", ["query", "key", "enc", "dec", "latent", "probe", "codebook", "table", "time_shift"]
    )
    def test_makes_a_matrix(self, lead, rest):
        name = f"{lead}{rest}"
        assert answers(raw("Thing", **{name: (4, 6)})) == {name: True}
        assert answers(raw("Thing", **{name: (3, 4, 6)})) == {name: True}
        assert answers(raw("Thing", **{name: (4, 1)})) == {name: True}  # one output

    @pytest.mark.parametrize("name", ["W_embed", "w_pos", "weight_token"])
    def test_beside_a_word_for_tables_is_doubted(self, name):
        found = decision(raw("Thing", **{name: (4, 6)}), name)
        assert (found.role, found.confidence) == (Role.MATRIX, "low")

    @pytest.mark.parametrize("name", ["wte", "wpe", "wte_weight", "wpe_weight"])
    def test_the_tables_of_gpt2_are_tables(self, name):
        assert answers(raw("GPT", **{name: (9, 4)})) == {name: False}

    @pytest.mark.parametrize("name", ["weight_scale", "w_gain", "weight_bias"])
    def test_what_belongs_to_a_weight_is_none(self, name):
        assert answers(raw("Thing", **{name: (4, 1)})) == {name: False}

    @pytest.mark.parametrize(
        "name", ["latent_proj", "pos_embed_proj", "null_kernel", "embed_projection", "rope_matrix"]
    )
    def test_a_trailing_map_makes_a_matrix_too(self, name):
        assert answers(raw("Thing", **{name: (4, 6)})) == {name: True}

    def test_transformer_lens(self):
        attention = {f"W_{x}": (2, 8, 4) for x in "QKV"} | {"W_O": (2, 4, 8), "_W_K": (2, 8, 4)}
        biases = {f"b_{x}": (2, 4) for x in "QKV"} | {"b_O": (8,), "_b_K": (2, 4), "b_U": (50,)}
        tables = {"W_E": (50, 8), "W_pos": (10, 8), "W_token_type": (2, 8)}
        rest = {"W_U": (8, 50), "W_in": (8, 32), "W_gate": (8, 32), "b_in": (32,)}
        for make in (
            lambda: raw("Transformer", **attention, **biases, **tables, **rest),  # all in one
            lambda: nn.ModuleList([raw("Embed", **tables), raw("Block", **attention, **biases, **rest)]),
        ):
            found = {name.rpartition(".")[2]: answer for name, answer in answers(make()).items()}
            assert found == dict.fromkeys([*attention, *rest], True) | dict.fromkeys(
                [*biases, *tables, "b_in"], False
            )


class TestSiblings:
    @pytest.mark.parametrize("names", [("query", "key", "value"), ("enc", "dec"), ("in_query", "in_key")])
    def test_matrices_of_one_map(self, names):
        module = raw("Thing", **dict.fromkeys(names, (4, 6)))
        assert set(answers(module).values()) == {True}
        assert not warned(module)

    @pytest.mark.parametrize("pair", [("W_x", "b_x"), ("w", "b"), ("gamma", "beta"), ("scale", "shift")])
    @pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6)])
    def test_the_partner_of_a_weight_or_gain_is_a_bias(self, pair, shape):
        module = raw("Thing", **{pair[0]: shape, pair[1]: shape})
        assert decision(module, pair[1]).role is Role.BIAS
        assert decision(raw("Thing", **{pair[1]: (2, 6)}), pair[1]).role is Role.UNKNOWN

    def test_an_unknown_sibling_takes_the_known_role_and_is_reported(self):
        module = raw("Thing", user_codebook=(9, 4), user_stuff=(9, 4), other_stuff=(9, 4), user_more=(8, 4))
        found = {d.name: (d.role, d.confidence) for d in explain_param_groups(module).decisions}
        assert found["user_stuff"] == (Role.EMBEDDING, "low")
        assert found["user_more"][0] is Role.UNKNOWN  # another shape
        assert "user_stuff" in warned(module)

    def test_siblings_that_contradict_each_other_are_reported(self):
        module = raw("Thing", top_latents=(4, 6), top_experts=(4, 6))
        assert "top_latents" in warned(module)
        assert "top_experts" in warned(module)
        assert not warned(raw("Thing", top_latents=(4, 6), top_experts=(5, 6)))

    def test_siblings_that_differ_in_kind_by_name_are_not(self):
        assert not warned(
            raw("Thing", gate_weight=(4, 6), gate_bias=(4, 6), pos_embed=(4, 6), pos_proj=(4, 6))
        )


class TestHolders:
    """A plain list or dict means nothing by itself; a class of one's own may, and a telling key does."""

    @pytest.mark.parametrize("base", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
    @pytest.mark.parametrize("attribute", ["enc", "table", "stem", "norm"])
    @pytest.mark.parametrize("own_class", [True, False])
    def test_a_tensors_own_name_counts(self, base, attribute, own_class):
        module = (type("Blocks", (base,), {}) if own_class else base)()
        module.weight = nn.Parameter(torch.ones(4, 6))
        module.pos_embed = nn.Parameter(torch.ones(1, 9, 4))
        module.cls_token = nn.Parameter(torch.ones(1, 2, 4))
        model = nn.Module()
        model.add_module(attribute, module)
        expected = {"weight": True, "pos_embed": False, "cls_token": False}
        assert answers(model) == {f"{attribute}.{name}": answer for name, answer in expected.items()}

    @pytest.mark.parametrize("kind", [nn.ParameterDict, type("Tensors", (nn.ParameterDict,), {})])
    @pytest.mark.parametrize("attribute", ["params", "weights", "embeddings", "norm"])
    def test_keys_that_say_something(self, kind, attribute):
        shapes = {"pos_embed": (1, 9, 4), "attn_bias": (2, 4), "proj": (4, 6), "W_q": (4, 6), "b_q": (2, 3)}
        model = nn.Module()
        model.add_module(attribute, kind({k: nn.Parameter(torch.ones(s)) for k, s in shapes.items()}))
        assert answers(model) == {f"{attribute}.{name}": name in ("proj", "W_q") for name in shapes}

    @pytest.mark.parametrize("kind", [nn.ParameterDict, type("Tensors", (nn.ParameterDict,), {})])
    @pytest.mark.parametrize(
        ("attribute", "answer"), [("weights", True), ("embeddings", False), ("attn_bias", False)]
    )
    def test_keys_that_say_nothing_leave_it_to_the_holder(self, kind, attribute, answer):
        model = nn.Module()
        tensors = {"author": nn.Parameter(torch.ones(4, 6)), "paper": nn.Parameter(torch.ones(3, 6))}
        model.add_module(attribute, kind(tensors))
        assert set(answers(model).values()) == {answer}

    @pytest.mark.parametrize("base", [nn.Sequential, nn.ModuleList, nn.ParameterList])
    def test_a_class_of_ones_own_may_say_what_its_tensors_are(self, base):
        norm = type("BlockNorm", (base,), {})()
        norm.register_parameter("weight", nn.Parameter(torch.ones(4)))
        found = decision(nn.ModuleDict({"x": norm}), "x.weight")
        assert (found.role, found.owner) == (Role.NORM, "BlockNorm")

    @pytest.mark.parametrize("kind", [nn.ParameterList, type("Tensors", (nn.ParameterList,), {})])
    def test_numbers_leave_it_to_the_holder(self, kind):
        model = nn.Module()
        for attribute in ("weights", "pos_embed", "query", "key"):
            model.add_module(attribute, kind([nn.Parameter(torch.ones(4, 6))] * 1))
        expected = {"weights.0": True, "pos_embed.0": False, "query.0": True, "key.0": True}
        assert answers(model) == expected


LAYERS = ["LinearNorm", "LinearWeightNorm", "Conv2dSpectralNorm", "DenseNorm", "WeightNorm", "SpectralNorm"]
LAYERS += ["FCWeightNorm", "ConvNorm"]


class TestClassesThatEndInNorm:
    @pytest.mark.parametrize("name", LAYERS)
    @pytest.mark.parametrize("shape", [(8, 4), (8, 4, 3), (8, 4, 3, 3)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_layers(self, name, shape, bias):
        module = raw(name, weight=shape, **({"bias": (8,)} if bias else {}))
        assert answers(module)["weight"]
        assert not answers(module).get("bias", False)

    def test_a_layer_shows_in_its_bias_or_its_attributes(self):
        assert answers(raw("FancyNorm", weight=(8, 4), bias=(8,))) == {"weight": True, "bias": False}
        assert answers(raw("FancyNorm", weight=(1, 4), bias=(1,))) == {"weight": True, "bias": False}
        sized = raw("FancyNorm", weight=(8, 4))
        sized.in_features, sized.out_features = 4, 8
        assert answers(sized) == {"weight": True}
        assert answers(raw("FancyNorm", weight=(8, 4, 3, 3))) == {"weight": True}

    def test_where_nothing_tells_it_is_reported(self):
        assert "weight" in warned(raw("FancyNorm", weight=(8, 4)))

    @pytest.mark.parametrize(
        "norm",
        [
            raw("FancyNorm", weight=(8,), bias=(8,)),
            raw("FancyNorm", weight=(3, 4, 5), bias=(3, 4, 5)),
            raw("HeadwiseRMSNorm", gamma=(2, 1, 4)),
            raw("ConvNextLayerNorm", weight=(4,), bias=(4,)),
            raw("ConvNextV2GRN", weight=(1, 1, 1, 4), bias=(1, 1, 1, 4)),
            raw("LinearAttentionNorm", weight=(4,)),
        ],
        ids=lambda norm: type(norm).__name__,
    )
    def test_norms(self, norm):
        assert set(answers(norm).values()) == {False}
        assert not warned(norm)

    @pytest.mark.parametrize("name", ["PatchEmbed", "LinearEmbedding", "ConvEmbedding"])
    def test_embeddings_that_are_layers(self, name):
        assert answers(raw(name, weight=(8, 12))) == {"weight": True}
        assert answers(raw("TimestepEmbedding", weight=(8, 12), bias=(8,)))["weight"]


SHAPES = [*sorted(set(itertools.permutations((5, 1, 1)))), (1, 5, 1, 1), (5, 1), (1, 5), (1, 1), (1,), ()]


class TestVectors:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_at_most_one_dimension_above_one_is_a_vector(self, shape):
        found = decision(raw("Thing", zeta=shape), "zeta")
        assert (found.decays, found.role) == (False, Role.VECTOR)

    def test_layers_known_by_type_stay_matrices(self):
        for layer in (
            nn.Linear(4, 1),
            nn.Linear(1, 4),
            nn.Linear(1, 1),
            nn.Conv2d(1, 4, 1),
            nn.Conv1d(1, 1, 1),
        ):
            assert answers(layer)["weight"]

    def test_a_row_or_column_with_no_telling_name_is_reported(self):
        assert "zeta" in warned(raw("Thing", zeta=(1, 5)))
        assert not warned(raw("Thing", zeta=(5, 1, 1)))


class Twice(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.a = child
        self.b = child


class TestSharedModules:
    def test_modules_are_visited_a_bounded_number_of_times(self):
        """2 ** 40 paths lead to the linear layer."""
        node = nn.Linear(2, 2)
        for _ in range(40):
            node = Twice(node)
        groups = build_param_groups(node, 0.1)
        assert_partition(node, groups)
        assert len(explain_param_groups(node).decisions[0].aliases) < 100
        assert not any(answers(node, overrides={node.b.b.b: False}).values())

    def test_a_block_that_is_used_many_times_keeps_its_names(self):
        model = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))] * 12)
        assert answers(model, overrides={"11.0.*": False}) == {"0.0.weight": False, "0.0.bias": False}

    @pytest.mark.parametrize("known_first", [True, False])
    def test_a_place_that_says_nothing_does_not_contradict(self, known_first):
        known, unknown = nn.Embedding(9, 4), raw("Thing", zeta=(9, 4))
        unknown.zeta = known.weight
        model = nn.ModuleList([known, unknown] if known_first else [unknown, known])
        (found,) = explain_param_groups(model, roles={"embedding": False}).decisions
        assert (found.role, found.confidence, found.disputed) == (Role.EMBEDDING, "high", False)


class TestAdapters:
    class Layer(nn.Linear):
        adapter_layer_names = ("new_A", "new_B", "new_gamma", "new_bias", "new_norm")

        def __init__(self):
            super().__init__(4, 4)
            self.requires_grad_(False)
            self.new_A = nn.ParameterDict({"default": nn.Parameter(torch.ones(1, 4))})
            self.new_B = nn.ModuleDict({"default": nn.Linear(1, 4)})
            self.new_gamma = nn.ParameterDict({"default": nn.Parameter(torch.ones(2, 4))})
            self.new_bias = nn.ParameterDict({"default": nn.Parameter(torch.ones(1, 4))})
            self.new_norm = nn.ModuleDict({"default": nn.LayerNorm(4)})

    def test_what_a_layer_lists_as_adapters(self):
        model = nn.Sequential(self.Layer())
        roles = {d.name.removeprefix("0.new_"): d.role for d in explain_param_groups(model).decisions}
        assert roles == {
            "A.default": Role.ADAPTER_MATRIX,
            "B.default.weight": Role.ADAPTER_MATRIX,
            "B.default.bias": Role.BIAS,
            "gamma.default": Role.ADAPTER_GAIN,
            "bias.default": Role.BIAS,
            "norm.default.weight": Role.NORM,
            "norm.default.bias": Role.BIAS,
        }
        assert not any(answers(model, roles={"adapter_matrix": False}).values())

    def test_lycoris(self):
        module = raw("LokrModule", lokr_w1=(4, 4), lokr_w2_a=(4, 2), lokr_t2=(2, 2, 3, 3), hada_w1_b=(2, 4))
        module.lora_down = nn.Linear(4, 2, bias=False)
        module.lora_up = nn.Linear(2, 4, bias=False)
        assert {d.role for d in explain_param_groups(module).decisions} == {Role.ADAPTER_MATRIX}


def test_numbers_of_any_kind():
    import fractions

    import numpy as np

    kinds = (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), fractions.Fraction(1, 2))
    for value in kinds:
        for groups in (
            build_param_groups(nn.Linear(2, 2), value),
            build_param_groups(nn.Linear(2, 2), 0.1, overrides={"weight": value}),
            build_param_groups(nn.Linear(2, 2), 0.1, overrides={"weight": {"weight_decay": value}}),
            build_param_groups(nn.Linear(2, 2), 0.1, roles={"matrix": value}),
            build_param_groups(nn.Linear(2, 2), 0.25, overrides={"*": {"weight_decay_scale": value * 4}}),
        ):
            assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
            assert all(type(group["weight_decay"]) is float for group in groups)
        assert '"weight_decay": 0.5' in explain_param_groups(nn.Linear(2, 2), value).to_json()
    for value in (np.True_, torch.tensor(True)):
        groups = build_param_groups(nn.Linear(2, 2), 0.25, overrides={"bias": value})
        assert [group["weight_decay"] for group in groups] == [0.25]
    for value in ("0.1", None, [0.1], np.array([0.1, 0.2]), torch.tensor(1j), b"1"):
        with pytest.raises(TypeError, match=r"weight_decay: expected a number"):
            build_param_groups(nn.Linear(2, 2), value)
    for value in (np.float32("nan"), torch.tensor(-1.0)):
        with pytest.raises(ValueError, match=r"expected a finite number >= 0"):
            build_param_groups(nn.Linear(2, 2), value)
    with pytest.raises(ValueError, match="lr: expected a finite number >= 0, got -1"):
        build_param_groups(nn.Linear(2, 2), lr=-1)
