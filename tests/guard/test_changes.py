"""What a guard takes for a change, and what not."""

import pytest
import torch

from .changes import CHANGES, MOVES, MOVES_OF_PARAMS
from .held import Held


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(guarded, change):
    held = Held()
    held.complex = torch.tensor(1 + 2j)
    held.scalar.grad = held.complex.imag
    check = guarded(held)
    assert check(held) == held.addresses()
    change(held)
    assert check(held) is None


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_move_of_a_moment_is_seen(guarded, key, move):
    held = Held()
    check = guarded(held)
    held.s[key].data = move(held.s[key])
    assert check(held) is None
    assert guarded(held)(held) == held.addresses()


@pytest.mark.parametrize("move", MOVES_OF_PARAMS.values(), ids=MOVES_OF_PARAMS)
def test_a_move_of_a_parameter_is_seen(guarded, move):
    held = Held()
    check = guarded(held)
    held.p.data = move(held.p.data)
    assert check(held) is None


def test_what_a_step_changes_is_no_change(guarded):
    held = Held()
    check = guarded(held)
    for s in held.state.values():
        s["step"] += 1
        s["exp_avg"].mul_(0.5)
        s["n"] += 1  # not a tensor: no kernel reads it
    with torch.no_grad():
        held.p.mul_(2)
    assert check(held) == held.addresses()
    held.groups = [[held.p], [held.scalar, held.without]]
    held.state = {p: dict(s) for p, s in held.state.items()}
    assert check(held) == held.addresses()


@pytest.mark.parametrize("key", [5, None, "lora", torch.zeros(2)], ids=["int", "None", "str", "tensor"])
@pytest.mark.parametrize("value", [7, None, [torch.ones(2)], {"exp_avg": torch.ones(2)}, torch.ones(2)])
def test_what_users_keep_in_the_state_is_no_change(guarded, key, value):
    held = Held()
    held.state = {key: value, **held.state}
    held.s[key] = value
    check = guarded(held)
    for change in (held.state, held.s):
        change[key] = torch.ones(3)
        assert check(held) == held.addresses()
        change["new"] = {"step": 1}
        assert check(held) == held.addresses()
        del change[key]
        assert check(held) == held.addresses()


def test_keys_that_are_equal_but_other_strings(guarded):
    held = Held()
    held.state[held.p] = {"".join(key): value for key, value in held.s.items()}
    check = guarded(held)
    held.state[held.p]["".join(["exp", "_avg"])] = held.s["exp_avg"]
    assert check(held) == held.addresses()
    held.state[held.p]["".join(["max", "_exp_avg_sq"])] = torch.ones(3, 4)
    assert check(held) is None


def test_another_object_of_the_same_memory_is_no_change(guarded):
    held = Held()
    check = guarded(held)
    held.s["exp_avg"] = held.s["exp_avg"].view(3, 4)
    assert check(held) == held.addresses()
