"""The snippets of docs/integrations.md, "Distributed", on two processes."""

import pytest
import torch
import torch.distributed as dist
from integrations.loops import CLIP, LR, Model, assert_norms_before_clipping, loader, run_snippet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fused_adamw import build_param_groups

from .ranks import run

NAMES = {
    "dist": dist,
    "init_device_mesh": init_device_mesh,
    "fully_shard": fully_shard,
    "FullyShardedDataParallel": FullyShardedDataParallel,
    "ZeroRedundancyOptimizer": ZeroRedundancyOptimizer,
    "DistributedDataParallel": DistributedDataParallel,
}
FSDP2, FSDP1, ZERO, GROUP, CALLABLE = range(5)


def snippet(number):
    """The parameters by name, and what was logged."""
    model = Model()
    names = run_snippet("Distributed", number, model=model, log_every=1, **NAMES)
    if number == FSDP1:
        with FullyShardedDataParallel.summon_full_params(names["model"]):
            params = {name: p.detach().clone() for name, p in model.named_parameters()}
    else:
        params = {name: getattr(p, "full_tensor", p.clone)().detach() for name, p in model.named_parameters()}
    return params, names["logged"]


@pytest.mark.parametrize("number", [FSDP2, FSDP1, ZERO])
def test_as_torch_in_one_process(number):
    """Both processes have the same data: as one process that has it."""
    model = Model()
    groups = [{"params": list(model.parameters())}] if number == ZERO else build_param_groups(model, 0.1)
    peer = torch.optim.AdamW(groups, lr=LR)
    norms = []
    for batch in loader():
        model(**batch)["loss"].backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        peer.step()
        peer.zero_grad()
    for params, logged in run(2, snippet, number):
        for name, p in model.named_parameters():
            torch.testing.assert_close(params[name], p.detach(), rtol=0, atol=1e-6)
        if number != FSDP1:
            assert_norms_before_clipping(logged, len(norms))
            torch.testing.assert_close(logged, norms, rtol=1e-5, atol=0)


def stages(number):
    """One layer in each of two processes."""
    stage = nn.Linear(2, 2, bias=False)
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    names = {"stage": stage, "pipeline_group": dist.group.WORLD, "expert_group": alone}
    optimizer = run_snippet("Distributed", number, **NAMES, **names)["optimizer"]
    stage.weight.grad = torch.full((2, 2), 1.5)
    optimizer.step()
    return optimizer.grad_norm.item()


@pytest.mark.parametrize("number", [GROUP, CALLABLE])
def test_stages(number):
    assert run(2, stages, number) == [pytest.approx(1.5 * 8**0.5)] * 2
