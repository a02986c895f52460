"""The ways of torch to train a model on many processes: as on one, with one norm for all."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fused_adamw import FusedHygieneAdamW, build_param_groups

from .layouts import Collectives
from .models import OPTIONS, Net, alone, full_params, train
from .ranks import run

STEPS = 4


def assert_as_alone(params, norms, expected=None, **options):
    """Gradients are summed in another order than in one process; Adam divides by their size."""
    params_alone, norms_alone = expected or alone(STEPS, **options)
    torch.testing.assert_close(norms, norms_alone, rtol=1e-5, atol=0)
    for name, p in params_alone.items():
        torch.testing.assert_close(params[name], p, rtol=0, atol=2e-5, msg=lambda m, name=name: name + m)


# DTensors


def fsdp2(shape, device="cpu", **options):
    model = Net().to(device)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    fully_shard(model.up, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = FusedHygieneAdamW(model, **OPTIONS | options)
    norms = train(model, optimizer, STEPS, after=lambda: optimizer.grad_norm.item(), device=device)
    return full_params(model), norms, optimizer._plan.fallbacks


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_fsdp2(shape):
    """With two dimensions: HSDP."""
    expected = alone(STEPS)
    results = run(torch.Size(shape).numel(), fsdp2, shape)
    for params, norms, fallbacks in results:
        assert norms == results[0][1]
        assert_as_alone(params, norms, expected)
        assert not fallbacks


def fsdp2_as_torch(clip):
    """Beside torch's AdamW and clip on an equal model: the greatest difference of parameters."""
    models = [Net() for _ in range(2)]
    for model in models:
        fully_shard(model.up)
        fully_shard(model)
    ours = FusedHygieneAdamW(models[0].parameters(), lr=1e-2, max_grad_norm=clip)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-2)
    step = theirs.step
    norms = []

    def clipped():
        norms.append(nn.utils.clip_grad_norm_(models[1].parameters(), clip).full_tensor().item())
        step()

    theirs.step = clipped
    grad_norms = train(models[0], ours, STEPS, after=lambda: ours.grad_norm.item())
    train(models[1], theirs, STEPS)
    return full_params(models[0]), full_params(models[1]), grad_norms, norms


def test_fsdp2_as_torch():
    for ours, theirs, grad_norms, norms in run(2, fsdp2_as_torch, 0.3):
        torch.testing.assert_close(grad_norms, norms, rtol=1e-5, atol=0)
        for name, p in theirs.items():
            torch.testing.assert_close(ours[name], p, rtol=0, atol=2e-5)


def tensor_parallel(shards_data):
    """Linear layers over one dimension of a mesh; the rest stays plain, or all is sharded over the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = Net()
    plan = {
        "up": ColwiseParallel(output_layouts=Replicate()),
        "down": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tensor"], plan)
    if shards_data:
        fully_shard(model, mesh=mesh["data"])
    optimizer = FusedHygieneAdamW(model, **OPTIONS)
    rows = (mesh.get_local_rank("data"), mesh.size(0))
    collectives = []
    step = optimizer.step

    def watched():
        with Collectives() as seen:
            step()
        collectives.append(seen.entered)

    optimizer.step = watched
    norms = train(model, optimizer, STEPS, after=lambda: optimizer.grad_norm.item(), replicas=rows)
    kinds = {str(getattr(p, "placements", None)) for p in model.parameters()}
    return full_params(model), norms, optimizer._plan.fallbacks, collectives, kinds


@pytest.mark.parametrize(("world_size", "shards_data", "meshes"), [(2, False, 1), (4, True, 2)])
def test_tensor_parallel(world_size, shards_data, meshes):
    """Plain parameters beside DTensors; with FSDP2, DTensors on meshes of one and of two dimensions."""
    expected = alone(STEPS)
    for params, norms, fallbacks, collectives, kinds in run(world_size, tensor_parallel, shards_data):
        assert_as_alone(params, norms, expected)
        assert not fallbacks
        assert collectives == [["allreduce_"] * meshes] * STEPS
        assert len(kinds) > 2


# DDP


def ddp():
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    optimizer = FusedHygieneAdamW(model, **OPTIONS)
    misaligned = []

    def after():
        grads = [p.grad for p in model.parameters()]
        misaligned.append(sum(grad.data_ptr() % 16 != 0 for grad in grads))
        assert any(grad.storage_offset() for grad in grads)
        return optimizer.grad_norm.item()

    norms = train(model, optimizer, STEPS, after=after)
    with Collectives() as seen:
        optimizer.step()
    assert not seen.entered
    return full_params(model.module), norms, optimizer._plan.fallbacks, misaligned


def test_ddp_gradients_as_bucket_views():
    expected = alone(STEPS)
    results = run(2, ddp)
    for params, norms, fallbacks, misaligned in results:
        assert norms == results[0][1]
        assert_as_alone(params, norms, expected)
        assert not fallbacks
        assert all(misaligned)


# FSDP1


def fsdp1(use_orig_params, strategy, options, as_group):
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        Net(),
        use_orig_params=use_orig_params,
        sharding_strategy=strategy,
        device_id=torch.device("cpu"),
    )
    if as_group:
        options = options | {"norm_process_group": as_group()}
    optimizer = FusedHygieneAdamW(model.parameters(), **OPTIONS | options)
    norms = train(model, optimizer, STEPS, after=lambda: optimizer.grad_norm and optimizer.grad_norm.item())
    with FullyShardedDataParallel.summon_full_params(model):
        params = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    return params, norms, optimizer._plan.fallbacks


def world():
    return dist.group.WORLD


def summed_over_world():
    def reduce(sums):
        assert sums.dtype == torch.float64
        assert sums.shape == (2,)
        dist.all_reduce(sums)
        return sums

    return reduce


def unchanged():
    return lambda sums: sums


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("as_group", [world, summed_over_world])
def test_fsdp1_with_its_process_group(use_orig_params, as_group):
    make = functools.partial(plain_groups, FusedHygieneAdamW)
    expected = alone(STEPS, make)
    for world_size in (2, 4):
        results = run(world_size, fsdp1, use_orig_params, ShardingStrategy.FULL_SHARD, {}, as_group)
        for params, norms, fallbacks in results:
            assert norms == results[0][1]
            assert_as_alone(params, norms, expected)
            assert not fallbacks


def plain_groups(make, model, **options):
    """As FSDP1's flat parameters: no groups."""
    return make(model.parameters(), **options)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_without_sharding(use_orig_params):
    expected = alone(STEPS, functools.partial(plain_groups, FusedHygieneAdamW))
    strategy = ShardingStrategy.NO_SHARD
    for params, norms, _ in run(2, fsdp1, use_orig_params, strategy, {}, unchanged):
        assert_as_alone(params, norms, expected)


def refused(use_orig_params, options, later):
    model = FullyShardedDataParallel(Net(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = FusedHygieneAdamW(model.parameters(), lr=1e-2, **{} if later else options)
    if later:
        train(model, optimizer, 2)
        optimizer.max_grad_norm = options["max_grad_norm"]
    before = [p.detach().clone() for p in model.parameters()]
    try:
        train(model, optimizer, 1)
    except RuntimeError as error:
        is_unchanged = all(map(torch.equal, before, model.parameters()))
        return str(error), is_unchanged and bool(optimizer.state) == later
    return "no error", False


@pytest.mark.parametrize(
    ("options", "later"),
    [({"max_grad_norm": 1.0}, False), ({"skip_nonfinite": True}, False), ({"max_grad_norm": 1.0}, True)],
    ids=["clip", "skip", "clip later"],
)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_without_a_process_group_is_refused(use_orig_params, options, later):
    for message, is_unchanged in run(2, refused, use_orig_params, options, later):
        assert "parameter number 0 of group 0 is sharded by FSDP1" in message
        assert "Pass norm_process_group=" in message
        assert is_unchanged


def test_fsdp1_without_a_norm_and_on_one_process():
    run(2, fsdp1, True, ShardingStrategy.FULL_SHARD, {"max_grad_norm": None}, None)
    run(1, fsdp1, True, ShardingStrategy.FULL_SHARD, {}, None)


# ZeRO-1


def zero(form, n_params=None):
    """Training with the state, not the gradients, spread over the processes."""
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    params = list(model.parameters())[:n_params]
    group = dist.group.WORLD
    if form == "arguments":
        optimizer = ZeroRedundancyOptimizer(
            params, optimizer_class=FusedHygieneAdamW, norm_process_group=group, **OPTIONS
        )
    elif form == "partial":
        ours = functools.partial(
            FusedHygieneAdamW, max_grad_norm=OPTIONS["max_grad_norm"], norm_process_group=group
        )
        rest = {key: value for key, value in OPTIONS.items() if key != "max_grad_norm"}
        optimizer = ZeroRedundancyOptimizer(params, optimizer_class=ours, **rest)
    elif form == "groups":
        groups = build_param_groups(model, 0.1)
        for param_group in groups:
            del param_group["param_names"]
        options = {"lr": OPTIONS["lr"], "max_grad_norm": OPTIONS["max_grad_norm"]}
        optimizer = ZeroRedundancyOptimizer(
            groups, optimizer_class=FusedHygieneAdamW, norm_process_group=group, **options
        )
    norms = train(model, optimizer, STEPS, after=lambda: optimizer.optim.grad_norm.item())
    optimizer.consolidate_state_dict()
    saved = pickle.dumps(optimizer.state_dict()) if dist.get_rank() == 0 else None
    mine = [p for param_group in optimizer.optim.param_groups for p in param_group["params"]]
    return full_params(model.module), norms, optimizer.optim._plan.fallbacks, len(mine), saved


@pytest.mark.parametrize("form", ["arguments", "partial", "groups"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_zero_redundancy_optimizer(form, world_size):
    make = FusedHygieneAdamW if form == "groups" else functools.partial(plain_groups, FusedHygieneAdamW)
    expected = alone(STEPS, make)
    results = run(world_size, zero, form)
    for params, norms, fallbacks, _, _ in results:
        assert norms == results[0][1]
        assert_as_alone(params, norms, expected)
        assert not fallbacks
    # What it saves loads into torch's AdamW.
    saved = pickle.loads(results[0][-1])
    peer = torch.optim.AdamW(Net().parameters(), lr=1.0)
    assert len(saved["state"]) == len(peer.param_groups[0]["params"])
    if form != "groups":
        peer.load_state_dict(saved)
        assert all(state["step"].item() == STEPS for state in peer.state.values())


def test_zero_redundancy_optimizer_with_empty_partitions():
    """Fewer parameters than processes: the others enter the sum, and report the norm."""
    results = run(4, zero, "arguments", 2)
    counts = [n for *_, n, _ in results]
    assert sorted(counts) == [0, 0, 1, 1]
    model = Net()
    params = list(model.parameters())[:2]
    peer = FusedHygieneAdamW(params, **OPTIONS)
    norms_alone = train(model, peer, STEPS, after=lambda: peer.grad_norm.item())
    expected = {name: p.detach() for name, p in model.named_parameters()}, norms_alone
    for params, norms, *_ in results:
        assert norms == results[0][1]
        assert_as_alone(params, norms, expected)


def empty_partition_skips():
    """A process without parameters counts the steps that all skip."""
    groups = [{"params": [nn.Parameter(torch.ones(3))] if dist.get_rank() == 0 else []}]
    optimizer = FusedHygieneAdamW(
        groups, max_grad_norm=1.0, skip_nonfinite=True, norm_process_group=dist.group.WORLD
    )
    seen = []
    for value in (1.0, float("inf"), 2.0):
        for p in groups[0]["params"]:
            p.grad = torch.full((3,), value)
        optimizer.step()
        seen.append((optimizer.grad_norm.item(), optimizer.skipped_steps.item()))
    return seen


def test_a_process_without_parameters():
    first, *others = run(3, empty_partition_skips)
    assert first == [(pytest.approx(3**0.5), 0), (float("inf"), 1), (pytest.approx(2 * 3**0.5), 1)]
    assert all(seen == first for seen in others)


# Pipeline stages


def pipeline(uses_callable):
    """Two stages, each in two processes: every process steps some layers, by the norm of all."""
    rank = dist.get_rank()
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    names = [("up", "norm"), ("down", "gain")][rank % 2]
    model = Net()

    def reduce(sums):
        dist.all_reduce(sums, group=group)
        return sums

    optimizer = FusedHygieneAdamW(
        [(n, p) for n, p in model.named_parameters() if n.split(".")[0] in names],
        **OPTIONS,
        norm_process_group=reduce if uses_callable else group,
    )
    return train(model, optimizer, 1, after=lambda: optimizer.grad_norm.item(), replicas=(0, 1))


@pytest.mark.parametrize("uses_callable", [False, True])
def test_pipeline_stages(uses_callable):
    _, (norm,) = alone(1)
    for norms in run(4, pipeline, uses_callable):
        assert norms == [pytest.approx(norm, rel=1e-6)]


# norm_process_group


def copies_and_pickles():
    group = dist.group.WORLD
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedHygieneAdamW([p], max_grad_norm=1.0, norm_process_group=group)
    p.grad = torch.ones(3)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.norm_process_group is optimizer.norm_process_group is group
    assert copy.copy(optimizer).norm_process_group is group
    twin.param_groups[0]["params"][0].grad = torch.ones(3)
    twin.step()
    try:
        pickle.dumps(optimizer)
    except TypeError as error:
        message = str(error)
    else:
        message = "no error"
    pickle.dumps(optimizer.state_dict())
    optimizer.norm_process_group = None
    assert pickle.loads(pickle.dumps(optimizer)).norm_process_group is None
    optimizer.norm_process_group = group
    optimizer.step()
    return message, twin.grad_norm.item(), optimizer.grad_norm.item()


def test_copies_keep_the_process_group_and_pickles_refuse_it():
    for message, *norms in run(2, copies_and_pickles):
        assert "set norm_process_group = None before" in message
        assert norms == [pytest.approx(6**0.5)] * 2


def twice(sums):
    return 2 * sums


def test_a_callable_is_copied_and_pickled():
    p = nn.Parameter(torch.ones(2))
    optimizer = FusedHygieneAdamW([p], max_grad_norm=1.0, norm_process_group=twice)
    for other in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.norm_process_group is twice
        (q,) = other.param_groups[0]["params"]
        q.grad = torch.ones(2)
        other.step()
        assert other.grad_norm.item() == 2.0


@pytest.mark.parametrize("value", [7, "world", object()], ids=["number", "name", "object"])
def test_what_is_no_process_group_is_refused(value):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="norm_process_group must be a process group"):
        FusedHygieneAdamW([p], norm_process_group=value)
    optimizer = FusedHygieneAdamW([p])
    with pytest.raises(TypeError, match="norm_process_group must be a process group"):
        optimizer.norm_process_group = value


@pytest.mark.parametrize("value", [None, 3.0, torch.ones(()), torch.ones(3)])
def test_what_a_callable_must_return(value):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = FusedHygieneAdamW([p], max_grad_norm=1.0, norm_process_group=lambda sums: value)
    with pytest.raises(TypeError, match=r"must return a tensor of shape \(2,\)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))


@pytest.mark.parametrize(
    ("name", "value"), [("max_grad_norm", 2.0), ("norm_process_group", twice), ("backend", "reference")]
)
def test_an_argument_of_the_optimizer_in_a_group_is_refused(name, value):
    """Unless it is the optimizer's own, as ZeroRedundancyOptimizer copies it there."""
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{name} in parameter group 0 is .* argument of the optimizer"):
        FusedHygieneAdamW([{"params": [p], name: value}], max_grad_norm=1.0)
    FusedHygieneAdamW([{"params": [p], name: value}], **{name: value})


# On a GPU

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def fsdp2_on_cpu_memory():
    """Parameters wait in host memory, and are stepped there; the mesh has GPUs."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    model = Net()
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = FusedHygieneAdamW(model, **OPTIONS)
    norms = train(model, optimizer, STEPS, after=lambda: optimizer.grad_norm.item(), device="cuda")
    return full_params(model), norms, optimizer._plan.fallbacks


@pytest.mark.parametrize(("function", "args"), [(fsdp2, ((1,), "cuda")), (fsdp2_on_cpu_memory, ())])
@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=gpu)])
def test_fsdp2_on_a_gpu(function, args, backend):
    ((params, norms, fallbacks),) = run(1, function, *args, backend=backend)
    assert_as_alone({name: p.cpu() for name, p in params.items()}, norms)
    assert not fallbacks
