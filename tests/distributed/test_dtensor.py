"""DTensors: local shards are stepped, by the norm of the whole."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fused_adamw import FusedHygieneAdamW

from . import layouts
from .layouts import COLLECTIVES, LAYOUTS, Collectives, gathered, held_bytes
from .ranks import run

OPTIONS = {"lr": 1e-1, "weight_decay": 0.1, "max_grad_norm": 1.5}
STEPS = 3


def norms_of(without=()):
    """The norm of the gradients of each step, in numpy."""
    norms = []
    for step in range(STEPS):
        grads = [g.double().numpy() for i, g in enumerate(layouts.whole_grads(step)) if i not in without]
        norms.append(np.float32(math.sqrt(math.fsum((g * g).sum() for g in grads))))
    return norms


def in_one_process(options=None, without=()):
    """Parameters after training them in one process."""
    params = layouts.whole_params()
    optimizer = FusedHygieneAdamW(params, **OPTIONS | (options or {}))
    for step in range(STEPS):
        for i, (p, grad) in enumerate(zip(params, layouts.whole_grads(step), strict=True)):
            p.grad = None if i in without else grad
        optimizer.step()
    return [gathered(p) for p in params]


def is_checked_in_cpp(optimizer):
    """Whether one call into C++ finds the plan current; of the reference there is none to make."""
    return optimizer._plan.check(optimizer.param_groups, optimizer.state) is not None


def train(name, options=None, without=(), device="cpu"):
    """What training comes to: parameters, norms, the collectives of each step, what fell back."""
    layout = LAYOUTS[name](device)
    params = layouts.placed_params(layout, device)
    optimizer = FusedHygieneAdamW(params, **OPTIONS | (options or {}))
    norms, collectives, plan = [], [], None
    for step in range(STEPS):
        layouts.give_grads(params, layout, step, without, device)
        grads = [held_bytes(p.grad) for p in params if p.grad is not None]
        versions = [p._version for p in params]
        with Collectives() as seen:
            optimizer.step()
        assert grads == [held_bytes(p.grad) for p in params if p.grad is not None]
        bumps = [p._version - version for p, version in zip(params, versions, strict=True)]
        assert bumps == [p.grad is not None for p in params]
        norms.append(None if optimizer.grad_norm is None else optimizer.grad_norm.item())
        collectives.append(seen.entered)
        plan = plan or optimizer._plan
        assert optimizer._plan is plan
        assert len(plan.launches) == 1
        assert is_checked_in_cpp(optimizer)
    for p, where in zip(params, layout, strict=True):
        if state := optimizer.state[p]:
            assert type(state["step"]) is torch.Tensor
            assert (state["step"].dim(), state["step"].dtype, state["step"].item()) == (
                0,
                torch.float32,
                STEPS,
            )
            for key in ("exp_avg", "exp_avg_sq"):
                moment = state[key]
                assert type(moment) is (torch.Tensor if where is None else DTensor)
                assert where is None or (moment.device_mesh, list(moment.placements)) == where
    return [gathered(p) for p in params], norms, collectives, optimizer._plan.fallbacks


def same(arrays, others):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(arrays, others, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_as_in_one_process(world_size, name):
    """Bit for bit, as gradients are such that their norm is exact. One collective for each mesh."""
    expected, norms = in_one_process(), norms_of()
    for params, grad_norms, collectives, fallbacks in run(world_size, train, name):
        assert grad_norms == norms
        assert same(params, expected)
        assert collectives == [["allreduce_"] * COLLECTIVES[name]] * STEPS
        assert not fallbacks


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_a_norm_there_is_no_collective(name):
    options = {"max_grad_norm": None}
    expected = in_one_process(options)
    for params, norms, collectives, _ in run(4, train, name, options):
        assert same(params, expected)
        assert norms == [None] * STEPS
        assert collectives == [[]] * STEPS


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"maximize": True},
        {"state_dtype": torch.bfloat16},
        {"max_grad_norm": math.inf},
        {"max_grad_norm": None, "skip_nonfinite": True},
    ],
    ids=str,
)
def test_options(backend, options):
    options = options | {"backend": backend}
    expected, norms = in_one_process(options), norms_of()
    for params, grad_norms, _, _ in run(2, train, "some_replicated", options):
        assert same(params, expected)
        assert grad_norms == norms


def test_a_number_of_copies_that_does_not_divide_exactly():
    """A third of a sum, three times, is the sum but for rounding in float64."""
    expected, norms = in_one_process(), norms_of()
    for params, grad_norms, *_ in run(3, train, "some_replicated"):
        np.testing.assert_allclose(grad_norms, norms, rtol=1e-7)
        for p, q in zip(params, expected, strict=True):
            np.testing.assert_allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("without", [(0, 4), (0, 1, 2, 3, 4), range(6)], ids=["some", "all but one", "all"])
def test_parameters_without_gradients(without):
    expected, norms = in_one_process(without=without), norms_of(without)
    for params, grad_norms, collectives, _ in run(4, train, "mixed", {}, without):
        assert same(params, expected)
        assert grad_norms == norms
        assert collectives == [["allreduce_"] * 2] * STEPS


def shapes_of_shards():
    return [tuple(p.to_local().shape) for p in layouts.placed_params(layouts.one_mesh("cpu")) if p.dim() > 0]


def test_the_layouts_have_uneven_and_empty_shards():
    first, *_, last = run(4, shapes_of_shards)
    assert first == [(2, 6), (1,), (2, 4), (1, 5), (3, 8)]
    assert last == [(1, 6), (0,), (2, 4), (0, 5), (0, 8)]


# Gradients that only some processes have


def some_ranks_have_gradients():
    """By step and rank, which parameters have a gradient: none for rank 0 at first, none for 1 at last."""
    present = {0: [(), (1, 2), (0, 1, 2, 4)], 1: [(0, 1, 2, 4), (4,), ()]}[dist.get_rank() % 2]
    layout = layouts.one_mesh("cpu")
    params = layouts.placed_params(layout)
    copies = [nn.Parameter(p.to_local().detach().clone()) for p in params]
    ours = FusedHygieneAdamW(params, **OPTIONS)
    # What a process has of its own, by a norm worked out here.
    alone = FusedHygieneAdamW(copies, **OPTIONS | {"max_grad_norm": None})
    norms = []
    for step, mine in enumerate(present):
        layouts.give_grads(params, layout, step)
        for i, p in enumerate(params):
            if i not in mine:
                p.grad = None
        grads = [None if p.grad is None else p.grad.to_local() for p in params]
        squares = [g.double().square().sum().item() for g in grads if g is not None]
        square = torch.tensor(math.fsum(squares), dtype=torch.float64)
        dist.all_reduce(square)
        with Collectives() as seen:
            ours.step()
        assert seen.entered == ["allreduce_"]
        norms.append((ours.grad_norm.item(), math.sqrt(square)))
        scale = np.float32(min(1.0, OPTIONS["max_grad_norm"] / (math.sqrt(square) + 1e-6)))
        for copy, grad in zip(copies, grads, strict=True):
            copy.grad = None if grad is None else grad * torch.tensor(scale)
        alone.step()
    equal = [torch.equal(p.to_local(), q) for p, q in zip(params, copies, strict=True)]
    return norms, equal


@pytest.mark.parametrize("world_size", [2, 4])
def test_sets_of_gradients_that_change_from_step_to_step_and_rank_to_rank(world_size):
    results = run(world_size, some_ranks_have_gradients)
    for norms, equal in results:
        assert norms == results[0][0]
        np.testing.assert_allclose(*np.transpose(norms), rtol=1e-7)
        assert norms[0][0] > 0
        assert all(equal)


# Gradients placed otherwise than their parameters


def matrices_and_grads():
    """Parameters of two dimensions, and their gradients by step."""
    which = [i for i, shape in enumerate(layouts.SHAPES) if len(shape) == 2]
    params, grads = layouts.whole_params(), [layouts.whole_grads(step) for step in range(STEPS)]
    return [params[i] for i in which], [[of_step[i] for i in which] for of_step in grads]


def matrices_in_one_process(padded):
    """Parameters and norms; gradients of the slots `padded` are all but the last column of wider memory."""
    params, grads = matrices_and_grads()
    optimizer = FusedHygieneAdamW(params, **OPTIONS)
    norms = []
    for of_step in grads:
        for slot, (p, grad) in enumerate(zip(params, of_step, strict=True)):
            p.grad = nn.functional.pad(grad, (0, 1))[:, :-1] if slot in padded else grad
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
    assert optimizer._plan.fallbacks.keys() == set(padded)
    return [gathered(p) for p in params], norms


def other_placements(p_placement, grad_placement, replaces_state):
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    params, grads = matrices_and_grads()
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [p_placement])) for p in params]
    optimizer = FusedHygieneAdamW(params, **OPTIONS)
    norms = []
    for step in range(STEPS):
        for p, grad in zip(params, grads[step], strict=True):
            if grad_placement.is_partial():
                part = layouts.values(grad.shape, 9)
                p.grad = DTensor.from_local(part if rank else grad - part, mesh, [grad_placement])
            else:
                p.grad = distribute_tensor(grad, mesh, [grad_placement])
        if replaces_state and rank == 1 and step:  # one process makes a new plan, the other keeps its own
            state = optimizer.state[params[0]]
            state["exp_avg"] = state["exp_avg"].clone()
        before = [held_bytes(p.grad) for p in params]
        optimizer.step()
        assert before == [held_bytes(p.grad) for p in params]
        assert all(p.grad.placements == (grad_placement,) for p in params)
        norms.append(optimizer.grad_norm.item())
    # torch 2.10 and 2.11 gather uneven columns into a view of padded memory, which is for the reference.
    moved = [p.grad.redistribute(placements=[p_placement]).to_local() for p in params]
    padded = [slot for slot, grad in enumerate(moved) if not grad.is_contiguous()]
    return [gathered(p) for p in params], norms, optimizer._plan.fallbacks, padded


@pytest.mark.parametrize("replaces_state", [False, True])
@pytest.mark.parametrize(
    "placements",
    [(Replicate(), Partial()), (Shard(0), Partial()), (Shard(0), Replicate()), (Replicate(), Shard(1))],
    ids=str,
)
def test_gradients_are_placed_as_their_parameters(placements, replaces_state):
    """As torch's optimizers do; on every process once in a step, whoever has to make a new plan."""
    for found, grad_norms, fallbacks, padded in run(2, other_placements, *placements, replaces_state):
        expected, norms = matrices_in_one_process(padded)
        assert same(found, expected)
        assert grad_norms == norms
        assert fallbacks.keys() == set(padded)


def gradients_on_their_way():
    """As from a backward that does not wait for its last collective."""
    layout = layouts.replicated("cpu")
    params = layouts.placed_params(layout)
    optimizer = FusedHygieneAdamW(params, **OPTIONS)
    for step in range(STEPS):
        layouts.give_grads(params, layout, step)
        for p in params:
            local = all_reduce(p.grad.to_local() / 2, "sum", dist.group.WORLD)
            assert type(local) is AsyncCollectiveTensor
            p.grad = DTensor(local, p.grad._spec, requires_grad=False)
        optimizer.step()
    return [gathered(p) for p in params], optimizer._plan.fallbacks


def test_gradients_on_their_way_are_waited_for():
    expected = in_one_process()
    for params, fallbacks in run(2, gradients_on_their_way):
        assert same(params, expected)
        assert not fallbacks


# Local tensors that move


def moved_memory(what):
    """As by FSDP2 when a module is moved or loaded: the DTensors stay, not their memory."""
    layout = layouts.one_mesh("cpu")
    params = layouts.placed_params(layout)
    optimizer = FusedHygieneAdamW(params, **OPTIONS)
    for step in range(STEPS):
        layouts.give_grads(params, layout, step)
        if step:
            for p in params:
                moved = p if what == "parameters" else optimizer.state[p][what]
                stale = moved._local_tensor
                moved._local_tensor = stale.clone()
                stale.fill_(math.nan)
        optimizer.step()
    return [gathered(p) for p in params]


@pytest.mark.parametrize("what", ["parameters", "exp_avg", "exp_avg_sq"])
def test_local_tensors_that_move(what):
    expected = in_one_process()
    for params in run(2, moved_memory, what):
        assert same(params, expected)


# What does not fit


def misfit(case):
    """The message of the error, and whether the step left the other parameters alone."""
    mesh, other = (init_device_mesh("cpu", (1,), mesh_dim_names=(name,)) for name in "ab")

    def sharded(where=mesh, dim=0):
        return distribute_tensor(torch.ones(4, 2), where, [Shard(dim)])

    if case == "partial parameter":
        p = nn.Parameter(DTensor.from_local(torch.ones(4, 2), mesh, [Partial()]))
    else:
        p = nn.Parameter(torch.ones(4, 2) if case == "plain parameter" else sharded())
    first, last = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
    optimizer = FusedHygieneAdamW([("first", first), ("odd", p), ("last", last)], max_grad_norm=1.0)
    if case not in ("partial parameter", "at once: plain gradient"):
        first.grad, p.grad = torch.ones(3), torch.ones_like(p)
        optimizer.step()
    before = first.detach().clone(), last.detach().clone()
    # The last parameter has no gradient: then metadata is compared column by column.
    first.grad, p.grad = torch.ones(3), p.detach().clone()
    if case.endswith("plain gradient"):
        p.grad = torch.ones(4, 2)
    elif case in ("mesh", "plain parameter"):
        p.grad = sharded(other)
    elif case == "plain moment":
        optimizer.state[p]["exp_avg"] = torch.ones(4, 2)
    elif case == "moment elsewhere":
        optimizer.state[p]["exp_avg_sq"] = sharded(dim=1)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error), torch.equal(first, before[0]) and torch.equal(last, before[1])
    return "no error", False


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("plain gradient", "gradient of parameter 'odd' is a plain tensor, the parameter a DTensor (Shard"),
        ("at once: plain gradient", "gradient of parameter 'odd' is a plain tensor, the parameter a DTensor"),
        ("plain parameter", "gradient of parameter 'odd' is a DTensor (Shard(dim=0),) on "),
        ("mesh", "gradient of parameter 'odd' is a DTensor (Shard(dim=0),) on DeviceMesh"),
        ("plain moment", "exp_avg of parameter 'odd' is a plain tensor, the parameter a DTensor"),
        ("moment elsewhere", "exp_avg_sq of parameter 'odd' is a DTensor (Shard(dim=1),) on DeviceMesh"),
        ("partial parameter", "parameter 'odd' is a Partial DTensor"),
    ],
)
def test_what_does_not_fit_is_refused(case, message):
    """With the parameter's name, before anything is changed."""
    ((found, is_unchanged),) = run(1, misfit, case)
    assert message in found
    assert is_unchanged


def meshes_that_are_equal():
    meshes = [init_device_mesh("cpu", (2,)) for _ in range(2)]
    assert meshes[0] is not meshes[1]
    params = [nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)])) for mesh in meshes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = FusedHygieneAdamW(params, max_grad_norm=1.0)
    with Collectives() as seen:
        optimizer.step()
    return seen.entered, optimizer.grad_norm.item()


def test_meshes_are_compared_by_value():
    for entered, norm in run(2, meshes_that_are_equal):
        assert entered == ["allreduce_"]
        assert norm == 4.0


def to_local_in_a_graph():
    mesh = init_device_mesh("cpu", (1,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = FusedHygieneAdamW([p])
    loss = p.to_local().square().sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_graph_from_before_the_step_is_noticed():
    (message,) = run(1, to_local_in_a_graph)
    assert "has been modified inplace" in message


# On a GPU

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ["one_mesh", "hsdp", "fsdp_and_tp", "two_meshes", "mixed"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_one_process_on_a_gpu(name, device):
    expected, norms = in_one_process(), norms_of()
    ((params, grad_norms, collectives, fallbacks),) = run(1, train, name, {}, (), device, backend="nccl")
    assert grad_norms == norms
    for p, q in zip(params, expected, strict=True):
        np.testing.assert_allclose(p, q, rtol=0, atol=1e-6)
    assert collectives == [["allreduce_"] * COLLECTIVES[name]] * STEPS
    assert not fallbacks
