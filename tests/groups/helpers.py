"""Small readers of parameter groups."""

import torch


def decays(groups):
    """Maps each name to whether its group decays."""
    return {name: group["weight_decay"] > 0 for group in groups for name in group["param_names"]}


def counts(groups):
    """Returns (tensors that decay, tensors that do not), and the same in values."""
    tensors, values = [0, 0], [0, 0]
    for group in groups:
        index = 0 if group["weight_decay"] > 0 else 1
        tensors[index] += len(group["params"])
        values[index] += sum(param.numel() for param in group["params"])
    return tuple(tensors), tuple(values)


def assert_partition(model, groups):
    """Every trainable tensor is in exactly one group, under a name of its own, and nothing else is."""
    grouped = [param for group in groups for param in group["params"]]
    names = [name for group in groups for name in group["param_names"]]
    expected = {id(param) for param in model.parameters() if param.requires_grad}
    assert len(grouped) == len({id(param) for param in grouped}) == len(expected)
    assert {id(param) for param in grouped} == expected
    assert len(set(names)) == len(names) == len(grouped)
    assert all(len(group["params"]) == len(group["param_names"]) for group in groups)
    assert all(isinstance(param, torch.Tensor) for param in grouped)
