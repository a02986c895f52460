"""Groups are built alike before and after sharding, and alike on all processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fused_adamw import build_param_groups, explain_param_groups

from .ranks import run


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.gamma = nn.Parameter(torch.ones(6))


class Model(nn.Module):
    """A tied head, and matrices so small that some processes hold nothing of them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.Sequential(Block(), Block())
        self.small = nn.Linear(3, 1)
        self.experts = nn.Parameter(torch.ones(3, 2, 5))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


POLICIES = ("hygiene", "huggingface", "timm", "nanogpt", "megatron", "all")


def sharded(how):
    model = Model()
    if how == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif how == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))
    elif how == "tensor parallel":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    elif how == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return model


def decisions(how):
    """By policy, the weight decay of each parameter by name; and the groups' names in their order."""
    model = sharded(how)
    decays, order = {}, {}
    for policy in POLICIES:
        groups = build_param_groups(model, 0.1, policy=policy)
        decays[policy] = {n: group["weight_decay"] for group in groups for n in group["param_names"]}
        order[policy] = [group["param_names"] for group in groups]
    return decays, order, str(explain_param_groups(model)).count("FSDP")


@pytest.mark.filterwarnings("ignore:not recognised")
@pytest.mark.parametrize("how", ["fsdp2", "hsdp", "tensor parallel", "fsdp1"])
def test_as_before_sharding(how):
    expected = {}
    for policy in POLICIES:
        groups = build_param_groups(Model(), 0.1, policy=policy)
        expected[policy] = {n: group["weight_decay"] for group in groups for n in group["param_names"]}
    results = run(4, decisions, how)
    assert len({tuple(values.values()) for values in expected.values()}) > 1
    for decays, order, wrappers in results:
        assert decays == expected
        assert order == results[0][1]
        assert wrappers == 0
