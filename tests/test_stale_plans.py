"""A plan follows what has changed, or another takes its place: the step after a change is right."""

from unittest.mock import Mock

import pytest
import torch
from common import Pair, give_grads, parameters


def test_a_first_gradient_needs_a_plan(target, built):
    pair = Pair(target)
    pair.step(without=[0, 1])
    pair.step(without=[0])
    pair.step()
    pair.step(2)
    assert len(built) == 3


def test_plans_settle_when_gradients_of_an_odd_layout_come_and_go(target, built):
    params = parameters([(4, 5), (4, 5)], device=target.device)
    optimizer = target.adamw(params)
    for step in range(12):
        for i, p in enumerate(params):
            p.grad = torch.ones(5, 4, device=target.device).t() if (step + i) % 2 else None
        optimizer.step()
    assert len(built) <= 4


def test_data_swapped(target, built):
    """As by FSDP, accelerate, or an exponential moving average that is swapped in."""
    pair = Pair(target)
    pair.step()
    for _, params in pair.both():
        params[0].data = torch.full((5, 5), 0.5, device=target.device)
    pair.step(2)
    assert len(built) == 1


def test_tensors_that_come_to_share_memory_take_another_plan(target, built):
    """Kernels would step them at the same time; torch steps one after the other."""
    pair = Pair(target, [(6,), (6,), (6,)])
    pair.step()
    for _, params in pair.both():
        shared = torch.linspace(-1, 1, 8, device=target.device)
        params[0].data, params[2].data = shared[:6], shared[2:]
    pair.step(2)
    assert len(built) == 2
    for _, params in pair.both():
        params[2].data = torch.ones(6, device=target.device)
    pair.step(2)
    assert len(built) == 3
    assert not built[-1].fallbacks


def test_a_move_that_fails_is_made_up_for(target, monkeypatch):
    """The guard is told last."""
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        state = optimizer.state[params[0]]
        state["exp_avg"] = state["exp_avg"].clone()
    give_grads(pair.params, 1)
    if target.backend != "reference":
        bucket = pair.ours._plan.launches[0].bucket
        monkeypatch.setattr(bucket, "place", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            pair.ours.step()
        monkeypatch.undo()
    pair.step(2)


def test_data_transposed_in_place(target):
    pair = Pair(target)
    pair.step()
    for _, params in pair.both():
        params[0].data = params[0].data.t()
    pair.step(2)


def test_data_cut_in_place(target):
    """The moments no longer fit: refused, and not one element beyond the gradient is read."""
    pair = Pair(target)
    pair.step()
    p = pair.params[0]
    p.data = p.data[:2]
    p.grad = torch.ones(2, 5, device=target.device)
    with pytest.raises(RuntimeError, match=r"expected \(2, 5\)"):
        pair.ours.step()


def test_parameter_replaced_in_the_group(target):
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        (new,) = parameters([(6,)], seed=9, device=target.device)
        params[1] = optimizer.param_groups[0]["params"][1] = new
    pair.step(2)


def test_parameters_reordered_in_the_group(target):
    pair = Pair(target)
    pair.step()
    for optimizer, _ in pair.both():
        optimizer.param_groups[0]["params"].reverse()
    pair.step(2)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_state_replaced(target, built, key):
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        state = optimizer.state[params[0]]
        state[key] = torch.full_like(state[key], 2.0)
    pair.step(2)
    assert len(built) == 1


def test_moment_transposed_in_place(target):
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].t()
    pair.step(2)


def test_moment_of_another_dtype_at_the_same_address(target):
    """As the allocator hands out when one is deleted and another made. Memory after it stays as it is."""
    pair = Pair(target)
    pair.step()
    state = pair.ours.state[pair.params[1]]
    buffer = state["exp_avg"].view(torch.bfloat16)
    state["exp_avg"] = buffer[:70]
    buffer.fill_(1.0)
    pair.params[1].grad = torch.zeros(70, device=target.device)
    pair.ours.step()
    assert state["exp_avg"].lt(1.0).all()
    assert buffer[70:].eq(1.0).all()


def test_whole_state_replaced(target):
    pair = Pair(target)
    pair.step()
    for optimizer, params in pair.both():
        optimizer.state[params[0]] = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
        optimizer.state[params[2]].clear()
    pair.step(2)
    assert pair.ours.state[pair.params[2]]["step"].item() == 2


def test_state_emptied(target):
    pair = Pair(target)
    pair.step(2)
    for optimizer, _ in pair.both():
        optimizer.state.clear()
    pair.step(2)


def test_amsgrad_turned_on_later(target):
    params = parameters([(5,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    give_grads(params, 1)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


def test_parameters_moved_between_groups(target):
    pair = Pair(target)
    pair.step()
    for optimizer, _ in pair.both():
        first = optimizer.param_groups[0]
        optimizer.param_groups.append({**first, "params": [first["params"].pop()], "lr": 0.5})
    pair.step(2)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_another_dtype(target, built):
    (p,) = parameters([(70,)], dtype=torch.bfloat16, device=target.device)
    optimizer = target.adamw([p], lr=1e-2)
    give_grads([p], 0)
    optimizer.step()
    p.grad = None
    p.grad_dtype = torch.float32
    for step in (1, 2):
        give_grads([p], step, dtype=torch.float32)
        optimizer.step()
    assert len(built) == 2
    assert optimizer.state[p]["step"].item() == 3
