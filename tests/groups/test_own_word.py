"""What a model says of itself through torch's public methods counts, and what torch takes an argument for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_adamw import FusedHygieneAdamW
from fused_adamw.groups import (
    ParamGroupWarning,
    build_param_groups,
    explain_param_groups,
    get_optimizer_grouped_parameters,
    new_param_groups,
    summarize_param_groups,
)

from .helpers import assert_partition, decays


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


class Captioner(nn.Module):
    """Keeps its language model as it is."""

    def __init__(self):
        super().__init__()
        self.gpt = nn.Linear(4, 4)
        self.project = nn.Linear(4, 4)

    def parameters(self, recurse=True):
        return self.project.parameters()


class Hidden(nn.Module):
    """Hides its teacher from everything that asks for parameters."""

    def __init__(self):
        super().__init__()
        self.gpt = nn.Linear(4, 4)
        self.project = nn.Linear(4, 4)

    def named_parameters(self, *args, **kwargs):
        return ((n, p) for n, p in super().named_parameters(*args, **kwargs) if "gpt" not in n)


class Skipping(nn.Module):
    """Hides it one level deeper."""

    def __init__(self):
        super().__init__()
        self.gpt = nn.Linear(4, 4)
        self.project = nn.Linear(4, 4)

    def named_modules(self, *args, **kwargs):
        return ((n, m) for n, m in super().named_modules(*args, **kwargs) if n != "gpt")


def on_the_instance():
    model = nn.ModuleDict({"gpt": nn.Linear(4, 4), "project": nn.Linear(4, 4)})
    model.parameters = lambda recurse=True: iter(model["project"].parameters())
    return model


RESTRICTED = pytest.mark.parametrize("make", [Captioner, Hidden, Skipping, on_the_instance])
EXPECTED = {"project.weight": True, "project.bias": False}


@RESTRICTED
def test_what_a_model_leaves_out_is_in_no_group(make):
    model = make()
    groups = FusedHygieneAdamW(model).param_groups
    peer = torch.optim.AdamW(model.parameters()).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for g in peer for p in g["params"]}
    for build in (build_param_groups, get_optimizer_grouped_parameters):
        assert decays(build(model, 0.1)) == EXPECTED
        assert_partition(model, build(model, 0.1))
    report = explain_param_groups(model, groups=groups)
    assert [d.name for d in report.decisions] == list(EXPECTED)
    assert not report.lints
    assert new_param_groups(model, groups) == []
    assert summarize_param_groups(groups, model) == "decay: 1 params, no_decay: 1 params"
    with pytest.raises(ValueError, match=r"override 'gpt.\*' matches no parameter"):
        build_param_groups(model, overrides={"gpt.*": False})


@RESTRICTED
def test_wrappers_do_not_change_that(make):
    model = make()
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert decays(build_param_groups(wrapped, 0.1)) == EXPECTED


def test_a_wrapper_of_ones_own_has_a_word_too():
    class HeadOnly(nn.DataParallel):
        def parameters(self, recurse=True):
            return self.module["head"].parameters()

    wrapped = HeadOnly(nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)}))
    assert decays(build_param_groups(wrapped)) == {"head.weight": True, "head.bias": False}


def test_what_is_left_out_need_not_be_fit_for_an_optimizer():
    model = Captioner()
    model.gpt = nn.LazyLinear(4)
    assert decays(build_param_groups(model, 0.1)) == EXPECTED


def test_a_submodule_that_leaves_out_what_the_model_yields_is_reported():
    model = nn.ModuleDict({"captioner": Captioner(), "head": nn.Linear(4, 2)})
    with pytest.warns(ParamGroupWarning, match=r"a submodule leaves out .*: captioner.gpt.weight"):
        groups = build_param_groups(model)
    assert_partition(model, groups)  # as torch.optim.AdamW(model.parameters()) would


class Plain(nn.Module):
    """Keeps layers in plain attributes, and yields them itself."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.layers = [nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4)]
        self.named = {"norm": nn.LayerNorm(4)}
        self.weights = (nn.Parameter(torch.ones(2, 4)),)
        self.__dict__["pos_embed"] = nn.Parameter(torch.ones(1, 9, 4))

    def parameters(self, recurse=True):
        yield from (p for layer in self.layers for p in layer.parameters())
        yield from self.named["norm"].parameters()
        yield from (*self.weights, self.pos_embed)
        yield from super().parameters()


def test_what_only_the_model_knows_is_in_a_group_and_found_by_type():
    model = Plain()
    assert_partition(model, build_param_groups(model))
    assert decays(build_param_groups(model)) == {
        "layers.0.weight": True,
        "layers.0.bias": False,
        "layers.1.weight": False,
        "layers.1.bias": False,
        "layers.2.weight": False,
        "named.norm.weight": False,
        "named.norm.bias": False,
        "weights.0": True,
        "pos_embed": False,
        "head.weight": True,
        "head.bias": False,
    }


def test_a_tensor_from_nowhere_is_named_by_the_model_or_numbered():
    hidden = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]

    class Model(nn.Linear):
        def parameters(self, recurse=True):
            return iter([*super().parameters(), *hidden])

        def named_parameters(self, *args, **kwargs):
            yield from super().named_parameters(*args, **kwargs)
            yield "other.pos_embed", hidden[0]

    assert decays(build_param_groups(Model(2, 2))) == {
        "weight": True,
        "other.pos_embed": False,
        "parameters.1": False,
        "bias": False,
    }


def test_the_summary_counts_what_is_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = build_param_groups(model)
    assert summarize_param_groups(groups, model) == (
        "decay: 1 params, no_decay: 1 params; 2 frozen params are in no group: once unfrozen, add what "
        "fused_adamw.groups.new_param_groups returns"
    )
    model.requires_grad_(True)
    assert summarize_param_groups([*groups, *new_param_groups(model, groups)], model) == (
        "decay: 2 params, no_decay: 2 params"
    )
