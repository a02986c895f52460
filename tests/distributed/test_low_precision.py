"""Masters, codes and stochastic rounding of DTensors: the same bits on any mesh."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fused_adamw import FusedHygieneAdamW, build_param_groups
from fused_adamw.formats import FORMATS

from .layouts import values
from .ranks import run

BF16, F32 = torch.bfloat16, torch.float32
# Rows of one block and some, of whole blocks, of a convolution; over 4 processes the fourth has no row of the
# third. The others are too small for codes.
SHAPES = [(34, 130), (20, 512), (3, 1408), (33, 3, 7, 7), (40, 100), (7, 6), (9,), ()]
CODES = ("exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale")
OPTIONS = {"lr": 1e-1, "max_grad_norm": 1.5, "seed": 11}
SCHEMES = {
    "split-8bit": {"master_weights": "split", "state_dtype": "8bit"},
    "stochastic-8bit": {"stochastic_rounding": True, "state_dtype": "8bit"},
    "stochastic": {"stochastic_rounding": True},
}
STEPS = 3


def rows(mesh):
    return [Shard(0)] * mesh.ndim


def replicated(mesh):
    return [Replicate()] * mesh.ndim


def hsdp(mesh):
    return [Replicate(), Shard(0)]


def rows_twice(mesh):
    return [Shard(0), Shard(0)]


def columns(mesh):
    return [Shard(1)]


def rows_and_columns(mesh):
    return [Shard(0), Shard(1)]


MESHES = {
    rows: [(2,), (4,)],
    replicated: [(2,)],
    hsdp: [(2, 2)],
    rows_twice: [(2, 2)],
    columns: [(2,), (4,)],
    rows_and_columns: [(2, 2)],
}
LAYOUTS = {f"{f.__name__}-{shape}": (f, shape) for f, shapes in MESHES.items() for shape in shapes}


def placements_of(name, mesh, shape):
    """How a parameter of a shape is placed; what has too few dimensions is replicated there."""
    found = LAYOUTS[name][0](mesh)
    return [p if p.is_replicate() or p.dim < len(shape) else Replicate() for p in found]


def new_optimizer(params, options):
    return FusedHygieneAdamW([(f"p{i}", p) for i, p in enumerate(params)], **OPTIONS, **options)


def step_once(params, optimizer, step):
    for i, p in enumerate(params):
        grad = values(p.shape, 1000 + 100 * step + i).to(BF16)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = grad
    optimizer.step()


def place(p, mesh, placements):
    """A copy of a parameter on a mesh, as a replicated part would share its memory."""
    return nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements, src_data_rank=None))


def local_part(whole, p):
    """What this process holds of a whole tensor that is placed as a parameter is."""
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


def differences(name, options):
    """Where a training on a mesh differs from one in a process alone, and the keys of the states."""
    mesh = init_device_mesh("cpu", LAYOUTS[name][1])
    whole = [nn.Parameter(values(shape, i).to(BF16)) for i, shape in enumerate(SHAPES)]
    params = [place(p, mesh, placements_of(name, mesh, p.shape)) for p in whole]
    optimizer = new_optimizer(params, options)
    # Where blocks would be cut, moments are bfloat16.
    is_coded = [
        "8bit" if kept.exp_avg.side_dtype else BF16 if options.get("state_dtype") else None
        for kept in optimizer._kept()
    ]
    roles = {f"p{i}": asked for i, asked in enumerate(is_coded) if asked is not None}
    alone = new_optimizer(whole, {**options, "state_roles": roles})
    for step in range(STEPS):
        step_once(params, optimizer, step)
        step_once(whole, alone, step)
    found = []
    for i, (p, q) in enumerate(zip(params, whole, strict=True)):
        pairs = {"parameter": (p, q)} | {
            key: (value, alone.state[q][key]) for key, value in optimizer.state[p].items()
        }
        for key, (mine, theirs) in pairs.items():
            part = theirs.detach() if key == "step" else local_part(theirs.detach(), p)
            if not same_bits(mine.detach() if key == "step" else mine.detach().to_local(), part):
                found.append((i, key))
    keys = [set(optimizer.state[p]) for p in params]
    return found, keys, optimizer.grad_norm.equal(alone.grad_norm)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_in_one_process(name, scheme):
    world_size = LAYOUTS[name][1][0] * (LAYOUTS[name][1] + (1,))[1]
    results = run(world_size, differences, name, SCHEMES[scheme])
    assert all(found == [] for found, _, _ in results)
    assert all(same_norm for _, _, same_norm in results)
    keys = results[0][1]
    assert all(others == keys for _, others, _ in results)
    if "8bit" in scheme:
        # Columns of (20, 512) are cut between blocks, those of (3, 1408) within them.
        expected = {"columns-(2,)": [1], "columns-(4,)": [1], "rows_and_columns-(2, 2)": [1]}
        assert [i for i, of_p in enumerate(keys) if CODES[0] in of_p] == expected.get(name, [0, 1, 2, 3])


def cut_twice():
    """A shard that is no series of equal pieces: the message, and whether anything has changed."""
    mesh = init_device_mesh("cpu", (2, 2))
    p = place(values((3, 4, 6), 0).to(BF16), mesh, [Shard(1), Shard(2)])
    plain, rounded = (FusedHygieneAdamW([p], stochastic_rounding=on) for on in (None, True))
    before = p.to_local().clone()
    try:
        step_once([p], rounded, 0)
    except RuntimeError as error:
        is_unchanged = p.to_local().equal(before) and not rounded.state
        step_once([p], plain, 0)  # which draws no noise
        return str(error), is_unchanged, not p.to_local().equal(before)
    return "no error", False, False


def test_elements_that_cannot_be_numbered_are_refused():
    for message, is_unchanged, is_stepped in run(4, cut_twice):
        assert message.startswith("parameter number 0 of group 0 is placed as (Shard(dim=1), Shard(dim=2)):")
        assert is_unchanged
        assert is_stepped


# ---- Checkpoints


class Net(nn.Module):
    """Matrices that are coded, one with rows that neither 2 nor 4 divide, and others that are not."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 66)
        self.norm = nn.LayerNorm(66)
        self.down = nn.Linear(66, 65)
        for i, p in enumerate(self.parameters()):
            p.data = values(p.shape, i)
        self.to(BF16)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


def sharded_net():
    """In a process alone nothing is sharded."""
    model = Net()
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def whole(value):
    """A whole tensor, whatever collectives know."""
    if not isinstance(value, DTensor):
        return value.detach().clone()
    return value.detach().to(torch.int32 if value.dtype == torch.int16 else value.dtype).full_tensor()


def everything(model, optimizer):
    """Parameters and states, whole: what must be the same bits on any number of processes."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole(p)
        for key, value in optimizer.state[p].items():
            found[f"{name}.{key}"] = whole(value).to(torch.int16 if "residual" in key else value.dtype)
    return found


def train(model, optimizer, first):
    for step in range(first, first + STEPS):
        for i, p in enumerate(model.parameters()):
            grad = values(p.shape, 1000 + 100 * step + i).to(BF16)
            p.grad = local_grad(grad, p) if isinstance(p, DTensor) else grad
        optimizer.step()
        optimizer.zero_grad()


def local_grad(grad, p):
    return distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)


def stage(folder, number, scheme, options):
    """Load checkpoint `number`, compare, train on, save the next one."""
    model = sharded_net()
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **SCHEMES[scheme])
    options = StateDictOptions(**options)
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
    loaded = everything(model, optimizer) if number else {}
    train(model, optimizer, STEPS * number)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=Path(folder) / str(number + 1))
    return loaded, everything(model, optimizer)


def differing(a, b):
    assert a.keys() == b.keys()
    return [key for key in a if not same_bits(a[key], b[key])]


@pytest.mark.parametrize(
    "options",
    [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}],
    ids=["nested", "flat", "full"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_resharding_keeps_every_bit(tmp_path, scheme, options):
    before = None
    for number, world_size in enumerate((2, 4, 1)):
        results = run(world_size, stage, str(tmp_path), number, scheme, options)
        for loaded, after in results:
            assert before is None or differing(loaded, before) == []
            assert differing(after, results[0][1]) == []
        before = results[0][1]
    # As without any checkpoint.
    (unbroken,) = run(1, unbroken_run, scheme, 3)
    assert differing(before, unbroken) == []


def unbroken_run(scheme, stages):
    model = Net()
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **SCHEMES[scheme])
    for number in range(stages):
        train(model, optimizer, STEPS * number)
    return everything(model, optimizer)


def loaded_by_torch(folder, options):
    """What torch's AdamW makes of our checkpoint, and what it should."""
    model = sharded_net()
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **SCHEMES["split-8bit"])
    train(model, optimizer, 0)
    options = StateDictOptions(**options)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    groups = [
        {"params": list(group["params"]), "weight_decay": group["weight_decay"]}
        for group in optimizer.param_groups
    ]
    theirs = torch.optim.AdamW(groups, lr=0.1)
    saved = {"optimizer": get_optimizer_state_dict(model, theirs, options=options)}
    dcp.load(saved, checkpoint_id=folder)
    found = saved["optimizer"]
    expected = get_optimizer_state_dict(model, optimizer, options=StateDictOptions())["state"]
    wrong = []
    for name, of_p in expected.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = found["state"][name][key] if "state" in found else found[f"state.{name}.{key}"]
            if not whole(value).equal(whole(of_p[key]).to(value.dtype)):
                wrong.append((name, key))
    return wrong


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_torch_reads_the_checkpoint(tmp_path, flat):
    for wrong in run(2, loaded_by_torch, str(tmp_path), {"flatten_optimizer_state_dict": flat}):
        assert wrong == []


def loaded_from_torch(folder, options):
    """Whether an optimizer with masters and codes takes a file of torch's AdamW, which has neither."""
    model = sharded_net()
    options = StateDictOptions(**options)
    theirs = torch.optim.AdamW(build_param_groups(model, 0.1), lr=0.1)
    train(model, theirs, 0)
    dcp.save({"optimizer": get_optimizer_state_dict(model, theirs, options=options)}, checkpoint_id=folder)
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **SCHEMES["split-8bit"])
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(saved, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)
    wrong = []
    for name, p in model.named_parameters():
        mine, moments = optimizer.state[p], theirs.state[p]
        assert mine["step"] == STEPS
        assert not mine["master_residual"].to_local().any()
        for key, format in (("exp_avg", "root_signed"), ("exp_avg_sq", "root_unsigned")):
            found, expected = mine.get(key), moments[key].to_local()
            if found is None:
                coded = FORMATS[format].encode(expected, p.to_local().detach())
                found, expected = mine[f"{key}_code"], coded.values
            if not found.to_local().equal(expected):
                wrong.append((name, key))
    return wrong


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_checkpoints_of_torch_are_read(tmp_path, flat):
    for wrong in run(2, loaded_from_torch, str(tmp_path), {"flatten_optimizer_state_dict": flat}):
        assert wrong == []


def fsdp_and_tp():
    """Tensor parallel and FSDP2: rows sharded by both, and columns by one. Bits as in a process alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole_model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 96)).to(BF16)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 96)).to(BF16)
    for each in (whole_model, model):
        for i, p in enumerate(each.parameters()):
            p.data = values(p.shape, i).to(BF16)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    options = OPTIONS | {"stochastic_rounding": True, "state_dtype": BF16}
    optimizers = [FusedHygieneAdamW(each, **options) for each in (model, whole_model)]
    for step in range(STEPS):
        for each, optimizer in zip((model, whole_model), optimizers, strict=True):
            for i, p in enumerate(each.parameters()):
                grad = values(p.shape, 1000 + 100 * step + i).to(BF16)
                p.grad = local_grad(grad, p) if isinstance(p, DTensor) else grad
            optimizer.step()
    pairs = zip(model.named_parameters(), whole_model.parameters(), strict=True)
    return [(name, whole(p).equal(q), str(p.placements)) for (name, p), q in pairs]


def test_tensor_parallel_and_fsdp():
    for results in run(4, fsdp_and_tp):
        assert all(equal for _, equal, _ in results), results


def masters():
    """Masters from whole float32 weights, and from sharded ones, given back whole."""
    full = {name: values(p.shape, 50 + i) / 3 for i, (name, p) in enumerate(Net().named_parameters())}
    found = []
    for is_sharded in (False, True):
        model = sharded_net()
        optimizer = FusedHygieneAdamW(model, **OPTIONS, master_weights="split")
        weights = full
        if is_sharded:
            weights = {name: local_grad(full[name], p) for name, p in model.named_parameters()}
        optimizer.load_master(weights)
        given = optimizer.master_state_dict(model)
        found += [same_bits(whole(given[name]), full[name]) for name in full]
    return found


def test_masters_of_shards():
    for results in run(2, masters):
        assert results
        assert all(results)


def replicas():
    """What each replica of DistributedDataParallel comes to, on data of its own."""
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = FusedHygieneAdamW(model, **OPTIONS, **SCHEMES["stochastic-8bit"])
    for step in range(20):
        model(values((8, 64), 10 * step + dist.get_rank()).to(BF16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return everything(model.module, optimizer)


def test_replicas_stay_equal():
    first, *others = run(2, replicas)
    assert all(differing(other, first) == [] for other in others)
