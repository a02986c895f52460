"""Marks on tensors and hooks of modules, at any depth, scoped to the module that declares them."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

from fused_adamw.groups import ParamGroupWarning, build_param_groups, explain_param_groups

from .helpers import decays


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mystery = nn.Parameter(torch.ones(3, 2, 2))
        self.proj = nn.Linear(2, 2, bias=False)


class Hooked(Attention):
    """XCiT and EdgeNeXt declare their temperature in an inner module; timm never asks it."""

    def no_weight_decay(self):
        return {"mystery"}


pytestmark = pytest.mark.filterwarnings("ignore:not recognised")


def answers(model, **kwargs):
    return decays(build_param_groups(model, 0.1, **kwargs))


def test_inner_hook_is_scoped_to_its_module():
    model = nn.ModuleDict({"hooked": Hooked(), "plain": Attention(), "mystery": nn.Linear(2, 2, bias=False)})
    assert answers(model) == {
        "hooked.mystery": False,
        "hooked.proj.weight": True,
        "plain.mystery": True,
        "plain.proj.weight": True,
        "mystery.weight": True,
    }
    report = explain_param_groups(model)
    assert report["hooked.mystery"] == (
        "hooked.mystery does not decay: Hooked.no_weight_decay() of hooked lists 'mystery'."
    )


def test_outer_hook_uses_paths_and_globs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Attention(), Attention()])

        def no_weight_decay(self):
            return ["layers.*.mystery"]

    assert answers(Model()) == {
        "layers.0.mystery": False,
        "layers.0.proj.weight": True,
        "layers.1.mystery": False,
        "layers.1.proj.weight": True,
    }


def test_a_hook_that_lists_wrapped_names():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.compile(Attention())

        def no_weight_decay(self):
            return {name for name, _ in self.named_parameters() if "mystery" in name}

    assert answers(Model()) == {"inner.mystery": False, "inner.proj.weight": True}


def test_keywords_match_whole_components():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 2, bias=False))
            self.not_cpb_mlp = nn.Linear(2, 2, bias=False)

        def no_weight_decay_keywords(self):
            return {"cpb_mlp"}

    assert answers(Model()) == {"cpb_mlp.0.weight": False, "not_cpb_mlp.weight": True}


def test_patterns():
    class Model(Attention):
        def no_weight_decay_patterns(self):
            return ("pro?.*",)

    assert answers(Model()) == {"mystery": True, "proj.weight": False}


def test_marks_on_tensors():
    model = Attention()
    model.proj.weight._no_weight_decay = True
    assert answers(model) == {"mystery": True, "proj.weight": False}
    model.proj.weight._no_weight_decay = False
    assert answers(model)["proj.weight"]


def test_optim_dict_of_s4():
    model = Attention()
    model.mystery._optim = {"lr": 0.001, "weight_decay": 0.0}
    groups = build_param_groups(model, 0.1)
    (group,) = [group for group in groups if group["param_names"] == ["mystery"]]
    assert (group["lr"], group["weight_decay"]) == (0.001, 0.0)
    assert set(group) == {"params", "param_names", "weight_decay", "lr"}


def test_mark_on_a_tied_tensor_counts_at_every_place():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)
            self.b = Hooked()
            self.b.mystery = self.a.weight

    assert not answers(Model())["a.weight"]


@pytest.mark.parametrize("policy", ["recipe", "huggingface", "timm", "nanogpt", "megatron", "all"])
def test_only_hygiene_reads_marks(policy):
    model = nn.Sequential(Hooked())  # timm reads the outermost hook only
    model[0].proj.weight._no_weight_decay = True
    assert set(answers(model, policy=policy).values()) == {True}


def test_a_mark_lost_in_a_copy_is_reported():
    layer = Attention()
    layer.mystery._no_weight_decay = True
    model = nn.ModuleList([layer, copy.deepcopy(layer)])
    if hasattr(model[1].mystery, "_no_weight_decay"):
        del model[1].mystery._no_weight_decay  # a torch that keeps attributes in copies
    with pytest.warns(ParamGroupWarning, match=r"carries _no_weight_decay: 1.mystery"):
        build_param_groups(model, 0.1)


def test_marking_one_linear_layer_says_nothing_about_the_others():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight._no_weight_decay = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParamGroupWarning)
        assert answers(model)["1.weight"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("pos_embed", r"no_weight_decay of Model \(the model\) returned 'pos_embed'; expected a collection"),
        (None, "returned None; expected a collection of parameter names"),
        (ZeroDivisionError("oops"), "raised ZeroDivisionError: oops; expected it to list names"),
    ],
)
def test_bad_hooks(returned, message):
    class Model(Attention):
        def no_weight_decay(self):
            if isinstance(returned, Exception):
                raise returned
            return returned

    with pytest.raises(ValueError, match=message):
        build_param_groups(Model())


FORMS = {
    "method": lambda self: {"mystery"},
    "property": property(lambda self: {"mystery"}),
    "property that reads the instance": property(lambda self: self.listed),
    "class method": classmethod(lambda cls: ("mystery",)),
    "static method": staticmethod(lambda: ["mystery"]),
    "set": {"mystery"},
    "tuple": ("mystery",),
    "partial": functools.partial(list, ["mystery"]),
}


@pytest.mark.parametrize("hook", ["no_weight_decay", "no_weight_decay_patterns", "no_weight_decay_keywords"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_hook(hook, form):
    model = type("Model", (Attention,), {hook: FORMS[form]})()
    model.listed = ["mystery"]
    assert answers(nn.Sequential(model)) == {"0.mystery": False, "0.proj.weight": True}


def test_a_hook_on_the_instance():
    for value in (lambda: {"mystery"}, {"mystery"}):
        model = Attention()
        model.no_weight_decay = value
        assert answers(model) == {"mystery": False, "proj.weight": True}


def test_timms_policy_reads_a_property_too():
    model = type("Model", (Attention,), {"no_weight_decay": property(lambda self: {"mystery"})})()
    assert answers(model, policy="timm") == {"mystery": False, "proj.weight": True}


def test_a_property_that_fails():
    model = type("Model", (Attention,), {"no_weight_decay": property(lambda self: 1 / 0)})()
    with pytest.raises(ValueError, match=r"no_weight_decay of Model .* raised ZeroDivisionError"):
        answers(model)


def test_empty_hooks():
    class Model(Attention):
        def no_weight_decay(self):
            return {}

    assert answers(Model())["proj.weight"]
