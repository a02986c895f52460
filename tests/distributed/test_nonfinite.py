"""What is not finite in one process: all processes decide alike."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fused_adamw import FusedHygieneAdamW

from . import layouts
from .layouts import LAYOUTS, Collectives, held_bytes
from .ranks import run

# The processes that hold the shard of parameter 2 that rank 1 holds, where others than it do.
SAME_SHARD = {"two_meshes": (1, 3), "mixed": (1, 3)}


def poisoned(name, value, ranks, options):
    """Steps without, with and again without `value` in the gradients of some processes."""
    layout = LAYOUTS[name]("cpu")
    params = layouts.placed_params(layout)
    optimizer = FusedHygieneAdamW(params, **options)
    seen = []
    for step in range(3):
        layouts.give_grads(params, layout, step)
        if step == 1:
            grad = params[2].grad.to_local()
            if dist.get_rank() in ranks:
                grad.view(-1)[0] = value
        before = [held_bytes(p) for p in params]
        optimizer.step()
        changed = [a != held_bytes(p) for a, p in zip(before, params, strict=True) if a]
        counts = {state["step"].item() for state in optimizer.state.values()}
        seen.append((optimizer.grad_norm.item(), optimizer.skipped_steps.item(), any(changed), counts))
    return seen


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", ["one_mesh", "hsdp", "fsdp_and_tp", "two_meshes", "mixed"])
def test_all_skip(name, value):
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    for seen in run(4, poisoned, name, value, SAME_SHARD.get(name, (1,)), options):
        norms, skipped, changed, counts = zip(*seen, strict=True)
        assert math.isfinite(norms[0])
        assert math.isfinite(norms[2])
        assert math.isnan(norms[1]) if math.isnan(value) else norms[1] == math.inf
        assert skipped == (0, 1, 1)
        assert changed == (True, False, True)
        assert counts == ({1}, {1}, {2})


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_without_skipping_all_processes_get_what_one_process_would(value):
    """NaN everywhere, as from torch.nn.utils.clip_grad_norm_; of infinity, gradients of zero or NaN."""
    params = layouts.whole_params()
    peer = FusedHygieneAdamW(params, max_grad_norm=1.0)
    for step in range(2):
        for p, grad in zip(params, layouts.whole_grads(step), strict=True):
            p.grad = grad
        if step == 1:
            params[0].grad[4, 0] = value
        peer.step()
    for found in run(2, diverged, value):
        for p, q in zip(found, params, strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=0, atol=0, equal_nan=True)


def diverged(value):
    layout = layouts.one_mesh("cpu")
    params = layouts.placed_params(layout)
    optimizer = FusedHygieneAdamW(params, max_grad_norm=1.0)
    for step in range(2):
        layouts.give_grads(params, layout, step)
        if step == 1 and dist.get_rank() == 1:
            params[0].grad.to_local()[0, 0] = value  # row 4 of the whole
        optimizer.step()
    return [p.detach().full_tensor() for p in params]


# Overflow that a scaler finds


def scaled(name, options, overflow_ranks, wrapped=False):
    """Three steps under a loss scale; in the second, processes have an infinite gradient."""
    layout = LAYOUTS[name]("cpu")
    params = layouts.placed_params(layout)
    optimizer = FusedHygieneAdamW(params, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    seen = []
    for step in range(3):
        scaler.scale(torch.zeros(()))
        layouts.give_grads(params, layout, step)
        for p in params:
            p.grad.mul_(scaler.get_scale())
        if step == 1 and dist.get_rank() in overflow_ranks:
            params[2].grad.to_local().view(-1)[0] = math.inf
        before = [held_bytes(p) for p in params]
        scaler.step(optimizer)
        scaler.update()
        changed = any(a != held_bytes(p) for a, p in zip(before, params, strict=True) if a)
        norm = None if optimizer.grad_norm is None else optimizer.grad_norm.item()
        seen.append((norm, changed, optimizer.skipped_steps.item(), scaler.get_scale()))
    return seen, [layouts.gathered(p).tobytes() for p in params]


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"fused": True}], ids=["clipped", "without a norm"]
)
@pytest.mark.parametrize("name", ["one_mesh", "fsdp_and_tp"])
def test_grad_scaler(name, options):
    """The unscaled norm; all skip, and go on with the same loss scale."""
    results = run(4, scaled, name, options, (1,))
    peers = layouts.whole_params()
    peer = FusedHygieneAdamW(peers, **options)
    norms = []
    for step in (0, 2):
        for p, grad in zip(peers, layouts.whole_grads(step), strict=True):
            p.grad = grad
        peer.step()
        norms.append(None if peer.grad_norm is None else peer.grad_norm.item())
    for seen, params in results:
        grad_norms, changed, skipped, scales = zip(*seen, strict=True)
        assert [grad_norms[0], grad_norms[2]] == norms
        assert grad_norms[1] == (math.inf if "max_grad_norm" in options else None)
        assert changed == (True, False, True)
        assert skipped == (0, 1, 1)
        assert scales == (8.0, 4.0, 4.0)
        assert params == [layouts.gathered(p).tobytes() for p in peers]


def found_by_one_alone(name, options):
    """As from a scaler that knows its own process alone."""
    layout = LAYOUTS[name]("cpu")
    params = layouts.placed_params(layout)
    optimizer = FusedHygieneAdamW(params, **options)
    seen = []
    for step, found in enumerate((None, 0.0, 1.0, 0.0)):
        layouts.give_grads(params, layout, step)
        if found is not None:
            optimizer.found_inf = torch.tensor(found if dist.get_rank() == 1 else 0.0)
        with Collectives() as collectives:
            optimizer.step()
        seen.append((optimizer.skipped_steps.item(), len(collectives.entered)))
    return seen


@pytest.mark.parametrize("name", ["one_mesh", "two_meshes", "mixed"])
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {}], ids=["clipped", "without a norm"])
def test_found_inf_is_reduced_with_the_norm_or_alone(name, options):
    """Over two meshes that cross it reaches all, though no mesh has them all. Alone only where it is set."""
    n = layouts.COLLECTIVES[name]
    for seen in run(4, found_by_one_alone, name, options):
        skipped, collectives = zip(*seen, strict=True)
        assert skipped == (0, 0, 1, 1)
        assert collectives == (n if options else 0, n, n, n)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())


def sharded_scaler(use_orig_params, overflow_ranks, options):
    """FSDP1 in three steps; in the second, processes overflow."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    torch.manual_seed(0)
    model = FullyShardedDataParallel(Plain(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    if options.pop("norm_process_group", None):
        options["norm_process_group"] = dist.group.WORLD
    optimizer = FusedHygieneAdamW(model.parameters(), lr=0.1, **options)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, growth_interval=100)
    seen = []
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(5, 6)).square().mean()).backward()
        held = [p for p in model.parameters() if p.grad is not None and p.numel()]
        if step == 1 and dist.get_rank() in overflow_ranks:
            held[0].grad.view(-1)[0] = math.inf
        before = [held_bytes(p) for p in held]
        scaler.step(optimizer)
        scaler.update()
        changed = {a != held_bytes(p) for a, p in zip(before, held, strict=True)}
        seen.append((changed, scaler.get_scale()))
    return seen


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "norm_process_group": True}], ids=str)
def test_sharded_grad_scaler(use_orig_params, options):
    """Found in one process: all skip, and their loss scales stay equal. torch's fused AdamW parts there."""
    for seen in run(2, sharded_scaler, use_orig_params, (1,), options):
        assert seen == [({True}, 8.0), ({False}, 4.0), ({True}, 4.0)]


def stage_scaler(overflow_ranks):
    """A parameter of its own in each process, as of pipeline stages, unscaled before the step."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    group = dist.group.WORLD
    p = nn.Parameter(torch.ones(4))
    optimizer = FusedHygieneAdamW([p], max_grad_norm=1.0, norm_process_group=group)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, growth_interval=100, process_group=group)
    seen = []
    for step in range(3):
        scaler.scale(torch.zeros(()))
        overflows = step == 1 and dist.get_rank() in overflow_ranks
        p.grad = torch.full((4,), math.inf if overflows else 3.0 * scaler.get_scale())
        before = p.detach().clone()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        seen.append((optimizer.grad_norm.item(), not torch.equal(p, before), scaler.get_scale()))
    return seen


def test_scaler_of_stages():
    norm = pytest.approx(3 * 8**0.5)
    for seen in run(2, stage_scaler, (1,)):
        assert seen == [(norm, True, 8.0), (math.inf, False, 4.0), (norm, True, 4.0)]
