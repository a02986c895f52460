"""Checkpoints of other groups: what is said of them, and how their state is carried over by name."""

import copy
import re
import warnings

import pytest
import torch
from common import assert_same_path, give_grads
from torch import nn

from fused_adamw import FusedHygieneAdamW, build_param_groups
from fused_adamw.groups import POLICIES

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def small_model(seed=0):
    """Policies disagree on it: an embedding, a norm that only its type tells, a square matrix."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def train(model, optimizer, steps=3, first=0):
    params = [p for p in model.parameters() if p.requires_grad]
    for step in range(first, first + steps):
        give_grads(params, step)
        optimizer.step()
    optimizer.zero_grad()


def by_dimension(model):
    """As nanoGPT's configure_optimizers."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def by_name(model):
    """As transformers' Trainer, whose patterns miss the norm of a Sequential but not its type."""
    exempt = {
        f"{i}.{name}" for i, m in enumerate(model) for name, _ in m.named_parameters() if "bias" in name
    }
    exempt |= {f"{i}.weight" for i, m in enumerate(model) if isinstance(m, nn.LayerNorm)}
    named = dict(model.named_parameters())
    return [
        {"params": [p for name, p in named.items() if name not in exempt], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if name in exempt], "weight_decay": 0.0},
    ]


SAVED = {
    "all": lambda model: model.parameters(),
    "nanogpt": by_dimension,
    "huggingface": by_name,
    "timm": lambda model: by_dimension(model)[::-1],
}


def saved_by(make, **options):
    """A model, the optimizer of torch that trained it, and its checkpoint."""
    model = small_model()
    optimizer = torch.optim.AdamW(make(model), **{**OPTIONS, **options})
    train(model, optimizer)
    return model, optimizer, copy.deepcopy(optimizer.state_dict())


def assert_same_state(models, optimizers):
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        a, b = (optimizer.state[x] for optimizer, x in zip(optimizers, (p, q), strict=True))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def message_of(optimizer, saved, error=ValueError):
    with pytest.raises(error) as raised:
        optimizer.load_state_dict(saved)
    return str(raised.value)


@pytest.mark.parametrize("policy", SAVED)
def test_both_calls_that_the_message_names_load_the_checkpoint(policy):
    """Taken from the message and run: one with the optimizer's groups, one with the checkpoint's."""
    trained, theirs, saved = saved_by(SAVED[policy])
    model = small_model()
    model.load_state_dict(trained.state_dict())
    optimizer = FusedHygieneAdamW(model, **OPTIONS)
    message = message_of(optimizer, saved)
    (by_name,) = re.findall(r"(optimizer\.load_state_dict_by_name\(.*?\)\)?) takes", message)
    (rebuilt,) = re.findall(r"(FusedHygieneAdamW\(.*?), \.\.\.\) loads it as it is", message)
    names = {
        "optimizer": optimizer,
        "state_dict": saved,
        "model": model,
        "build_param_groups": build_param_groups,
        "FusedHygieneAdamW": FusedHygieneAdamW,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(by_name, names)
    assert_same_state((trained, model), (theirs, optimizer))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

    same = eval(f"{rebuilt})", names)
    same.load_state_dict(saved)
    assert_same_state((trained, model), (theirs, same))
    for m, o in ((trained, theirs), (model, same)):
        train(m, o, first=3)
    assert_same_path(list(model.parameters()), list(trained.parameters()), 6)


def test_what_the_message_says_of_both_sides():
    model = small_model()
    message = message_of(FusedHygieneAdamW(model, **OPTIONS), saved_by(SAVED["timm"])[2])
    assert message.startswith(
        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group. "
        "The checkpoint has 2 groups, of 4 parameters (weight_decay=0.0), 3 (0.1); the optimizer has 2 "
        "groups, of 2 parameters (weight_decay=0.1), 5 (0.0). Its groups are those of policy 'timm': "
    )


def test_moments_of_other_shapes_are_refused_by_the_load():
    """Groups of the right sizes in another order: said at once, not by the first step."""
    model = nn.Sequential(nn.Linear(3, 2))
    theirs = torch.optim.AdamW([{"params": [model[0].bias]}, {"params": [model[0].weight]}])
    train(model, theirs, 1)
    optimizer = FusedHygieneAdamW(model)
    message = message_of(optimizer, theirs.state_dict(), RuntimeError)
    assert "the saved exp_avg of parameter '0.weight' is (2,) on cpu, expected (2, 3)" in message
    assert "has its parameters in another order" in message
    assert "those of policy 'timm'" in message  # as for nanogpt, the sizes are 1 and 1, but not the shapes
    assert "nanogpt" not in message
    assert not optimizer.state


@pytest.mark.parametrize("way", ["of groups", "copied"])
def test_without_the_model_the_message_says_what_to_name(way):
    optimizer = FusedHygieneAdamW(small_model())
    optimizer = (
        FusedHygieneAdamW(build_param_groups(small_model()))
        if way == "of groups"
        else copy.deepcopy(optimizer)
    )
    message = message_of(optimizer, saved_by(SAVED["all"])[2])
    assert (
        "optimizer.load_state_dict_by_name(state_dict, names), where names are model.named_parameters()"
        in message
    )
    assert "policy" in message


def test_the_model_is_not_kept_alive():
    import gc
    import weakref

    model = small_model()
    gone = weakref.ref(model)
    optimizer = FusedHygieneAdamW(model)
    del model
    gc.collect()
    assert gone() is None
    message_of(optimizer, saved_by(SAVED["all"])[2])


def test_a_checkpoint_with_names_needs_no_others():
    model = small_model()
    theirs = torch.optim.AdamW(model.named_parameters(), **OPTIONS)
    train(model, theirs)
    other = small_model(1)
    optimizer = FusedHygieneAdamW(other, **OPTIONS)
    assert "by name: optimizer.load_state_dict_by_name(state_dict)" in message_of(
        optimizer, theirs.state_dict()
    )
    optimizer.load_state_dict_by_name(theirs.state_dict())
    assert_same_state((model, other), (theirs, optimizer))
    assert [group["param_names"] for group in optimizer.param_groups] == [
        group["param_names"] for group in build_param_groups(other)
    ]


def test_groups_with_other_names_in_them_are_told_of_it():
    saved = FusedHygieneAdamW(small_model(), **OPTIONS).state_dict()
    other = FusedHygieneAdamW(build_param_groups(small_model(), overrides={"2.weight": True}))
    assert message_of(other, saved).endswith(
        "pair them by name: optimizer.load_state_dict_by_name(state_dict)"
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_training_goes_on_with_the_moments_and_the_new_decay(target, policy):
    """As torch's AdamW does whose groups were changed by hand, parameter by parameter."""
    model = small_model().to(target.device)
    groups = build_param_groups(model, 0.1, policy=policy)
    theirs = torch.optim.AdamW([{**group} for group in groups], lr=1e-2, betas=(0.8, 0.95))
    train(model, theirs)
    other = small_model().to(target.device)
    other.load_state_dict(model.state_dict())
    optimizer = target.adamw(other, weight_decay=0.2)
    nameless = copy.deepcopy(theirs.state_dict())
    for group in nameless["param_groups"]:
        del group["param_names"]
    optimizer.load_state_dict_by_name(nameless, groups)
    states = {p: theirs.state[p] for p in model.parameters()}
    peer = torch.optim.AdamW(build_param_groups(model, 0.2), lr=1e-2, betas=(0.8, 0.95))
    peer.state.update(states)
    for m, o in ((model, peer), (other, optimizer)):
        train(m, o, first=3)
    assert_same_path([p.cpu() for p in other.parameters()], [p.cpu() for p in model.parameters()], 6)


def test_options_go_with_their_parameters():
    """All but the decay; what a scheduler left, too, so that one can be built with `last_epoch`."""
    model, theirs, _ = saved_by(SAVED["all"], betas=(0.8, 0.9), amsgrad=True)
    theirs.param_groups[0].update(lr=5e-4, initial_lr=7e-4, weight_decay=0.3)
    optimizer = FusedHygieneAdamW(model, lr=1.0, weight_decay=0.2, max_grad_norm=1.0)
    optimizer.load_state_dict_by_name(theirs.state_dict(), model.named_parameters())
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (5e-4, 7e-4, decay)
        assert (group["betas"], group["amsgrad"]) == ((0.8, 0.9), True)
    assert optimizer.max_grad_norm == 1.0
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step, last_epoch=3)
    assert [group["lr"] for group in optimizer.param_groups] == [7e-4 * 0.5**4] * 2


def test_learning_rates_per_layer_stay():
    model, _, saved = saved_by(SAVED["all"])
    groups = build_param_groups(model, 0.1, overrides={"3.*": {"lr_scale": 10.0}}, lr=0.5)
    optimizer = FusedHygieneAdamW(groups)
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert len(set(lrs)) == 2
    optimizer.load_state_dict_by_name(saved, model.named_parameters())
    assert [group["lr"] for group in optimizer.param_groups] == lrs


def test_options_on_which_groups_disagree_stay():
    model = small_model()
    groups = by_dimension(model)
    groups[0]["lr"], groups[1]["lr"] = 0.1, 0.2
    theirs = torch.optim.AdamW(groups)
    train(model, theirs)
    optimizer = FusedHygieneAdamW(model, lr=0.3)
    optimizer.load_state_dict_by_name(theirs.state_dict(), build_param_groups(model, policy="nanogpt"))
    # Of the two that decay here both were in the first group; the others come from both.
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]


def test_frozen_parameters_that_the_saved_optimizer_had():
    """torch.optim.AdamW(model.parameters()) lists them, without a state; ours has none of them."""
    model = small_model()
    model[1].requires_grad_(False)
    theirs = torch.optim.AdamW(model.parameters())
    train(model, theirs)
    other = copy.deepcopy(model)
    optimizer = FusedHygieneAdamW(other)
    assert "model.named_parameters()" in message_of(optimizer, theirs.state_dict())
    optimizer.load_state_dict_by_name(theirs.state_dict(), model.named_parameters())
    names = [name for name, p in other.named_parameters() if p.requires_grad]
    pairs = [(dict(model.named_parameters())[n], dict(other.named_parameters())[n]) for n in names]
    assert all(torch.equal(theirs.state[p]["exp_avg"], optimizer.state[q]["exp_avg"]) for p, q in pairs)


def test_trainable_parameters_alone():
    model = small_model()
    model[1].requires_grad_(False)
    theirs = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, theirs)
    message = message_of(FusedHygieneAdamW(model), theirs.state_dict())
    assert "those of policy 'all'" in message


def test_a_wrapped_model_has_the_names_of_the_model():
    model, theirs, saved = saved_by(SAVED["all"])
    optimizer = FusedHygieneAdamW(small_model())
    optimizer.load_state_dict_by_name(
        saved, [f"module._orig_mod.{name}" for name, _ in model.named_parameters()]
    )
    assert len(optimizer.state) == len(theirs.state)


def test_other_parameters_are_refused_unless_they_may_be():
    model, theirs, saved = saved_by(SAVED["all"])
    names = [name for name, _ in model.named_parameters()]
    optimizer = FusedHygieneAdamW(small_model())
    renamed = ["old.weight" if name == "3.weight" else name for name in names]
    wrong = "1 only in the optimizer: 3.weight; 1 only in the checkpoint: old.weight. With strict=False"
    with pytest.raises(ValueError, match=wrong):
        optimizer.load_state_dict_by_name(saved, renamed)
    assert not optimizer.state
    optimizer.load_state_dict_by_name(saved, renamed, strict=False)
    assert len(optimizer.state) == len(names) - 1
    del theirs


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "the checkpoint has no names of parameters: pass them in its order"),
        (["a"], "expected one for each of the checkpoint's 7 parameters, all different, got 1, of which 1"),
        (["a"] * 7, "got 7, of which 1 are different"),
        ([{"params": [1]}], "expected groups that list their parameters' names as param_names"),
    ],
    ids=["none", "too few", "ambiguous", "nameless groups"],
)
def test_names_that_cannot_be_right(names, message):
    optimizer = FusedHygieneAdamW(small_model())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict_by_name(saved_by(SAVED["all"])[2], names)
    assert not optimizer.state


def test_an_optimizer_without_names():
    optimizer = FusedHygieneAdamW(small_model().parameters())
    with pytest.raises(ValueError, match="the optimizer's parameters have no names to be found by"):
        optimizer.load_state_dict_by_name(saved_by(SAVED["all"])[2], ["a"])


def test_names_in_the_wrong_order_are_found_by_shapes():
    model, _, saved = saved_by(SAVED["all"])
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(RuntimeError, match=r"the saved exp_avg of parameter .* is \(.*expected .*Are names"):
        FusedHygieneAdamW(small_model()).load_state_dict_by_name(saved, names[::-1])


def test_the_checkpoint_is_neither_changed_nor_shared():
    model, _, saved = saved_by(SAVED["all"])
    before = copy.deepcopy(saved)
    optimizer = FusedHygieneAdamW(model, **OPTIONS)
    optimizer.load_state_dict_by_name(saved, model.named_parameters())
    train(model, optimizer)
    assert saved["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        assert all(torch.equal(saved["state"][i][key], value) for key, value in state.items())


def test_state_of_no_parameter_stays():
    model, _, saved = saved_by(SAVED["all"])
    saved["state"]["ema"] = {"decay": torch.tensor(0.5)}
    optimizer = FusedHygieneAdamW(model)
    optimizer.load_state_dict_by_name(saved, model.named_parameters())
    assert optimizer.state["ema"]["decay"] == 0.5


# What a load changes of which parameters decay.


def loaded(optimizer, decays):
    """Load a checkpoint of the same groups with another weight decay."""
    saved = copy.deepcopy(optimizer.state_dict())
    for group, decay in zip(saved["param_groups"], decays, strict=True):
        group["weight_decay"] = decay
    optimizer.load_state_dict(saved)
    return optimizer


def test_a_load_that_gives_decay_back_says_so():
    model = small_model()
    with pytest.warns(UserWarning, match="which parameters decay") as found:
        optimizer = loaded(FusedHygieneAdamW(model, weight_decay=0.1), [0.1, 0.01])
    (message,) = [str(w.message) for w in found]
    assert "group 1: 5 parameters (0.weight, 1.bias, 2.weight, …) had weight_decay=0 and have 0.01" in message
    line = message.partition("add after the load: ")[2]
    exec(line, {"optimizer": optimizer})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_several_groups_take_one_line():
    groups = build_param_groups(small_model(), 0.1, overrides={"3.*": {"lr_scale": 10.0}}, lr=0.5)
    decays = [group["weight_decay"] for group in groups]
    with pytest.warns(UserWarning, match="which parameters decay") as found:
        optimizer = loaded(FusedHygieneAdamW(groups), [0.0, 0.1, 0.0, 0.1])
    exec(str(found[0].message).partition("add after the load: ")[2], {"optimizer": optimizer})
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays


@pytest.mark.parametrize(
    ("make", "decays"),
    [
        (lambda: FusedHygieneAdamW(small_model(), weight_decay=0.1), [0.05, 0.0]),
        (lambda: FusedHygieneAdamW(small_model().parameters()), [0.0]),
        (lambda: FusedHygieneAdamW(small_model().parameters()), [0.3]),
    ],
    ids=["another value", "one group", "one group with another value"],
)
def test_what_changes_no_decision_is_not_remarked_on(make, decays):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(make(), decays)


def test_a_warning_that_is_an_error_has_changed_nothing():
    optimizer = FusedHygieneAdamW(small_model(), weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="changes which parameters decay"):
            loaded(optimizer, [0.1, 0.01])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("ours", "saved", "warned"), [(None, 1.0, True), (2.0, 1.0, True), (1.0, 1.0, False), (None, 0.0, False)]
)
def test_a_threshold_in_a_checkpoint_has_no_effect(ours, saved, warned):
    """As apex's FusedLAMB and DeepSpeed keep it; 0 is off there."""
    optimizer = FusedHygieneAdamW(small_model().parameters(), max_grad_norm=ours)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["max_grad_norm"] = saved
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer.load_state_dict(state_dict)
    texts = [str(w.message) for w in found]
    assert any("groups have max_grad_norm=1.0, which changes nothing" in text for text in texts) == warned
    assert optimizer.max_grad_norm == ours
