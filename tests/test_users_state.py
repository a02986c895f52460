"""What users put into an optimizer's state, hold of it, or change in hooks is theirs."""

import copy

import pytest
import torch
from common import assert_same_path, give_grads, parameters
from test_state import SHAPES, through_a_file, torch_adamw, train, trained


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_load_post_hooks_have_the_last_word(target, key):
    params = parameters(SHAPES, device=target.device)
    optimizer = trained(target.adamw, params)

    def edit(o):
        for state in o.state.values():
            state[key] = torch.ones_like(state[key])

    optimizer.register_load_state_dict_post_hook(edit, prepend=True)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(state[key].eq(1).all() for state in optimizer.state.values())


class Subclass(torch.Tensor):
    """Neither stores nor does anything of its own."""


@pytest.mark.parametrize("of", ["parameter", "file"])
def test_moments_are_plain_whatever_subclass_was_there(target, of):
    """At the first step and after loading, so that files need nothing of the subclass to be read."""
    values = torch.ones(3, device=target.device)
    p = torch.nn.Parameter(values.as_subclass(Subclass) if of == "parameter" else values)
    optimizer = target.adamw([p])
    for _ in range(2):
        p.grad = torch.ones(3, device=target.device)
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    if of == "file":
        state = saved["state"][0]
        saved["state"][0] = {
            key: torch.nn.Parameter(value).as_subclass(Subclass) for key, value in state.items()
        }
    optimizer.load_state_dict(saved)
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in optimizer.state[p].values())
    through_a_file(optimizer.state_dict())


@pytest.mark.parametrize("form", ["shape (1,)", "shape (1, 1)", "float64", "int64", "bfloat16"])
def test_a_step_count_that_others_hold_counts(target, form):
    """As where several processes share it."""
    pairs = []
    for make in (target.adamw, torch_adamw):
        params = parameters(SHAPES, device=target.device)
        optimizer = trained(make, params)
        held = []
        for state in optimizer.state.values():
            step = state["step"]
            shaped = step.reshape([1] * form.count("1")) if "shape" in form else step.to(getattr(torch, form))
            state["step"] = shaped.clone()
            held.append(state["step"])
        train([(optimizer, params)], first=3)
        assert all(state["step"] is h for state, h in zip(optimizer.state.values(), held, strict=True))
        pairs.append((params, held))
    (ours, mine), (theirs, peers) = pairs
    assert_same_path(ours, theirs, 6)
    assert [h.item() for h in mine] == [h.item() for h in peers] == [6] * len(SHAPES)
    assert [(h.shape, h.dtype) for h in mine] == [(h.shape, h.dtype) for h in peers]


@pytest.mark.parametrize(
    "value", [5, None, "x", [1, 2], {"exp_avg": 1}, torch.ones(2)], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("key", ["lora.q_proj", 7, None], ids=str)
def test_what_users_keep_in_the_state_is_saved_and_loaded_as_in_torch(target, key, value):
    ends = []
    for make in (target.adamw, torch_adamw):
        params = parameters(SHAPES, device=target.device)
        optimizer = make(params)
        optimizer.state[key] = value
        train([(optimizer, params)])
        saved = through_a_file(optimizer.state_dict())
        other = make(params)
        other.load_state_dict(saved)
        train([(other, params)], first=3)
        ends.append((saved["state"][key], other.state[key], params))
    (mine, loaded, ours), (theirs, _, peers) = ends
    assert str(mine) == str(theirs) == str(loaded) == str(value)
    assert_same_path(ours, peers, 6)


def test_a_frozen_parameter_s_entry_may_be_anything(target):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params)
    optimizer.state[params[2]] = 5
    for step in range(2):
        give_grads(params[:2], step)
        optimizer.step()
    assert optimizer.state[params[2]] == 5
    give_grads(params, 2)
    with pytest.raises(
        RuntimeError, match="the state of parameter number 2 of group 0 is 5, expected a dict"
    ):
        optimizer.step()
