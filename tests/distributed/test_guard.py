"""The guard against spikes on several processes: one decision, whoever saw the spike."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fused_adamw import FusedHygieneAdamW, SpikeGuard

from . import layouts
from .layouts import LAYOUTS, held_bytes, placed_like, values
from .ranks import run

GUARD = SpikeGuard(sigmas=6.0, window=8, warmup=4)
CALM, LAST = 6, 8  # accepted steps before the spike; steps in all


def local_part(t):
    return t.to_local() if isinstance(t, DTensor) else t


def assert_same_bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def series_of_steps(params, optimizer, disturb, losses=None):
    """After each step: whether parameters have changed, and what was counted."""
    seen = []
    for step in range(LAST):
        for p, grad in zip(params, layouts.whole_grads(step % 2), strict=True):
            p.grad = placed_like(grad.to(p.dtype), p)
        if step == CALM:
            disturb(params)
        if losses is not None:
            optimizer.observe(losses(step))
        before = [held_bytes(p) for p in params]
        optimizer.step()
        counts = {name: int(n) for name, n in optimizer.skipped_steps_by_reason.items() if n}
        seen.append(([held_bytes(p) for p in params] != before, counts))
    return seen


def in_one_rank(factor):
    """Scales the gradients that rank 1 holds."""

    def disturb(params):
        if dist.get_rank() == 1:
            for p in params:
                local_part(p.grad).mul_(factor)

    return disturb


def shards(name, factor, on):
    params = layouts.placed_params(LAYOUTS[name]("cpu"))
    guard = SpikeGuard(sigmas=6.0, window=8, warmup=4, on=on)
    optimizer = FusedHygieneAdamW(params, lr=1e-2, guard=guard)
    return series_of_steps(params, optimizer, in_one_rank(factor)), optimizer.guard_state_dict()["status"]


@pytest.mark.parametrize(("factor", "reason"), [(1e3, "spike"), (math.nan, "nonfinite")])
@pytest.mark.parametrize("name", ["one_mesh", "some_replicated"])
def test_a_spike_in_one_shard_skips_the_step_everywhere(name, factor, reason):
    results = run(2, shards, name, factor, "skip")
    for seen, status in results:
        assert [counts for _, counts in seen] == [{}] * CALM + [{reason: 1}] * 2
        assert not seen[CALM][0]
        assert seen[CALM + 1][0]
        assert_same_bits(status, results[0][1])


def test_a_spike_in_one_shard_is_clipped_everywhere():
    results = run(2, shards, "one_mesh", 1e3, "clip")
    for seen, status in results:
        assert [counts for _, counts in seen] == [{}] * LAST
        assert all(changed for changed, _ in seen)
        assert_same_bits(status, results[0][1])


def stages_of_a_pipeline():
    """Plain parameters of each process alone, clipped by the norm of all."""
    params = layouts.whole_params()
    optimizer = FusedHygieneAdamW(params, lr=1e-2, guard=GUARD, norm_process_group=dist.group.WORLD)
    return series_of_steps(params, optimizer, in_one_rank(1e3))


def test_a_spike_in_one_stage_skips_the_step_everywhere():
    for seen in run(2, stages_of_a_pipeline):
        assert [counts for _, counts in seen] == [{}] * CALM + [{"spike": 1}] * 2
        assert not seen[CALM][0]


def replicas(spike, is_tensor):
    """Plain parameters, the same in each process, which has a loss of its own."""
    params = layouts.whole_params()
    optimizer = FusedHygieneAdamW(params, lr=1e-2, guard=GUARD)

    def loss(step):
        value = 2.0 + 0.1 * (step % 3) + dist.get_rank()
        value = spike if step == CALM and dist.get_rank() == 1 else value
        return torch.tensor(value) if is_tensor else value

    seen = series_of_steps(params, optimizer, lambda _: None, loss)
    return seen, optimizer.guard_state_dict()["status"]


@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.parametrize(("spike", "reason"), [(50.0, "loss_spike"), (math.nan, "nonfinite")])
def test_a_loss_of_one_process_skips_the_step_everywhere(spike, reason, is_tensor):
    results = run(2, replicas, spike, is_tensor)
    for seen, status in results:
        assert [counts for _, counts in seen] == [{}] * CALM + [{reason: 1}] * 2
        assert not seen[CALM][0]
        assert seen[CALM + 1][0]
        assert_same_bits(status, results[0][1])


# Checkpoints

SPIKE, OF_STAGE = 7, 3  # in the third stage, whose warmup was in the first two


def new_model():
    return nn.Sequential(nn.Linear(6, 11), nn.Linear(11, 3))


def train(model, optimizer, first, steps):
    for step in range(first, first + steps):
        for i, p in enumerate(model.parameters()):
            grad = values(p.shape, 1000 + 100 * step + i)
            p.grad = placed_like(grad * 128 if step == SPIKE else grad, p)
        optimizer.step()
        optimizer.zero_grad()


def stage(folder, number):
    """Go on from checkpoint `number`, save the next one; the history at the end."""
    model = new_model()
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = FusedHygieneAdamW(model, lr=1e-2, guard=GUARD)

    def saved():
        weights, state = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": state, "guard": optimizer.guard_state_dict()}

    if number:
        found = saved()  # makes a step of its own, with gradients of zero
        dcp.load(found, checkpoint_id=Path(folder) / str(number))
        of_both = {"model_state_dict": found["model"], "optim_state_dict": found["optimizer"]}
        set_state_dict(model, optimizer, **of_both)
        optimizer.load_guard_state_dict(found["guard"])
    train(model, optimizer, OF_STAGE * number, OF_STAGE)
    dcp.save(saved(), checkpoint_id=Path(folder) / str(number + 1))
    return int(optimizer.skipped_steps), optimizer.guard_state_dict()["status"]


def test_the_history_moves_with_a_checkpoint(tmp_path):
    for number, world_size in enumerate((2, 1, 2)):
        results = run(world_size, stage, str(tmp_path), number)
    model = new_model()
    unbroken = FusedHygieneAdamW(model, lr=1e-2, guard=GUARD)
    train(model, unbroken, 0, 3 * OF_STAGE)
    for skipped, status in results:
        assert skipped == unbroken.skipped_steps == 1
        assert_same_bits(status, unbroken.guard_state_dict()["status"])
