"""Rules for whole families of names and classes: what a word, a sibling or a class says, and what not."""

import pytest
import torch
from torch import nn

from fused_adamw.groups import Role, explain_param_groups


def owner(name="Owner", children=(), **shapes):
    """A module of a class called `name` with parameters of these shapes."""
    made = type(name, (nn.Module,), {})()
    for key, shape in shapes.items():
        made.register_parameter(key, nn.Parameter(torch.rand(shape)))
    for child in children:
        made.add_module(child, nn.Linear(2, 2))
    return made


def found(model, name):
    return explain_param_groups(model).decision(name)


@pytest.mark.parametrize(
    "name", ["FlatLinear", "MyConv2d", "EquivariantBilinear", "FullyConnectedTensorProduct"]
)
@pytest.mark.parametrize("tensor", ["weight", "weights", "w", "kernel"])
def test_layers_hold_maps_at_any_shape(name, tensor):
    model = nn.Sequential(owner(name, **{tensor: 24, "bias": 6}))
    assert found(model, f"0.{tensor}").role is Role.MATRIX
    assert not found(model, "0.bias").decays


@pytest.mark.parametrize("name", ["ElementwiseLinear", "DiagonalLinear", "Linears", "NonlinearGate"])
def test_a_gain_per_channel_is_no_map(name):
    assert not found(nn.Sequential(owner(name, weight=24)), "0.weight").decays


def test_a_tensor_with_a_bias_of_its_own_is_a_map():
    assert found(owner(embed_x=(16, 8), embed_x_bias=16), "embed_x").role is Role.MATRIX
    assert found(owner(embed_x=(16, 8), embed_x_bias=8), "embed_x").role is Role.MATRIX
    assert found(owner(embed_x=(16, 8), embed_x_bias=3), "embed_x").role is Role.EMBEDDING
    assert found(owner(embed_x=(16, 8), other_bias=16), "embed_x").role is Role.EMBEDDING
    assert found(owner(embed_out=(16, 8), embed_out_bias=16), "embed_out").role is Role.OUTPUT
    assert not found(owner(scale=8, scale_bias=8), "scale").decays


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("state_pos_ids", Role.POSITION),
        ("position_of_slots", Role.POSITION),
        ("persistent_memory", Role.TOKEN),
        ("memories_per_layer", Role.TOKEN),
        ("longterm_mems", Role.TOKEN),
        ("inducing_points", Role.QUERY),
        ("seed_vectors", Role.QUERY),
        ("ent", Role.EMBEDDING),
        ("entities", Role.EMBEDDING),
        ("relations", Role.EMBEDDING),
        ("bonus", Role.RECURRENCE),
        ("r_k", Role.RECURRENCE),
        ("lower_bounds", Role.RECURRENCE),
        ("low_hz_", Role.FREQUENCY),
        ("band_freqs", Role.FREQUENCY),
    ],
)
def test_words(name, role):
    assert found(owner(**{name: (4, 8)}), name).role is role


@pytest.mark.parametrize(
    "name", ["pos_weight_map", "mlp_pos_up", "memory_proj", "mem_w_up", "memory_key", "seed_mlp"]
)
def test_words_that_say_a_map(name):
    assert found(owner(**{name: (4, 8)}), name).decays


def test_a_spread_beside_its_mean():
    for spread, mean in [("weight_rho", "weight_mu"), ("rho_w", "mu_w"), ("w_log_sigma", "w_mu")]:
        model = owner(**{spread: (4, 8), mean: (4, 8)})
        assert found(model, spread).role is Role.SPREAD
        assert found(model, mean).decays
    assert found(owner(weight_rho=(4, 8)), "weight_rho").decays


@pytest.mark.parametrize("name", ["Frequencies", "PeriodicActivations", "Periodic"])
def test_classes_of_frequencies(name):
    role = found(nn.Sequential(owner(name, weight=(3, 8))), "0.weight").role
    assert (role is Role.FREQUENCY) == (name != "PeriodicActivations")


def test_a_first_dimension_of_one_waits_for_a_batch():
    decision = found(owner(something=(1, 4, 8)), "something")
    assert (decision.decays, decision.confidence) == (False, "low")
    assert found(owner(something=(4, 8)), "something").decays
    assert found(owner(something=(1, 1, 4, 8)), "something").decays


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.unusual = nn.Linear(2, 2), nn.Linear(2, 2)

    def get_output_embeddings(self):
        return self.unusual


class TestEnds:
    def test_what_the_model_says(self):
        report = explain_param_groups(WithHead())
        assert report.decision("unusual.weight").role is Role.OUTPUT
        assert report.decision("unusual.bias").role is Role.BIAS
        assert report.decision("body.weight").role is Role.MATRIX

    def test_by_place(self):
        model = owner(children=("x_embedder", "body", "lm_head"))
        model.block = owner(children=("gate", "experts", "head"))
        model.other = owner(children=("gate", "x"))
        roles = {d.name: d.role for d in explain_param_groups(model).decisions if d.name.endswith("weight")}
        assert roles == {
            "x_embedder.weight": Role.INPUT,
            "body.weight": Role.MATRIX,
            "lm_head.weight": Role.OUTPUT,
            "block.gate.weight": Role.ROUTER,
            "block.experts.weight": Role.MATRIX,
            "block.head.weight": Role.MATRIX,
            "other.gate.weight": Role.MATRIX,
            "other.x.weight": Role.MATRIX,
        }

    def test_a_tied_head_stays_tied(self):
        model = nn.Module()
        model.embed, model.lm_head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
        model.lm_head.weight = model.embed.weight
        assert found(model, "lm_head.weight").role is Role.TIED_EMBEDDING

    def test_they_follow_matrices_unless_told(self):
        model = owner(children=("lm_head",))
        assert not explain_param_groups(model, roles={"matrix": False}).decision("lm_head.weight").decays
        roles = {"matrix": False, "output": True}
        assert explain_param_groups(model, roles=roles).decision("lm_head.weight").decays


class Net(nn.Module):
    """A stem, a stack of blocks and layers after it, none of which has a telling name."""

    def __init__(self, stem, after, before=None):
        super().__init__()
        self.zero, self.one = before or nn.Identity(), stem
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
        self.two = after


class TestEndsByOrder:
    """The first and the last map that are registered, where nothing else tells."""

    def roles(self, model):
        return {d.name: d.role for d in explain_param_groups(model).decisions if d.name.endswith("weight")}

    def test_a_stem_and_a_last_layer(self):
        roles = self.roles(Net(nn.Conv2d(16, 4, 3), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 9))))
        assert roles["one.weight"] is Role.INPUT
        assert roles["two.1.weight"] is Role.OUTPUT
        assert {roles[f"blocks.{i}.0.weight"] for i in range(3)} == {Role.MATRIX}

    def test_after_an_embedding_no_map_is_the_first(self):
        assert (
            self.roles(Net(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(9, 4)))["one.weight"] is Role.MATRIX
        )

    def test_a_stack_has_no_ends(self):
        roles = self.roles(Net(nn.Identity(), nn.Identity()))
        assert set(roles.values()) == {Role.MATRIX}

    def test_a_pooler_is_no_output(self):
        model = Net(nn.Linear(4, 4), nn.Identity())
        model.pooler = nn.Linear(4, 4)
        assert self.roles(model)["pooler.weight"] is Role.MATRIX

    def test_an_output_that_is_known_is_the_only_one(self):
        model = Net(nn.Linear(4, 4), nn.Identity())
        model.lm_head, model.other = nn.Linear(4, 9), nn.Linear(4, 4)
        roles = self.roles(model)
        assert (roles["lm_head.weight"], roles["other.weight"]) == (Role.OUTPUT, Role.MATRIX)

    @pytest.mark.parametrize(
        ("layer", "role"),
        [
            (nn.Conv2d(3, 8, 7), Role.INPUT),
            (nn.Conv1d(1, 16, 9), Role.INPUT),
            (nn.Conv2d(8, 8, 3, groups=8), Role.CONVOLUTION),
            (nn.Conv1d(1, 1, 3), Role.CONVOLUTION),
            (nn.ConvTranspose2d(8, 3, 3), Role.CONVOLUTION),
            (nn.Linear(3, 8), Role.MATRIX),
        ],
    )
    def test_channels_of_images_and_waveforms(self, layer, role):
        model = Net(nn.Linear(4, 4), nn.Linear(4, 4))
        model.branches = nn.ModuleList([nn.Sequential(nn.ReLU(), layer)])
        model.head = nn.Linear(4, 4)
        assert self.roles(model)["branches.0.1.weight"] is role
