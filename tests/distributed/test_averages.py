"""Averages of DTensors and of replicas: those of a process alone, on any number of processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fused_adamw import EMA, FusedHygieneAdamW

from . import layouts
from .layouts import LAYOUTS, placed_like, values
from .ranks import run

BF16, F32 = torch.bfloat16, torch.float32
STEPS = 3  # between checkpoints
OPTIONS = {"lr": 1e-1, "max_grad_norm": 1.5, "seed": 11}
# Of float32 parameters; of masters; rounded by chance, of parameters that are.
SCHEMES = {
    "float32": (F32, {"ema": EMA(0.9)}),
    "master": (BF16, {"ema": EMA(0.9, warmup="timm"), "master_weights": "split", "state_dtype": BF16}),
    "bfloat16": (BF16, {"ema": EMA(0.6, dtype=BF16, every=2), "stochastic_rounding": True}),
}


class Net(nn.Module):
    """Rows that neither 2 nor 4 divide, and a vector."""

    def __init__(self, dtype=F32):
        super().__init__()
        self.up = nn.Linear(6, 11)
        self.norm = nn.LayerNorm(11)
        self.down = nn.Linear(11, 3)
        for i, p in enumerate(self.parameters()):
            p.data = values(p.shape, i)
        self.to(dtype)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def net(dtype):
    """A model, sharded over all processes; over one it is whole."""
    model = Net(dtype)
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model, optimizer, first, steps=STEPS):
    for step in range(first, first + steps):
        for i, p in enumerate(model.parameters()):
            p.grad = placed_like(values(p.shape, 1000 + 100 * step + i).to(p.dtype), p)
        optimizer.step()
        optimizer.zero_grad()


def whole(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def named_params(optimizer):
    """As the optimizer has them: after a forward pass, FSDP2 shows others in the model."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def averages(optimizer):
    return {name: whole(optimizer.state[p]["ema"]) for name, p in named_params(optimizer)}


def weights(optimizer):
    return {name: whole(p) for name, p in named_params(optimizer)}


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not a[name].equal(b[name])]


def unbroken(scheme, steps):
    """In a process alone."""
    dtype, options = SCHEMES[scheme]
    model = Net(dtype)
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **options)
    train(model, optimizer, 0, steps)
    return weights(optimizer), averages(optimizer)


# Steps


def on_a_mesh(name, scheme):
    """Averages after some steps, whole, and how they are placed."""
    dtype, options = SCHEMES[scheme]
    layout = LAYOUTS[name]("cpu")
    params = [nn.Parameter(p.detach().to(dtype)) for p in layouts.placed_params(layout)]
    optimizer = FusedHygieneAdamW(params, **OPTIONS, **options)
    for step in range(STEPS):
        for p, grad in zip(params, layouts.whole_grads(step), strict=True):
            p.grad = placed_like(grad.to(dtype), p)
        optimizer.step()
    states = [optimizer.state[p]["ema"] for p in params]
    placed = [
        getattr(average, "placements", None) == getattr(p, "placements", None)
        for p, average in zip(params, states, strict=True)
    ]
    return [whole(average) for average in states], placed


def in_one_process(scheme):
    dtype, options = SCHEMES[scheme]
    params = [nn.Parameter(p.detach().to(dtype)) for p in layouts.whole_params()]
    optimizer = FusedHygieneAdamW(params, **OPTIONS, **options)
    for step in range(STEPS):
        for p, grad in zip(params, layouts.whole_grads(step), strict=True):
            p.grad = grad.to(dtype)
        optimizer.step()
    return [optimizer.state[p]["ema"] for p in params]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "world_size"),
    [("one_mesh", 2), ("some_replicated", 2), ("hsdp", 4), ("mixed", 4)],
)
def test_shards_have_the_averages_of_a_process_alone(name, world_size, scheme):
    expected = in_one_process(scheme)
    for found, placed in run(world_size, on_a_mesh, name, scheme):
        assert all(placed)
        assert [a.dtype for a in found] == [a.dtype for a in expected]
        assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not a.equal(b)] == []


# Checkpoints


def stage(folder, number, scheme, options):
    """Load checkpoint `number`, train on, save the next one."""
    dtype, of_scheme = SCHEMES[scheme]
    model = net(dtype)
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **of_scheme)
    options = StateDictOptions(**options)
    if number:
        of_model, state = get_state_dict(model, optimizer, options=options)
        saved = {"model": of_model, "optimizer": state}
        dcp.load(saved, checkpoint_id=Path(folder) / str(number))
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=options,
        )
    train(model, optimizer, STEPS * number)
    of_model, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": of_model, "optimizer": state}, checkpoint_id=Path(folder) / str(number + 1))
    return weights(optimizer), averages(optimizer)


@pytest.mark.parametrize(
    "options",
    [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}],
    ids=["nested", "flat", "full"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_resharding_keeps_every_bit(tmp_path, scheme, options):
    sizes = (2, 1, 2)
    for number, world_size in enumerate(sizes):
        results = run(world_size, stage, str(tmp_path), number, scheme, options)
    expected = unbroken(scheme, STEPS * len(sizes))
    for found in results:
        assert [differing(*pair) for pair in zip(found, expected, strict=True)] == [[], []]


def handed_over():
    """The whole state of one sharded optimizer, given to another: averages, and whether they go on alike."""
    dtype, options = SCHEMES["master"]
    models = [net(dtype), net(dtype)]
    first, second = (FusedHygieneAdamW(model, **OPTIONS, **options) for model in models)
    train(models[0], first, 0)
    full = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(models[0], first, options=full)
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], second, state, options=full)
    found = averages(second)
    shapes = {name: tuple(of_p["ema"].shape) for name, of_p in state["state"].items()}
    expected = averages(first)
    for model, optimizer in zip(models, (first, second), strict=True):
        train(model, optimizer, STEPS)
    same_end = differing(averages(second), averages(first))
    return shapes, differing(found, expected), same_end


def test_whole_states_of_shards():
    for shapes, differ, end_differs in run(2, handed_over):
        assert shapes == {name: tuple(p.shape) for name, p in Net().named_parameters()}
        assert differ == []
        assert end_differs == []


# Evaluation


def evaluated(scheme, is_interrupted):
    """The output inside of `swap_ema`, what it should be, and what is not as it was afterwards."""
    dtype, options = SCHEMES[scheme]
    model = net(dtype)
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **options)
    train(model, optimizer, 0)
    before = weights(optimizer), averages(optimizer)
    given = {name: whole(t) for name, t in optimizer.ema_state_dict(model).items()}
    x = values((4, 6), 99).to(dtype)
    seen = None
    try:
        with torch.no_grad(), optimizer.swap_ema():
            inside, seen = weights(optimizer), model(x)
            if is_interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    after = weights(optimizer), averages(optimizer)
    changed = [differing(*pair) for pair in zip(after, before, strict=True)]
    expected = Net(dtype)
    expected.load_state_dict(before[1])
    wrong = [name for name, t in inside.items() if not t.equal(before[1][name].to(dtype))]
    with torch.no_grad():
        return wrong, changed, torch.equal(seen, expected(x)), differing(given, before[1])


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluating_with_the_averages_of_shards(scheme, is_interrupted):
    for wrong, changed, same_output, not_given in run(2, evaluated, scheme, is_interrupted):
        assert wrong == []
        assert changed == [[], []]
        assert same_output
        assert not_given == []


def between_steps(evaluate):
    """Train by forward and backward, and evaluate in between: parameters, averages, the last outputs."""
    model = net(F32)
    is_of_model = evaluate != "of the parameters"
    params = model if is_of_model else list(model.named_parameters())
    optimizer = FusedHygieneAdamW(params, **OPTIONS, weight_decay=0.0, **SCHEMES["float32"][1])
    x, outputs = values((4, 6), 99), []
    for step in range(4):
        model(values((4, 6), step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            outputs = [model(x)] if evaluate == "both" else []
            if evaluate is not None:
                with optimizer.swap_ema(None if is_of_model else model):
                    outputs.append(model(x))
    return weights(optimizer), averages(optimizer), outputs


@pytest.mark.parametrize("evaluate", ["averages", "both", "of the parameters"])
def test_evaluating_leaves_no_whole_parameters_behind(evaluate):
    """After a forward pass the root module of FSDP2 keeps them: those from before an exchange are wrong."""
    expected, expected_averages, _ = run(2, between_steps, None)[0]
    for end, of_averages, outputs in run(2, between_steps, evaluate):
        torch.testing.assert_close((end, of_averages), (expected, expected_averages), rtol=0, atol=0)
        for then, output in zip((of_averages, end), outputs[::-1], strict=False):
            model = Net()
            model.load_state_dict(then)
            with torch.no_grad():
                torch.testing.assert_close(output, model(values((4, 6), 99)), rtol=1e-6, atol=1e-6)


def replicas():
    """Averages of DistributedDataParallel, and outputs with them, on data of each process."""
    dtype, options = SCHEMES["bfloat16"]
    model = nn.parallel.DistributedDataParallel(Net(dtype))
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **options)
    for step in range(8):
        model(values((8, 6), 10 * step + dist.get_rank()).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), optimizer.swap_ema():
        seen = model(values((4, 6), 99).to(dtype))
    return {**averages(optimizer), "output": seen}


def test_replicas_have_the_same_averages():
    first, second = run(2, replicas)
    assert differing(first, second) == []
