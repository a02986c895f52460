"""Saved groups against live ones."""

import torch
from torch import nn

from fused_adamw.groups import build_param_groups, compare_param_names


def names(optimizer_or_groups):
    groups = getattr(optimizer_or_groups, "param_groups", optimizer_or_groups)
    return [group.get("param_names") for group in groups]


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def test_equal():
    assert compare_param_names(names(build_param_groups(model())), names(build_param_groups(model()))) is None


def test_wrapped_names_are_equal():
    saved = [["module.0.weight"], ["_orig_mod.0.bias", "module._orig_mod.1.weight"]]
    assert compare_param_names(saved, [["0.weight"], ["0.bias", "1.weight"]]) is None


def test_groups_in_another_order():
    saved = [["bias"], ["weight"]]
    message = compare_param_names(saved, [["weight"], ["bias"]])
    assert message == (
        "the parameter groups of the checkpoint do not match the optimizer's: "
        "2 parameters moved to another group: weight (saved in group 1, now in group 0), "
        "bias (saved in group 0, now in group 1). torch pairs parameters by position, so loading would give "
        "them the wrong weight decay and moments; build the groups with the arguments used when it was saved"
    )


def test_one_parameter_moved():
    message = compare_param_names([["a", "b"], ["c"]], [["a"], ["b", "c"]])
    assert "1 parameter moved to another group: b (saved in group 0, now in group 1)" in message


def test_order_inside_a_group():
    message = compare_param_names([["a", "b", "c"]], [["b", "a", "c"]])
    assert "2 parameters changed place inside a group: b, a." in message


def test_missing_and_new():
    message = compare_param_names([["a", "b"]], [["a", "c"]])
    assert "1 parameter only in the checkpoint: b; 1 parameter only in the optimizer: c." in message
    assert "changed place" not in message


def test_number_of_groups():
    message = compare_param_names([["a", "b"]], [["a"], ["b"]])
    assert "b (saved in group 0, now in group 1); the checkpoint has 1 group, the optimizer 2" in message


def test_long_lists_are_cut():
    saved, live = [[f"p{i}" for i in range(9)], []], [[], [f"p{i}" for i in range(9)]]
    message = compare_param_names(saved, live)
    assert "9 parameters moved" in message
    assert "and 4 more" in message


def test_nothing_to_compare_without_names():
    assert compare_param_names([None, None], [["a"], ["b"]]) is None
    assert compare_param_names([["a"], None], [["b"], ["a"]]) is None
    assert compare_param_names([["a"]], [None]) is None


def test_a_policy_change_is_caught_through_torchs_state_dict():
    saved = torch.optim.AdamW(build_param_groups(model(), policy="hygiene")).state_dict()
    live = build_param_groups(model(), overrides={"1.weight": True})
    message = compare_param_names(names(saved["param_groups"]), names(live))
    assert "1.weight (saved in group 1, now in group 0)" in message
