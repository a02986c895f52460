"""GradScaler's protocol for optimizers that unscale inside the step, against torch's fused AdamW."""

import copy
import math

import pytest
import torch
from common import assert_same_path, give_grads, parameters, snapshot, twins, unchanged_since
from torch.amp import GradScaler

SHAPES = [(65,), (3, 4)]
SCALE = 2.0**10


class Scaled:
    """An optimizer with its own GradScaler."""

    def __init__(self, optimizer, params):
        self.optimizer, self.params = optimizer, params
        self.scaler = GradScaler(params[0].device.type, init_scale=SCALE, growth_interval=3)

    def backward(self, step, bad=None):
        """Scaled gradients; `bad` spoils one element."""
        loss = self.params[0].sum()
        scale = self.scaler.scale(loss).item() / loss.item()
        give_grads(self.params, step, scale=round(scale))
        if bad is not None:
            self.params[0].grad[3] = bad

    def finish(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()


def pair(target, clip=None, **options):
    """Ours, and torch's fused AdamW, each with a scaler."""
    params = parameters(SHAPES, device=target.device)
    copies = twins(params)
    ours = target.adamw(params, lr=1e-2, max_grad_norm=clip, fused=True, **options)
    return Scaled(ours, params), Scaled(torch.optim.AdamW(copies, lr=1e-2, fused=True, **options), copies)


def test_scaled_steps(target):
    ours, theirs = pair(target)
    for step in range(5):
        for run in (ours, theirs):
            run.backward(step)
            run.finish()
    assert_same_path(ours.params, theirs.params, 5)
    assert ours.scaler.get_scale() == theirs.scaler.get_scale() == 2 * SCALE
    assert not hasattr(ours.optimizer, "grad_scale")
    assert not hasattr(ours.optimizer, "found_inf")


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_overflow_changes_nothing(target, bad, clip, unscale_first, amsgrad):
    """Parameters, moments and step counts; at the first step, too, where state is created."""
    ours, theirs = pair(target, clip, amsgrad=amsgrad)
    for step, spoiled in enumerate([bad, None, bad, None]):
        for run in (ours, theirs):
            run.backward(step, spoiled)
            before = snapshot(run.optimizer)
            if unscale_first or (clip and run is theirs):
                run.scaler.unscale_(run.optimizer)
            if clip and run is theirs:
                torch.nn.utils.clip_grad_norm_(run.params, clip)
            run.finish()
            if spoiled is not None and step:
                assert unchanged_since(run.optimizer, before)
    for p, q in zip(ours.params, theirs.params, strict=True):
        assert ours.optimizer.state[p]["step"].item() == theirs.optimizer.state[q]["step"].item() == 2
    assert ours.optimizer.skipped_steps.item() == 2
    assert ours.scaler.get_scale() == theirs.scaler.get_scale() == SCALE / 4
    assert_same_path(ours.params, theirs.params, 4, grad_error=1e-6)


def test_the_first_step_overflows(target):
    ours, _ = pair(target)
    before = [p.detach().clone() for p in ours.params]
    ours.backward(0, math.inf)
    ours.finish()
    assert all(torch.equal(p, b) for p, b in zip(ours.params, before, strict=True))
    for p in ours.params:
        state = ours.optimizer.state[p]
        assert state["step"].item() == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()


@pytest.mark.parametrize("unscale_first", [False, True])
def test_the_clipped_norm_is_unscaled(target, unscale_first):
    """Clipping against the scaled norm would clip every step to nothing."""
    ours, theirs = pair(target, clip=0.5)
    for step in range(3):
        ours.backward(step)
        theirs.backward(step)
        if unscale_first:
            ours.scaler.unscale_(ours.optimizer)
        theirs.scaler.unscale_(theirs.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(theirs.params, 0.5)
        for run in (ours, theirs):
            run.finish()
        torch.testing.assert_close(ours.optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    assert_same_path(ours.params, theirs.params, 3, grad_error=1e-6)


def test_gradients_keep_their_scale(target):
    """Torch's fused step writes unscaled gradients back; ours does not write gradients."""
    ours, _ = pair(target)
    ours.backward(0)
    before = [p.grad.clone() for p in ours.params]
    ours.finish()
    assert all(torch.equal(p.grad, g) for p, g in zip(ours.params, before, strict=True))


def test_preset_grad_scale(target):
    """Of a user who scales gradients by 4 on top: both scales are divided out."""
    ours, theirs = pair(target, clip=1e9)
    for step in range(3):
        for run in (ours, theirs):
            run.optimizer.grad_scale = torch.tensor(4.0, device=target.device)
            run.backward(step)
            for p in run.params:
                p.grad *= 4
            run.finish()
    # clip_grad_norm_ is not called on torch's side: 1e9 never clips.
    assert_same_path(ours.params, theirs.params, 3, grad_error=1e-6)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_of_any_shape(target, shape, found):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    before = params[0].detach().clone()
    optimizer.found_inf = torch.full(shape, found, device=target.device)
    optimizer.grad_scale = torch.full(shape, 2.0, device=target.device)
    optimizer.step()
    assert torch.equal(params[0], before) == bool(found)
    assert optimizer.state[params[0]]["step"].shape == ()
    assert optimizer.state[params[0]]["step"].item() == 1 - found


@pytest.mark.parametrize(
    "value", [4.0, 4, torch.tensor(4.0, dtype=torch.float64)], ids=["float", "int", "float64"]
)
def test_grad_scale_of_any_type(target, value):
    params = parameters(SHAPES, device=target.device)
    copies = twins(params)
    optimizer, plain = target.adamw(params), target.adamw(copies)
    give_grads(params, 0, scale=4.0)
    give_grads(copies, 0)
    optimizer.grad_scale = value
    optimizer.step()
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_grad_scale_does_not_pass_through_the_default_dtype(target, default_dtype):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        (p,) = parameters([(5,)], device=target.device)
        optimizer = target.adamw([p], max_grad_norm=math.inf)
        p.grad = torch.full_like(p, 4.1)
        optimizer.grad_scale = 4.1
        default_dtype(dtype)
        optimizer.step()
        results.append(optimizer.grad_norm)
    assert torch.equal(*results)


def test_two_optimizers_on_one_scaler(target):
    """One overflows, the other does not: each decides for itself."""
    lists = [parameters([(5,)], seed=i, device=target.device) for i in range(2)]
    optimizers = [target.adamw(params) for params in lists]
    scaler = GradScaler(target.device, init_scale=SCALE)
    scaler.scale(lists[0][0].sum())
    for params in lists:
        give_grads(params, 0, scale=SCALE)
    lists[0][0].grad[0] = math.inf
    before = [params[0].detach().clone() for params in lists]
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(lists[0][0], before[0])
    assert not torch.equal(lists[1][0], before[1])
    assert scaler.get_scale() == SCALE / 2


def test_disabled_scaler(target):
    params = parameters([(5,)], device=target.device)
    copies = twins(params)
    optimizer, plain = target.adamw(params), target.adamw(copies)
    scaler = GradScaler(target.device, enabled=False)
    for p in (params, copies):
        give_grads(p, 0)
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    assert torch.equal(params[0], copies[0])


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": False}, {"fused": True}], ids=str)
def test_the_flag_that_scaler_looks_for_is_that_of_torch(target, options):
    params = parameters([(5,)], device=target.device)
    ours, theirs = target.adamw(params, **options), torch.optim.AdamW(params, **options)
    expected = getattr(theirs, "_step_supports_amp_scaling", False)
    assert ours._step_supports_amp_scaling is expected
    assert copy.deepcopy(ours)._step_supports_amp_scaling is expected


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_the_flag_is_set_by_what_needs_unscaled_gradients(target, options):
    optimizer = target.adamw(parameters([(5,)], device=target.device), **options)
    assert optimizer._step_supports_amp_scaling
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling
    if "max_grad_norm" in options:
        optimizer.max_grad_norm = None
        assert not optimizer._step_supports_amp_scaling


def test_without_the_flag_the_scaler_unscales_and_skips(target):
    """As for torch's AdamW without `fused`, bit for bit in what a logger sees of the gradients."""
    runs = []
    for make in (target.adamw, torch.optim.AdamW):
        params = parameters(SHAPES, device=target.device)
        runs.append(Scaled(make(params, lr=1e-2), params))
    for step, bad in enumerate([None, math.inf, None]):
        for run in runs:
            run.backward(step, bad)
            run.finish()
        grads = [[p.grad for p in run.params] for run in runs]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert_same_path(runs[0].params, runs[1].params, 3)
    assert {s["step"].item() for run in runs for s in run.optimizer.state.values()} == {2}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_skip_nonfinite(target, bad, clip):
    """Without any scaler: a step with such a gradient changes nothing and is counted."""
    params = parameters(SHAPES, device=target.device)
    copies = twins(params)
    optimizer = target.adamw(params, skip_nonfinite=True, max_grad_norm=clip)
    plain = target.adamw(copies, max_grad_norm=clip)
    assert optimizer.skipped_steps.item() == 0
    for step in range(4):
        give_grads(params, step)
        give_grads(copies, step)
        if step in (0, 2):
            params[1].grad[0, 0] = bad
        else:
            plain.step()
        before = snapshot(optimizer)
        optimizer.step()
        assert math.isfinite(optimizer.grad_norm.item()) == (step not in (0, 2))
        if step == 2:
            assert unchanged_since(optimizer, before)
    assert optimizer.skipped_steps.item() == 2
    assert optimizer.skipped_steps.dtype == torch.int64
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    assert copy.deepcopy(optimizer).skip_nonfinite
    assert copy.deepcopy(optimizer).skipped_steps.item() == 2


def test_skipped_steps_survive_a_new_plan(target):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params, skip_nonfinite=True)
    give_grads(params, 0)
    params[0].grad[0] = math.nan
    optimizer.step()
    optimizer.add_param_group({"params": parameters([(2,)], seed=5, device=target.device)})
    give_grads(params, 1)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1


def test_an_infinite_element_is_found_where_the_sum_of_squares_is_large(target):
    """Only gradients that are not finite are skipped, not those whose float32 squares overflow."""
    (p,) = parameters([(100,)], device=target.device)
    optimizer = target.adamw([p], skip_nonfinite=True)
    p.grad = torch.full_like(p, 1e38)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0
    assert optimizer.state[p]["step"].item() == 1


def test_a_scaler_takes_no_closure(target):
    """It says so itself; nothing has changed then."""
    params = parameters([(3,)], device=target.device)
    optimizer = target.adamw(params)
    give_grads(params, 0)
    scaler = torch.amp.GradScaler(target.device)
    scaler.scale(params[0].sum())
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: pytest.fail("the closure ran"))
    assert not optimizer.state
