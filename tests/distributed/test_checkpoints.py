"""torch.distributed.checkpoint: saved on some processes, loaded on others, the same curve goes on."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fused_adamw import FusedHygieneAdamW, build_param_groups

from .models import OPTIONS, Net, alone, full_params, train
from .ranks import run

STEPS = 3  # between checkpoints


def torch_adamw(model, lr, weight_decay, max_grad_norm):
    """Torch's AdamW, with its own clip."""
    optimizer = torch.optim.AdamW(build_param_groups(model, weight_decay), lr=lr)

    def clip(*_):
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)

    optimizer.register_step_pre_hook(clip)
    return optimizer


MAKERS = {"ours": FusedHygieneAdamW, "torch": torch_adamw}


def stage(folder, number, maker, flat, seed):
    """Load checkpoint `number`, train on, save the next one. On one process nothing is sharded."""
    model = Net()
    world_size = dist.get_world_size()
    if world_size > 1:
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(seed)  # what is loaded must replace it
    optimizer = MAKERS[maker](model, **OPTIONS)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    if number:
        weights, state = get_state_dict(model, optimizer, options=options)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=Path(folder) / str(number))
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=options,
        )
    train(model, optimizer, STEPS, first=STEPS * number)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=Path(folder) / str(number + 1))
    steps = {state["step"].item() for state in optimizer.state.values()}
    fallbacks = optimizer._plan.fallbacks if maker == "ours" else {}
    return full_params(model), steps, fallbacks


def go_through(tmp_path, stages, flat):
    """The parameters at the end of a training that moves."""
    for number, (world_size, maker) in enumerate(stages):
        results = run(world_size, stage, str(tmp_path), number, maker, flat, float(number))
        for _, steps, fallbacks in results:
            assert steps == {STEPS * (number + 1)}
            assert not fallbacks
    return results[0][0]


def assert_curve(params, n_stages):
    """As in one process. Before the last step parameters of equal curves differ by rounding alone."""
    expected, _ = alone(STEPS * n_stages)
    for name, p in expected.items():
        torch.testing.assert_close(params[name], p, rtol=0, atol=2e-5 * n_stages)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("world_sizes", [(2, 4, 2, 1), (1, 4, 1)], ids=str)
def test_resharding(tmp_path, world_sizes, flat):
    stages = [(world_size, "ours") for world_size in world_sizes]
    assert_curve(go_through(tmp_path, stages, flat), len(stages))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("stages", [((2, "ours"), (2, "torch")), ((4, "torch"), (2, "ours"))], ids=str)
def test_interchange_with_torch(tmp_path, stages, flat):
    assert_curve(go_through(tmp_path, stages, flat), len(stages))


def full_state_dicts():
    """Whole tensors, as for a file for one process; and back."""
    models = [Net() for _ in range(2)]
    for model in models:
        fully_shard(model)
    optimizers = [FusedHygieneAdamW(model, **OPTIONS, state_dtype=torch.bfloat16) for model in models]
    train(models[0], optimizers[0], STEPS)
    options = StateDictOptions(full_state_dict=True)
    weights, state = get_state_dict(models[0], optimizers[0], options=options)
    shapes = {name: tuple(s["exp_avg"].shape) for name, s in state["state"].items()}
    saved = {"model_state_dict": weights, "optim_state_dict": state}
    set_state_dict(models[1], optimizers[1], **saved, options=options)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, STEPS, first=STEPS)
    ours, theirs = map(full_params, models)
    moments = {s["exp_avg"].dtype for o in optimizers for s in o.state.values()}
    return shapes, moments, all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_full_state_dicts():
    for shapes, moments, is_equal in run(2, full_state_dicts):
        assert shapes == {name: tuple(p.shape) for name, p in Net().named_parameters()}
        assert moments == {torch.bfloat16}
        assert is_equal


def own_state_dict(is_copied):
    """The optimizer's own state_dict, or a deep copy of it all: for the same mesh."""
    model = Net()
    fully_shard(model)
    optimizer = FusedHygieneAdamW(model, **OPTIONS, amsgrad=True)
    train(model, optimizer, STEPS)
    other = Net()
    fully_shard(other)
    other.load_state_dict(model.state_dict())
    twin = FusedHygieneAdamW(other, **OPTIONS)
    if is_copied:  # of the optimizer and the parameters that it holds
        twin = copy.deepcopy(optimizer)
        copies = [p for group in twin.param_groups for p in group["params"]]
    else:
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        copies = [p for group in twin.param_groups for p in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(2):
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.full_like(p, 0.1 * (step + 1))
            q.grad = torch.full_like(q, 0.1 * (step + 1))
        optimizer.step()
        twin.step()
    assert torch.equal(optimizer.grad_norm, twin.grad_norm)
    return [torch.equal(p.to_local(), q.to_local()) for p, q in zip(params, copies, strict=True)]


@pytest.mark.parametrize("is_copied", [False, True], ids=["loaded", "copied"])
def test_own_state_dict_and_copies(is_copied):
    for equal in run(2, own_state_dict, is_copied):
        assert equal
        assert all(equal)


def foreign_state_dict(is_sharded):
    """A state_dict of a process alone for DTensors, or of DTensors for plain parameters: the message."""
    models = [Net() for _ in range(2)]
    fully_shard(models[0])
    optimizers = [FusedHygieneAdamW(model, **OPTIONS) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 1)
    into, source = optimizers if is_sharded else optimizers[::-1]
    before = [(p, key, value.clone()) for p, state in into.state.items() for key, value in state.items()]
    try:
        into.load_state_dict(source.state_dict())
    except ValueError as error:
        return str(error), all(torch.equal(into.state[p][key], value) for p, key, value in before)
    return "no error", False


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_state_dict_of_other_processes_is_refused(is_sharded):
    kinds = ("plain tensor", "DTensor") if is_sharded else ("DTensor", "plain tensor")
    for message, is_unchanged in run(2, foreign_state_dict, is_sharded):
        assert re.search(
            f"saved exp_avg of parameter 'up.weight' is a {kinds[0]}.*parameter a {kinds[1]}", message
        )
        assert is_unchanged
