"""A process that does not come to a step's collective: the others get an error, and have changed nothing."""

import datetime
import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from fused_adamw import FusedHygieneAdamW

from . import layouts
from .ranks import RanksFailed, run

TIMEOUT = 3.0  # of the process group, in seconds; gloo's own is 30 minutes


def optimizer_over(kind, group):
    """With a norm over a group: that of plain parameters, or of DTensors on its mesh."""
    if kind == "plain":
        params = layouts.whole_params()
        return params, FusedHygieneAdamW(params, max_grad_norm=1.0, norm_process_group=group)
    mesh = DeviceMesh.from_group(group, "cpu")
    params = layouts.placed_params([(mesh, [Shard(0) if shape else Replicate()]) for shape in layouts.SHAPES])
    return params, FusedHygieneAdamW(params, max_grad_norm=1.0)


def held(params, optimizer):
    """All bits that this process has."""
    states = [{key: layouts.held_bytes(t) for key, t in optimizer.state.get(p, {}).items()} for p in params]
    return [layouts.held_bytes(p) for p in params], states


def step_without_rank_1(kind, first, exits, told):
    """Rank 0 steps, and rank 1 has other things to do; the first writes down what became of it."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
    params, optimizer = optimizer_over(kind, group)
    for p in params:
        p.grad = p.detach().clone()
    if not first:
        optimizer.step()
    before, told = held(params, optimizer), Path(told)
    if dist.get_rank() == 1:
        if exits:
            os._exit(3)

        def closure():
            raise ValueError("no batch")

        with pytest.raises(ValueError, match="no batch"):
            optimizer.step(closure)
        while not told.exists():  # in the middle of something else, with its connections open
            time.sleep(0.05)
        return
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert held(params, optimizer) == before
    told.with_suffix(".part").write_text(f"{time.monotonic() - start} {caught.value}")
    told.with_suffix(".part").rename(told)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("kind", ["plain", "mesh"])
@pytest.mark.parametrize("exits", [True, False], ids=["exits", "raises"])
def test_the_others_raise_and_change_nothing(tmp_path, kind, first, exits):
    told = tmp_path / "told"
    if exits:
        with pytest.raises(RanksFailed, match=r"^rank 1: died$"):
            run(2, step_without_rank_1, kind, first, exits, str(told))
    else:
        run(2, step_without_rank_1, kind, first, exits, str(told))
    seconds, _, message = told.read_text().partition(" ")
    print(seconds, message)  # shown by `pytest -rP`
    assert float(seconds) < 10 * TIMEOUT
