"""torch.distributed.checkpoint in one process: both forms, both ways, with and without names, through files.

It pairs parameters by their names in the model, so groups may be composed differently on both sides.
"""

import copy
import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from common import assert_same_path, give_grads
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

from fused_adamw import FusedHygieneAdamW, build_param_groups

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)"),
    pytest.mark.filterwarnings("ignore:the checkpoint has no options for a group"),
    pytest.mark.filterwarnings("ignore:the checkpoint's weight decay replaces"),
]

MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
ADAMW = {
    "torch": lambda model: torch.optim.AdamW(model.parameters(), **OPTIONS),
    "torch, named": lambda model: torch.optim.AdamW(model.named_parameters(), **OPTIONS),
    "torch, groups": lambda model: torch.optim.AdamW(build_param_groups(model, 0.1), **OPTIONS),
    "ours": lambda model: FusedHygieneAdamW(model.parameters(), **OPTIONS),
    "ours, named": lambda model: FusedHygieneAdamW(model.named_parameters(), **OPTIONS),
    "ours, module": lambda model: FusedHygieneAdamW(model, **OPTIONS),
}
# torch looks for the live groups' names in the checkpoint: KeyError, whatever the class.
NAMELESS_INTO_NAMED = set(
    itertools.product(("torch", "ours"), ("torch, named", "torch, groups", "ours, named"))
)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def train(model, optimizer, steps=3, first=0, **grads):
    for step in range(first, first + steps):
        give_grads(list(model.parameters()), step, **grads)
        optimizer.step()
    optimizer.zero_grad()


def trained(make):
    model = small_model()
    optimizer = make(model)
    train(model, optimizer)
    return model, optimizer


def assert_same_state(models, optimizers):
    """Step counts and moments agree bit for bit, parameter by parameter."""
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        a, b = (optimizer.state[x] for optimizer, x in zip(optimizers, (p, q), strict=True))
        assert a.keys() == b.keys() == {"step", *MOMENTS}
        assert a["step"].item() == b["step"].item() == 3
        assert all(torch.equal(a[key], b[key]) for key in MOMENTS)


def names_of(model, optimizer):
    """By name, as the model has them, the parameters of each group."""
    names = {p: name for name, p in model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("source", "target"),
    [pair for pair in itertools.product(ADAMW, ADAMW) if any(name.startswith("ours") for name in pair)],
    ids=lambda name: name.replace(", ", "-"),
)
def test_any_into_any(source, target, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = trained(ADAMW[source])
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other = small_model(seed=1)
    resumed = ADAMW[target](other)
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    if flat and (source, target) in NAMELESS_INTO_NAMED:
        with pytest.raises(KeyError, match="param_names"):
            set_optimizer_state_dict(other, resumed, saved, options=options)
        return
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert_same_state((model, other), (optimizer, resumed))
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    if target.startswith("ours"):
        for group, names in zip(resumed.param_groups, names_of(other, resumed), strict=True):
            assert group.get("param_names", names) == names


@pytest.mark.parametrize("source", ["torch", "torch, named", "torch, groups"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_training_goes_on_as_with_torch(target, source, flat):
    """From a checkpoint of torch's AdamW, with its decay on all parameters, and as torch goes on."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = trained(ADAMW[source])
    other = small_model().to(target.device)
    other.load_state_dict(model.state_dict())
    resumed = target.adamw(other, **OPTIONS)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, first=3)
    assert_same_path([p.cpu() for p in other.parameters()], list(model.parameters()), 6)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_keys_are_those_of_torch(flat):
    """Clipping, skipping and the choice of a backend leave no key of ours in a checkpoint."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    keys = []
    for make in (
        lambda model: torch.optim.AdamW(build_param_groups(model, 0.1)),
        lambda model: FusedHygieneAdamW(model, max_grad_norm=1.0, skip_nonfinite=True, backend="native"),
    ):
        saved = get_optimizer_state_dict(*trained(make), options=options)
        groups = [] if flat else [key for group in saved["param_groups"] for key in group]
        states = [] if flat else [(name, key) for name, state in saved["state"].items() for key in state]
        keys.append([sorted(saved), groups, states])
    assert keys[0] == keys[1]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("ours, module", "ours, module"),
        ("ours, module", "torch, groups"),
        ("torch, groups", "ours, module"),
        ("torch", "ours"),
        ("ours", "torch"),
    ],
)
def test_through_files(tmp_path, source, target, flat):
    """With equal groups on both sides: what is not in the file cannot be asked of it, in torch either."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = trained(ADAMW[source])
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    other = small_model(seed=1)
    resumed = ADAMW[target](other)
    weights, state = get_state_dict(other, resumed, options=options)
    into = {"model": weights, "optimizer": state}
    dcp.load(into, checkpoint_id=tmp_path)
    other.load_state_dict(into["model"])
    set_optimizer_state_dict(other, resumed, into["optimizer"], options=options)
    assert_same_state((model, other), (optimizer, resumed))
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, first=3)
    assert_same_path(list(other.parameters()), list(model.parameters()), 6)


def test_a_file_without_names_into_an_optimizer_of_a_module(tmp_path):
    """Torch's planner asks the file for every key of the optimizer, unless it is told not to."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = trained(ADAMW["torch"])
    dcp.save(get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=tmp_path)
    other = small_model(seed=1)
    resumed = FusedHygieneAdamW(other, **OPTIONS)
    into = get_optimizer_state_dict(other, resumed, options=options)
    dcp.load(into, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(other, resumed, into, options=options)
    assert_same_state((model, other), (optimizer, resumed))


def test_names_stay_where_groups_are_composed_differently():
    """A loaded group has the names of its parameters, not of the group that its options came from."""
    model, optimizer = trained(ADAMW["ours, named"])
    other = small_model()
    resumed = FusedHygieneAdamW(other, **OPTIONS)
    for flat in (False, True, False):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        set_optimizer_state_dict(other, resumed, saved, options=options)
        assert [group["param_names"] for group in resumed.param_groups] == names_of(other, resumed)


def test_options_that_a_nested_checkpoint_loses_stay():
    """Of one saved group, torch gives the options to one live group alone; its own AdamW cannot step then."""
    saved = get_optimizer_state_dict(*trained(ADAMW["torch"]))
    model = small_model()
    resumed = FusedHygieneAdamW(model, lr=3e-4, weight_decay=0.2, amsgrad=True)
    with pytest.warns(UserWarning, match=r"no options for a group of 2 parameters, which keeps its own"):
        set_optimizer_state_dict(model, resumed, saved)
    first, last = resumed.param_groups
    assert (first["lr"], first["weight_decay"], first["amsgrad"]) == (3e-4, 0.2, True)
    assert (last["lr"], last["weight_decay"], last["amsgrad"]) == (1e-2, 0.1, False)
    assert first.keys() == last.keys()
    train(model, resumed, first=3)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("through_file", [False, True])
def test_decay_that_a_load_gives_back_is_told(tmp_path, flat, through_file):
    """By name a checkpoint of one group loads into several; the line in the warning keeps what is exempt."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(*trained(ADAMW["torch"]), options=options)
    model = small_model()
    resumed = FusedHygieneAdamW(model, **OPTIONS)
    if through_file:
        dcp.save(saved, checkpoint_id=tmp_path)
        if flat:  # nested groups are paired by position in the file, so the whole of it is read
            saved = get_optimizer_state_dict(model, resumed, options=options)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(saved, checkpoint_id=tmp_path, planner=planner)
    with pytest.warns(UserWarning, match="changes which parameters decay") as found:
        set_optimizer_state_dict(model, resumed, saved, options=options)
    (message,) = [text for w in found if "which parameters decay" in (text := str(w.message))]
    assert "group 1: 4 parameters" in message
    exec(message.partition("add after the load: ")[2], {"optimizer": resumed})
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.1, 0.0]


def test_a_nested_state_dict_is_regrouped_by_its_names():
    model, optimizer = trained(ADAMW["torch"])
    saved = get_optimizer_state_dict(model, optimizer)
    other = small_model(seed=1)
    resumed = FusedHygieneAdamW(other, lr=0.5, weight_decay=0.2)
    resumed.load_state_dict_by_name(saved)
    assert_same_state((model, other), (optimizer, resumed))
    assert [(group["lr"], group["weight_decay"]) for group in resumed.param_groups] == [
        (1e-2, 0.2),
        (1e-2, 0.0),
    ]


def test_groups_saved_by_position_are_still_compared():
    _, optimizer = trained(ADAMW["ours, module"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"].reverse()
    with pytest.raises(ValueError, match="changed place inside a group"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("way", ["copied", "loaded before"])
def test_an_optimizer_of_a_module_keeps_loading_checkpoints_without_names(way):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(*trained(ADAMW["torch"]), options=options)
    model = small_model()
    resumed = FusedHygieneAdamW(model, **OPTIONS)
    if way == "copied":
        model, resumed = copy.deepcopy((model, resumed))
    else:
        resumed.load_state_dict(trained(ADAMW["ours, module"])[1].state_dict())
    for state in resumed.state.values():
        state["step"].zero_()
    set_optimizer_state_dict(model, resumed, saved, options=options)
    assert all(state["step"].item() == 3 for state in resumed.state.values())


def test_making_a_template_leaves_parameters_alone(target):
    """Torch makes the state by a step with gradients of 0 and an lr of 0, a tensor where lr is one."""
    for lr in (1e-2, torch.tensor(1e-2)):
        model = small_model().to(target.device)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = target.adamw(model, lr=lr, weight_decay=0.5, max_grad_norm=1.0, skip_nonfinite=True)
        get_optimizer_state_dict(model, optimizer)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert optimizer.param_groups[0]["lr"] is lr
        assert optimizer.grad_norm.item() == 0.0


def test_an_empty_group_keeps_its_options():
    """PyTorch #143828: lr and betas of a group without parameters were lost."""

    def make(model):
        groups = [{"params": list(model.parameters())}, {"params": [], "lr": 0.5, "betas": (0.1, 0.2)}]
        return FusedHygieneAdamW(groups, lr=1e-2)

    model, optimizer = trained(make)
    saved = get_optimizer_state_dict(model, optimizer)
    other = small_model()
    resumed = FusedHygieneAdamW([{"params": list(other.parameters())}, {"params": []}])
    set_optimizer_state_dict(other, resumed, saved)
    assert [group["lr"] for group in resumed.param_groups] == [1e-2, 0.5]
    assert resumed.param_groups[1]["betas"] == (0.1, 0.2)
    assert_same_state((model, other), (optimizer, resumed))
