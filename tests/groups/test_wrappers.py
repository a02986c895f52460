"""Wrapped or not, the same decisions under the same names."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fused_adamw.groups import build_param_groups, explain_param_groups

from .helpers import assert_partition, decays
from .models import RMSNorm


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(4)
        self.submodule = nn.Linear(4, 4)  # ends with a wrapper's word
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x + self.gamma * self.submodule(self.norm(x))


class Model(nn.Module):
    """Has everything a wrapper can break: a hook, an attribute called `module`, raw parameters."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.hooked = nn.Parameter(torch.zeros(4, 4))
        self.module = Block()
        self.blocks = nn.Sequential(Block(), Block())

    def no_weight_decay(self):
        return {"hooked"}

    def forward(self, x):
        return self.blocks(self.module(x @ self.hooked + self.cls_token))


pytestmark = pytest.mark.filterwarnings("ignore:not recognised", "ignore:.*script_method")

EXPECTED = {
    "cls_token": False,
    "hooked": False,
    "module.gamma": False,
    "module.norm.weight": False,
    "module.submodule.weight": True,
    "module.submodule.bias": False,
    "blocks.0.gamma": False,
    "blocks.0.norm.weight": False,
    "blocks.0.submodule.weight": True,
    "blocks.0.submodule.bias": False,
    "blocks.1.gamma": False,
    "blocks.1.norm.weight": False,
    "blocks.1.submodule.weight": True,
    "blocks.1.submodule.bias": False,
}


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check(model, policy_names=("hygiene", "huggingface", "timm", "nanogpt", "megatron", "all", "recipe")):
    groups = build_param_groups(model, 0.1)
    assert decays(groups) == EXPECTED
    assert_partition(model, groups)
    for policy in policy_names:
        plain = build_param_groups(Model(), 0.1, policy=policy)
        assert decays(build_param_groups(model, 0.1, policy=policy)) == decays(plain), policy


def test_plain():
    check(Model())


def test_compile():
    check(torch.compile(Model()))
    model = Model()
    model.blocks[0] = torch.compile(model.blocks[0])
    check(model)


def test_compile_in_place():
    model = Model()
    model.compile()
    check(model)


def test_checkpoint_wrapper():
    model = Model()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    check(model)
    check(checkpoint_wrapper(Model()))


def test_data_parallel():
    check(DataParallel(Model()))


def test_averaged_model():
    check(AveragedModel(Model()))


def test_ddp(process_group):
    check(DistributedDataParallel(Model()))
    check(torch.compile(DistributedDataParallel(Model())))
    check(DistributedDataParallel(torch.compile(Model())))


def test_fsdp2(process_group):
    from torch.distributed.fsdp import fully_shard

    model = Model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    check(model)
    assert "FSDP" not in str(explain_param_groups(model))
    check(torch.compile(model))


class Positions(nn.Module):
    """Only a forward pass tells that `p` is a position; below and beside it are layers."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.rand(5, 4))
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.layers(x + self.p)


def wrapped(how):
    from torch.distributed.fsdp import fully_shard

    model = Positions()
    if how == "fsdp2":
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    return {"ddp": DistributedDataParallel, "compile": torch.compile}.get(how, lambda m: m)(model)


@pytest.mark.parametrize("how", ["plain", "fsdp2", "ddp", "compile"])
def test_use_is_seen_in_wrapped_models(process_group, how):
    model = wrapped(how)
    inputs = torch.zeros(2, 5, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = explain_param_groups(model, 0.1, example_inputs=inputs)
    roles = {d.name: str(d.role) for d in report.decisions if not d.name.endswith("bias")}
    assert roles == {"p": "position", "layers.0.weight": "matrix", "layers.1.weight": "output"}
    model(inputs).sum().backward()  # it works as before


def test_fsdp1(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    check(FullyShardedDataParallel(Model(), use_orig_params=True, device_id=device))
    flat = FullyShardedDataParallel(Model(), use_orig_params=False, device_id=device)
    with pytest.raises(ValueError, match=r"is an FSDP FlatParameter.*use_orig_params=True"):
        build_param_groups(flat)


def _fsdp1_rank(rank, store, results):
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model = Model()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.ones(2, 4, 6))
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert all(param.ndim == 1 for param in model.parameters())  # what misleads rules that count dimensions
    torch.save(decays(build_param_groups(model, 0.1)), f"{results}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp1_shards(tmp_path):
    """On two ranks FSDP1 leaves flat shards, some of them empty."""
    torch.multiprocessing.spawn(_fsdp1_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        answers = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert answers == EXPECTED | {"experts.gate_up_proj": True}


def test_two_meshes_give_two_groups(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    meshes = [init_device_mesh("cpu", (1,), mesh_dim_names=(name,)) for name in ("dp", "ep")]
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4)))
    for layer, mesh in zip(model, [*meshes, meshes[0], None], strict=True):
        if mesh is not None:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Replicate()]))
    assert isinstance(model[0].weight, DTensor)
    names = [group["param_names"] for group in build_param_groups(model, 0.1)]
    assert names == [["0.weight", "2.weight"], ["1.weight"], ["3.weight"]]


def test_a_deep_copy_decides_alike():
    check(copy.deepcopy(Model()))


def test_a_user_attribute_called_module_keeps_its_name():
    names = [n for g in build_param_groups(Model(), 0.1) for n in g["param_names"]]
    assert "module.submodule.weight" in names


def test_report_understands_wrapped_names():
    report = explain_param_groups(torch.compile(Model()))
    for name in ("blocks.0.norm.weight", "_orig_mod.blocks.0.norm.weight", "module.blocks.0.norm.weight"):
        assert report[name].startswith("blocks.0.norm.weight does not decay")
