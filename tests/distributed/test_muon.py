"""Muon and AdamW on sharded models: one norm and one decision to skip for all processes and both parts."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_adamw import MuonWithAdamW, WidthScale, build_param_groups, split_for_muon

from .models import Net, full_params, train
from .ranks import run

STEPS = 3
OPTIONS = {"lr": 0.02, "adamw_lr": 1e-2, "max_grad_norm": 0.05}


class Sgd(torch.optim.SGD):
    """In place of Muon, whose bfloat16 iteration turns the last bits of a sum into visible differences."""


def make(model, **options):
    """A Muon part of one matrix: so small a model has no hidden ones by its place."""
    split = split_for_muon(model, overrides={"*up.weight": {"muon": True}, "*down.weight": {"muon": False}})
    return MuonWithAdamW(split, **{**OPTIONS, "muon": Sgd, **options})


def trained(how, overflow=None, **options):
    model = Net()
    if how == "fsdp2":
        fully_shard(model.up)
        fully_shard(model)
    elif how == "ddp":
        model = DistributedDataParallel(model)
    optimizer = make(model, **options)
    if overflow is not None:
        step = optimizer.step

        def overflowing():
            if dist.get_rank() == 1:
                p = optimizer._muon.param_groups[0]["params"][0]
                getattr(p.grad, "_local_tensor", p.grad).view(-1)[0] = overflow
            step()

        optimizer.step = overflowing
    norms = train(model, optimizer, STEPS, after=lambda: optimizer.grad_norm.item())
    inner = getattr(model, "module", model)
    return full_params(inner), norms, int(optimizer.skipped_steps)


def alone(**options):
    model = Net()
    optimizer = make(model, **options)
    norms = train(model, optimizer, STEPS, after=lambda: optimizer.grad_norm.item())
    return full_params(model), norms


@pytest.mark.parametrize("how", ["fsdp2", "ddp"])
def test_as_alone(how):
    expected, norms_alone = alone()
    for params, norms, skipped in run(2, trained, how):
        torch.testing.assert_close(norms, norms_alone, rtol=1e-5, atol=0)
        for name, p in expected.items():
            torch.testing.assert_close(params[name], p, rtol=0, atol=2e-5)
        assert skipped == 0


def with_torchs_muon():
    return trained("fsdp2", muon=None)


def test_torchs_muon_steps_shards():
    expected, norms_alone = alone(muon=None)
    for params, norms, _ in run(2, with_torchs_muon):
        torch.testing.assert_close(norms, norms_alone, rtol=1e-3, atol=0)
        for name, p in expected.items():
            torch.testing.assert_close(params[name], p, rtol=0, atol=2e-3)  # bfloat16


def with_overflow(how):
    return trained(how, overflow=math.inf, skip_nonfinite=True)


def test_one_process_overflows_and_all_skip():
    before = full_params(Net())
    for params, _, skipped in run(2, with_overflow, "fsdp2"):
        assert skipped == STEPS
        for name, p in before.items():
            assert torch.equal(params[name], p)


def widths():
    """Learning rates by name, before and after sharding."""
    found = []
    for shards in (False, True):
        model = Net()
        width = WidthScale({"up.weight": 2, "down.weight": 5})
        if shards:
            fully_shard(model)
        groups = build_param_groups(model, lr=1.0, width=width)
        found.append({n: g["lr"] for g in groups for n in g["param_names"]})
    return found


def test_widths_are_those_of_whole_matrices():
    for before, after in run(2, widths):
        assert before == after
        assert after["up.weight"] == pytest.approx(1 / 3)
