"""The arguments about formats: what is refused, what copies keep, and which tensors they reach."""

import copy
import logging
import pickle
import warnings

import numpy as np
import pytest
import torch
from common import give_grads, parameters
from torch import nn

from fused_adamw import FusedHygieneAdamW
from fused_adamw.groups import Role, build_param_groups

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CODED, FLOATING = "8bit", "bfloat16"


class Model(nn.Module):
    def __init__(self, dtype=F32):
        super().__init__()
        self.wte = nn.Embedding(64, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 128, bias=False)
        self.to(dtype)


def kept(optimizer):
    """By name: how moments are kept, as the state is to be made."""
    names = [name for group in optimizer.param_groups for name in optimizer._param_names.of(group)]
    return {
        name: CODED if formats.exp_avg.name == "root_signed" else formats.exp_avg.name
        for name, formats in zip(names, optimizer._kept(), strict=True)
    }


# ---- What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"master_weights": "fp32"}, ValueError, "master_weights must be None or 'split', got 'fp32'"),
        ({"master_weights": True}, ValueError, "master_weights must be None or 'split', got True"),
        ({"stochastic_rounding": "yes"}, ValueError, "stochastic_rounding must be None, True or False"),
        ({"stochastic_rounding": 1}, ValueError, "stochastic_rounding must be None, True or False, got 1"),
        ({"state_dtype": "4bit"}, ValueError, "state_dtype must be None, torch.float32, torch.bfloat16 or"),
        ({"state_dtype": torch.uint8}, ValueError, "or '8bit', got torch.uint8"),
        ({"state_roles": ["matrix"]}, TypeError, "state_roles must be None or map roles, or globs over"),
        ({"state_roles": {0: BF16}}, TypeError, "state_roles must be None or map roles, or globs over"),
        ({"state_roles": {"matrix": F16}}, ValueError, r"state_roles\['matrix'\] must be torch.float32,"),
        ({"state_roles": {Role.MATRIX: None}}, ValueError, r"state_roles\['matrix'\] must be .* got None"),
        ({"seed": "1"}, TypeError, "seed must be an integer, got '1'"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got 1.0"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"seed": -1}, ValueError, r"seed must be at least 0 and below 2\*\*64, got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be at least 0 and below 2\*\*64"),
        ({"state_dtype": "8bit", "stochastic_rounding": False}, ValueError, "does not go with '8bit'"),
        ({"state_roles": {"matrix": "8bit"}, "stochastic_rounding": False}, ValueError, "with '8bit'"),
        ({"state_dtype": "8bit", "amsgrad": True}, ValueError, "amsgrad in parameter group 0 does not go"),
        ({"state_roles": {"norm": "8bit"}, "amsgrad": True}, ValueError, "amsgrad in parameter group 0"),
        ({"state_roles": {"embeding": "8bit"}}, ValueError, r"'embeding'\] is no role.*: embedding"),
        ({"state_roles": {"head.weight": F32}}, ValueError, "no role, .* close to it: lm_head.weight"),
    ],
    ids=str,
)
def test_refused(options, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        FusedHygieneAdamW(model, **options)
    assert not any(p.grad for p in model.parameters())


def test_float16_parameters_are_refused_a_master_by_name():
    with pytest.raises(
        ValueError, match=r"parameter hidden.weight of group 0 is torch.float16: master_weights"
    ):
        FusedHygieneAdamW(build_param_groups(Model(F16)), master_weights="split")
    optimizer = FusedHygieneAdamW(Model(BF16), master_weights="split")
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"is torch.float16: master_weights='split' is for bfloat16"):
        optimizer.add_param_group({"params": parameters([(3,)], dtype=F16)})
    assert len(optimizer.param_groups) == groups
    model = Model(BF16)
    optimizer = FusedHygieneAdamW(model, master_weights="split")
    model.norm.to(F16)
    with pytest.raises(ValueError, match=r"parameter 'norm.weight' is torch.float16: master_weights"):
        optimizer._kept()


def test_groups_with_amsgrad_are_refused_codes():
    optimizer = FusedHygieneAdamW(Model(), state_dtype="8bit")
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=f"amsgrad in parameter group {groups} does not go with 8-bit"):
        optimizer.add_param_group({"params": parameters([(3,)]), "amsgrad": True})
    assert len(optimizer.param_groups) == groups
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad in parameter group 0"):
        optimizer.step()
    assert not optimizer.state


def test_roles_are_known_of_models_alone():
    model = Model()
    with pytest.raises(ValueError, match=r"state_roles\['embedding'\]: roles are known of models alone"):
        FusedHygieneAdamW(model.named_parameters(), state_roles={"embedding": "8bit"})
    with pytest.raises(ValueError, match="no glob that matches a parameter"):
        FusedHygieneAdamW(model.parameters(), state_roles={"wte.*": "8bit"})  # which has no names


# ---- What is shown and kept

OPTIONS = {
    "master_weights": "split",
    "stochastic_rounding": True,
    "state_dtype": "8bit",
    "state_roles": {"embedding": "8bit", "lm_head.*": BF16},
    "seed": 7,
}


@pytest.mark.parametrize("duplicate", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_options_are_shown_and_kept_but_are_no_keys_of_groups(duplicate):
    optimizer = duplicate(FusedHygieneAdamW(Model(BF16), **OPTIONS))
    assert {name: getattr(optimizer, name) for name in OPTIONS} == OPTIONS
    assert optimizer.defaults.items() >= OPTIONS.items()
    for name, value in OPTIONS.items():
        assert f"\n{name}: {value}\n" in repr(optimizer)
    for groups in (optimizer.param_groups, optimizer.state_dict()["param_groups"]):
        assert not any(OPTIONS.keys() & group.keys() for group in groups)


def test_only_what_was_set_is_shown():
    optimizer = FusedHygieneAdamW(Model())
    assert not OPTIONS.keys() & optimizer.defaults.keys()
    assert all(name not in repr(optimizer) for name in OPTIONS)
    optimizer = FusedHygieneAdamW(Model(), stochastic_rounding=False, seed=np.int64(3))
    assert optimizer.defaults["stochastic_rounding"] is False
    assert "\nstochastic_rounding: False\nseed: 3\n" in repr(optimizer)


def test_options_may_come_back_in_groups_but_not_others():
    """ZeroRedundancyOptimizer copies `defaults` into every group."""
    options = {name: value for name, value in OPTIONS.items() if name != "state_roles"}
    first = FusedHygieneAdamW(Model(BF16), **options)
    groups = [{**first.defaults, "params": list(Model(BF16).parameters())[:1]}]
    assert FusedHygieneAdamW(groups, **options).seed == 7
    with pytest.raises(ValueError, match="seed in parameter group 0 is 7: it is an argument of the optim"):
        FusedHygieneAdamW(groups, **{**options, "seed": 8})


def test_the_mapping_of_roles_is_copied():
    roles = {Role.EMBEDDING: "8bit"}
    optimizer = FusedHygieneAdamW(Model(), state_roles=roles)
    roles[Role.EMBEDDING] = optimizer.state_roles["embedding"] = F32
    assert optimizer.state_roles == {"embedding": "8bit"}


# ---- Which tensors they reach

BY_ROLE = {
    "hidden.weight": CODED,
    "lm_head.weight": CODED,
    "wte.weight": FLOATING,
    "hidden.bias": FLOATING,
    "norm.weight": FLOATING,
    "norm.bias": FLOATING,
}


@pytest.mark.parametrize("duplicate", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_roles_of_a_model_decide(duplicate):
    optimizer = duplicate(FusedHygieneAdamW(Model(), state_dtype="8bit"))
    assert kept(optimizer) == BY_ROLE
    roles = {"embedding": "8bit", Role.OUTPUT: F32, "*.bias": F32}
    optimizer = duplicate(FusedHygieneAdamW(Model(), state_dtype="8bit", state_roles=roles))
    changed = {"wte.weight": CODED} | dict.fromkeys(["lm_head.weight", "hidden.bias", "norm.bias"], "float32")
    assert kept(optimizer) == BY_ROLE | changed


def test_roles_survive_groups_that_were_reordered():
    optimizer = FusedHygieneAdamW(Model(), state_dtype="8bit")
    optimizer.param_groups.reverse()
    assert kept(optimizer) == BY_ROLE


def test_a_frozen_parameter_that_is_added_has_its_role():
    model = Model()
    model.wte.requires_grad_(False)
    optimizer = FusedHygieneAdamW(model, state_dtype="8bit")
    assert "wte.weight" not in kept(optimizer)
    model.wte.requires_grad_(True)
    optimizer.add_param_group({"params": model.wte.parameters()})
    assert kept(optimizer) == BY_ROLE


def test_a_layer_that_the_model_got_later_has_its_roles():
    model = Model()
    optimizer = FusedHygieneAdamW(model, state_dtype="8bit")
    model.types = nn.Embedding(64, 64)
    optimizer.add_param_group({"params": model.types.parameters()})
    assert kept(optimizer) == BY_ROLE | {"types.weight": FLOATING}
    strange = parameters([(64, 64)])
    optimizer.add_param_group({"params": strange})  # of no model: by its shape
    assert kept(optimizer).popitem()[1] == CODED


def test_a_tied_parameter_is_found_by_either_name():
    model = Model()
    model.lm_head = nn.Linear(64, 64, bias=False)
    model.lm_head.weight = model.wte.weight
    assert kept(FusedHygieneAdamW(model, state_dtype="8bit"))["wte.weight"] == FLOATING
    for glob in ("wte.weight", "lm_head.weight"):
        assert kept(FusedHygieneAdamW(model, state_roles={glob: "8bit"}))["wte.weight"] == CODED


def test_tensors_are_told_by_shape_and_names_by_globs():
    params = dict(Model().named_parameters())
    by_shape = {name: CODED if p.dim() == 2 else FLOATING for name, p in params.items()}
    assert kept(FusedHygieneAdamW(params.items(), state_dtype="8bit")) == by_shape
    named = FusedHygieneAdamW(params.items(), state_dtype="8bit", state_roles={"wte.*": F32})
    assert kept(named) == by_shape | {"wte.weight": "float32"}
    unnamed = FusedHygieneAdamW(params.values(), state_dtype="8bit")
    assert [formats.exp_avg.name == "root_signed" for formats in unnamed._kept()] == [
        value == CODED for value in by_shape.values()
    ]


def test_the_log_says_what_is_coded_and_by_what(caplog):
    with caplog.at_level(logging.INFO, "fused_adamw"):
        FusedHygieneAdamW(Model(), state_dtype="8bit")
        FusedHygieneAdamW(Model().parameters(), state_dtype="8bit")
        FusedHygieneAdamW(Model(), state_dtype=BF16)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("[AdamW State]")]
    assert len(lines) == 2
    assert lines[0].startswith("[AdamW State] 8-bit moments: 2 of 6 params, by role; the others'")
    assert lines[1].startswith("[AdamW State] 8-bit moments: 3 of 6 params, every matrix by its shape alone;")
    assert "Pass the model instead of its parameters" in lines[1]


# ---- The warning about moments that are rounded to nearest


def warnings_of(*args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FusedHygieneAdamW(*args, **options)
    return [w for w in caught if "second moments" in str(w.message)]


@pytest.mark.parametrize(
    ("dtype", "options", "warns"),
    [
        (BF16, {}, True),
        (BF16, {"betas": (0.9, 0.991)}, True),
        (BF16, {"betas": (torch.tensor(0.9), torch.tensor(0.999))}, True),
        (BF16, {"master_weights": "split"}, True),
        (BF16, {"state_roles": {"norm": F32}}, True),
        (BF16, {"betas": (0.9, 0.99)}, False),
        (BF16, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}, False),
        (BF16, {"stochastic_rounding": True}, False),
        (BF16, {"stochastic_rounding": False}, False),
        (BF16, {"state_dtype": BF16}, False),
        (BF16, {"state_dtype": F32}, False),
        (BF16, {"state_dtype": "8bit"}, False),
        (F32, {}, False),
        (F16, {}, False),
        (F32, {"state_dtype": BF16, "stochastic_rounding": False}, False),  # it was asked for
    ],
    ids=str,
)
def test_a_warning_where_moments_are_rounded_to_nearest_by_default(dtype, options, warns):
    caught = warnings_of(Model(dtype), **options)
    assert len(caught) == warns
    if warns:
        count = 5 if "state_roles" in options else 6
        text = str(caught[0].message)
        assert text.startswith(f"the second moments of {count} bfloat16 params are kept in bfloat16")
        assert "state_dtype=torch.bfloat16, which" in text
        assert "state_dtype=torch.float32;" in text
        assert caught[0].filename == __file__


def test_the_warning_counts_what_it_is_about():
    model = Model()
    model.hidden.to(BF16)
    groups = build_param_groups(model)
    groups[0]["betas"] = (0.9, 0.95)  # of the matrix
    (caught,) = warnings_of(groups)
    assert str(caught.message).startswith("the second moments of 1 bfloat16 params")
    assert "With beta2=0.999 they change by up to 0.001 of" in str(caught.message)


# ---- By default nothing is new


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_by_default_keys_and_bits_are_torch_s(dtype):
    params = parameters([(64, 64), (7,)], dtype=dtype)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = FusedHygieneAdamW(params, backend="reference")
    theirs = torch.optim.AdamW(twins, foreach=False)
    for step in range(3):
        give_grads(params, step)
        give_grads(twins, step)
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert all(ours.state[p][key].dtype == value.dtype for key, value in theirs.state[q].items())
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()


def test_a_head_is_the_output():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64, 64))
    optimizer = FusedHygieneAdamW(model, state_dtype="8bit", state_roles={"head": F32})
    assert optimizer.state_roles == {"output": F32}
    twin = FusedHygieneAdamW(model, state_dtype="8bit", state_roles={"output": F32})
    assert twin.state_roles == optimizer.state_roles
