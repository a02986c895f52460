"""docs/distributed.md: what its snippets compute, on two processes."""

import pytest
import torch
from integrations.loops import CLIP, LR, Model, assert_norms_before_clipping, loader
from snippets import run_snippet
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fused_adamw import build_param_groups

from .ranks import run

DOCS = "docs/distributed.md"
FSDP2, FSDP1, ZERO = "FSDP2 and tensor parallelism", "FSDP1", "ZeroRedundancyOptimizer"


def trained(heading):
    """The parameters by name, and what was logged."""
    model = Model()
    names = run_snippet(DOCS, heading, model=model, log_every=1)
    if heading == FSDP1:
        with FullyShardedDataParallel.summon_full_params(names["model"]):
            params = {name: p.detach().clone() for name, p in model.named_parameters()}
    else:
        params = {name: getattr(p, "full_tensor", p.clone)().detach() for name, p in model.named_parameters()}
    return params, names["logged"]


@pytest.mark.parametrize("heading", [FSDP2, FSDP1, ZERO])
def test_as_torch_in_one_process(heading):
    """Both processes have the same data: as one process that has it."""
    model = Model()
    groups = [{"params": list(model.parameters())}] if heading == ZERO else build_param_groups(model, 0.1)
    peer = torch.optim.AdamW(groups, lr=LR)
    norms = []
    for batch in loader():
        model(**batch)["loss"].backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        peer.step()
        peer.zero_grad()
    for params, logged in run(2, trained, heading):
        for name, p in model.named_parameters():
            torch.testing.assert_close(params[name], p.detach(), rtol=0, atol=1e-6)
        if heading != FSDP1:
            assert_norms_before_clipping(logged, len(norms))
            torch.testing.assert_close(logged, norms, rtol=1e-5, atol=0)


def stages(number):
    """One layer in each of two processes."""
    stage = nn.Linear(2, 2, bias=False)
    optimizer = run_snippet(DOCS, "Pipeline stages", number, stage=stage)["optimizer"]
    stage.weight.grad = torch.full((2, 2), 1.5)
    optimizer.step()
    return optimizer.grad_norm.item()


@pytest.mark.parametrize("number", range(2), ids=["group", "callable"])
def test_stages(number):
    assert run(2, stages, number) == [pytest.approx(1.5 * 8**0.5)] * 2
