"""What a load does to decay, tensor by tensor."""

import copy

import pytest
import torch
from torch import nn

from fused_adamw.groups import build_param_groups, decay_changes


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def loaded(optimizer, edit):
    """The optimizer's groups before and after it loads its own state with other options."""
    state = copy.deepcopy(optimizer.state_dict())
    edit(state["param_groups"])
    before = optimizer.param_groups
    optimizer.load_state_dict(state)
    return before, optimizer.param_groups


def test_a_load_that_gives_decay_to_exempt_parameters():
    optimizer = torch.optim.AdamW(build_param_groups(model(), 0.1))
    before, after = loaded(optimizer, lambda groups: groups[1].update(weight_decay=0.01))
    (change,) = decay_changes(before, after)
    assert (change.group, change.count, change.before, change.after) == (1, 3, 0.0, 0.01)
    assert change.names == ("0.bias", "1.weight", "1.bias")
    assert change.began
    assert str(change) == (
        "group 1: 3 parameters (0.bias, 1.weight, 1.bias) had weight_decay=0 and have 0.01"
    )


def test_a_load_that_takes_decay_away():
    optimizer = torch.optim.AdamW(build_param_groups(model(), 0.1))
    (change,) = decay_changes(*loaded(optimizer, lambda groups: groups[0].update(weight_decay=0.0)))
    assert str(change) == "group 0: 1 parameter (0.weight) had weight_decay=0.1 and has 0"
    assert not change.began


@pytest.mark.parametrize("decay", [0.1, 0.3])
def test_another_amount_is_no_change(decay):
    optimizer = torch.optim.AdamW(build_param_groups(model(), 0.1))
    assert decay_changes(*loaded(optimizer, lambda groups: groups[0].update(weight_decay=decay))) == []


def test_groups_of_another_shape_are_compared_by_tensor():
    net = model()
    (change,) = decay_changes(
        build_param_groups(net, 0.1), [{"params": list(net.parameters()), "weight_decay": 0.01}]
    )
    assert (change.group, change.names, change.count) == (0, (), 3)
    assert str(change) == "group 0: 3 parameters had weight_decay=0 and have 0.01"


def test_what_is_in_one_list_only_is_not_compared():
    net = model()
    assert decay_changes(build_param_groups(net[1]), [{"params": net[0].weight, "weight_decay": 0.1}]) == []
