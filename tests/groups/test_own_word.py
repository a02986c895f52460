"""What a model says of itself through torch's public methods counts, and so does what torch takes it for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_adamw import FusedHygieneAdamW


class Doubles(nn.ParameterList):
    """A subclass is iterated too."""


class Layers(nn.Module):
    """Iterates over its own tensors."""

    def __init__(self, tensors):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_parameter(f"p{i}", tensor)

    def __iter__(self):
        return iter(self._parameters.values())


def tensors():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), (2, 2, 2))]


@pytest.mark.parametrize("hold", [nn.ParameterList, Doubles, Layers])
def test_a_module_that_torch_iterates_is_tensors(hold, recwarn):
    ours, theirs = hold(tensors()), hold(tensors())
    optimizer = FusedHygieneAdamW(ours, lr=0.1, weight_decay=0.5)
    peer = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.5)
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in peer.param_groups]
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.ones_like(p)
            q.grad = torch.ones_like(q)
        optimizer.step()
        peer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    assert not recwarn.list


def test_a_parameter_dict_is_refused_as_in_torch():
    for optimizer in (torch.optim.AdamW, FusedHygieneAdamW):
        with pytest.raises(TypeError, match="can only optimize Tensors"):
            optimizer(nn.ParameterDict({"weight": nn.Parameter(torch.ones(2, 2))}))


@pytest.mark.parametrize("hold", [nn.Sequential, nn.ModuleList])
def test_a_module_that_iterates_over_modules_is_a_model(hold):
    optimizer = FusedHygieneAdamW(hold([nn.Linear(2, 2)]) if hold is nn.ModuleList else hold(nn.Linear(2, 2)))
    assert [g["param_names"] for g in optimizer.param_groups] == [["0.weight"], ["0.bias"]]
