"""Names of parameters: right or absent when groups are edited, and never in the way of what torch allows."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from fused_adamw import FusedHygieneAdamW, build_param_groups


def model_of(freeze=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].requires_grad_(not freeze)
    return model


def names_of(optimizer):
    return [group.get("param_names") for group in optimizer.state_dict()["param_groups"]]


def true_names(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


EDITS = {
    "one removed": lambda group: group["params"].pop(0),
    "reversed": lambda group: group["params"].reverse(),
    "first put last": lambda group: group["params"].append(group["params"].pop(0)),
    "another list": lambda group: group.update(params=group["params"][1:]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("when", ["saved", "copied", "named in a message", "another group is added"])
def test_of_a_model_they_follow_the_parameters(edit, when):
    model = model_of()
    optimizer = FusedHygieneAdamW(model)
    edit(optimizer.param_groups[1])
    expected = true_names(model, optimizer)
    if when == "copied":
        optimizer = copy.deepcopy(optimizer)
    if when == "another group is added":
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})
        assert names_of(optimizer) == [*expected, ["number 0 of group 2"]]
    elif when == "named in a message":
        p = optimizer.param_groups[1]["params"][0]
        p.grad = torch.ones_like(p).to_sparse()
        with pytest.raises(RuntimeError, match=f"parameter '{expected[1][0]}' has a gradient of layout"):
            optimizer.step()
    else:
        assert names_of(optimizer) == expected


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_without_a_model_they_are_absent_rather_than_wrong(edit):
    model = model_of()
    optimizer = FusedHygieneAdamW(model.named_parameters())
    edit(optimizer.param_groups[0])
    p = optimizer.param_groups[0]["params"][1]
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="parameter number 1 of group 0 has a gradient"):
        optimizer.step()
    assert names_of(optimizer) == [None]


def test_names_that_a_user_gives_stay():
    model = model_of()
    optimizer = FusedHygieneAdamW(model)
    for group in optimizer.param_groups:
        group["param_names"] = [f"model.{name}" for name in group["param_names"]]
    expected = [[f"model.{name}" for name in names] for names in true_names(model, optimizer)]
    assert names_of(optimizer) == expected
    first = optimizer.param_groups[1]
    first["params"].pop()
    first["param_names"].pop()
    assert names_of(optimizer) == [expected[0], expected[1][:-1]]


def test_a_model_that_is_gone_gives_no_names():
    model = model_of()
    optimizer = FusedHygieneAdamW(model)
    del model
    gc.collect()
    optimizer.param_groups[1]["params"].reverse()
    assert [names is None for names in names_of(optimizer)] == [False, True]


@pytest.mark.parametrize("form", ["list", "generator", "tensor"])
@pytest.mark.parametrize("is_copy", [False, True])
def test_groups_without_names_join_those_of_a_model(form, is_copy):
    """As every callback that unfreezes layers adds them."""
    model = model_of(freeze=True)
    optimizer = FusedHygieneAdamW(model)
    if is_copy:
        model, optimizer = copy.deepcopy((model, optimizer))
    model[0].requires_grad_(True)
    params = list(model[0].parameters())
    given = {"list": params, "generator": iter(params), "tensor": params[0]}[form]
    optimizer.add_param_group({"params": given, "lr": 0.5})
    added = params[:1] if form == "tensor" else params
    assert optimizer.param_groups[-1]["params"] == added
    known = ["0.weight", "0.bias"][: len(added)]
    unknown = [f"number {i} of group 2" for i in range(len(added))]
    assert names_of(optimizer)[-1] == (unknown if is_copy else known)
    other = FusedHygieneAdamW(model_of(freeze=True))
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones_like(p)) for p in added]})
    other.param_groups[-1]["param_names"] = names_of(optimizer)[-1]
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[-1]["lr"] == 0.5


def test_names_that_users_gave_are_not_mixed_with_none():
    for given in (model_of().named_parameters(), build_param_groups(model_of())):
        with pytest.raises(ValueError, match="with/without names"):
            FusedHygieneAdamW(given).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_what_torch_refuses_as_a_group_is_refused():
    optimizer = FusedHygieneAdamW(model_of())
    for given in (3, {"params": {nn.Parameter(torch.ones(2))}}, {"params": [3]}):
        with pytest.raises(TypeError):
            optimizer.add_param_group(given)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize(
    "make", [FusedHygieneAdamW, lambda m: FusedHygieneAdamW(m.parameters())], ids=["model", "tensors"]
)
def test_a_copy_shares_its_groups_and_state_as_the_original_does(make, duplicate):
    """Wrappers hold the containers of the optimizer inside them."""
    model = model_of()
    optimizer = make(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    held = (optimizer, optimizer.param_groups, optimizer.state, optimizer.param_groups[0])
    copied, groups, state, group = duplicate(held)
    assert groups is copied.param_groups
    assert state is copied.state
    assert group is groups[0]
    assert type(group) is dict
