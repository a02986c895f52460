"""Norms of single parameters, by name, from what the norm pass leaves behind."""

import math

import numpy as np
import pytest
import torch
from common import F32, NATIVE, array, give_grads, parameters, with_gaps
from torch import nn

from fused_adamw import FusedHygieneAdamW
from fused_adamw.backends import native

CHUNK = native.chunk_size(torch.device("cpu"), 0)
SHAPES = [(CHUNK - 1,), (2 * CHUNK + 1,), (3, 7), (0,), ()]


def norms(params):
    return [np.linalg.norm(p.grad.double().cpu().numpy().ravel()) for p in params]


def named(params):
    return [(f"p{i}", p) for i, p in enumerate(params)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_of_each_parameter(target, dtype):
    shapes = [(700,), (3, 7), (0,), ()] if target.slow else SHAPES
    params = parameters(shapes, dtype=dtype, device=target.device)
    optimizer = target.adamw(named(params), max_grad_norm=1e-3)
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
        found = optimizer.param_stats()
        assert list(found) == [f"p{i}" for i in range(len(params))]
        rtol = 1e-12 if target.device == "cpu" else 1e-6
        np.testing.assert_allclose([s.grad_norm for s in found.values()], norms(params), rtol=rtol)
        assert not any(s.nonfinite for s in found.values())
        total = math.sqrt(sum(s.grad_norm**2 for s in found.values()))
        assert total == pytest.approx(optimizer.grad_norm.item(), rel=1e-6)


def test_the_reference_has_them_too():
    """Beside kernels in the same step."""
    params = parameters([(8, 4), (6,), (5,)])
    params[0].data = with_gaps(params[0])
    optimizer = NATIVE.adamw(named(params), max_grad_norm=1.0)
    give_grads(params, 0)
    optimizer.step()
    assert len(optimizer._plan.fallbacks) == 1
    found = optimizer.param_stats()
    expected = [torch.linalg.vector_norm(p.grad).item() for p in params]
    assert [found[f"p{i}"].grad_norm for i in range(3)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_who_was_not_finite(target, bad):
    params = parameters([(300,), (20,), (5,)], device=target.device)
    optimizer = target.adamw(named(params), skip_nonfinite=True)
    give_grads(params, 0)
    params[1].grad[13] = bad
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.nonfinite_params() == ["p1"]
    found = optimizer.param_stats()
    assert [found[f"p{i}"].grad_norm for i in (0, 2)] == pytest.approx(
        [norms(params)[i] for i in (0, 2)], rel=1e-6
    )
    give_grads(params, 1)
    optimizer.step()
    assert optimizer.nonfinite_params() == []


def test_only_those_with_a_gradient():
    params = parameters([(3,), (4,)])
    optimizer = NATIVE.adamw(named(params), max_grad_norm=1.0)
    give_grads(params, 0)
    optimizer.step()
    params[0].grad = None
    optimizer.step()
    assert list(optimizer.param_stats()) == ["p1"]


def test_without_the_loss_scale():
    params = parameters([(300,), (20,)])
    optimizer = NATIVE.adamw(named(params), max_grad_norm=1.0)
    give_grads(params, 0)
    expected = norms(params)
    for p in params:
        p.grad *= 1024.0
    scale = torch.tensor(1024.0)
    optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(0.0)
    optimizer.step()
    scale.fill_(512.0)  # as a GradScaler does after the step
    assert [s.grad_norm for s in optimizer.param_stats().values()] == pytest.approx(expected, rel=1e-6)
    params[1].grad[0] = math.inf
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    first, second = optimizer.param_stats().values()
    assert first.grad_norm == pytest.approx(2 * expected[0], rel=1e-6)  # by the scale of this step
    assert (first.nonfinite, second.nonfinite) == (False, True)
    assert "optim/grad_norm/p1" not in optimizer.log_dict()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
def test_no_norm_is_said(options):
    params = parameters([(3,)])
    optimizer = NATIVE.adamw(params, **options)
    if not options:
        give_grads(params, 0)
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"no norms are known: .* max_grad_norm"):
        optimizer.param_stats()


def test_names_where_there_are_none():
    params = parameters([(3,), (4,), (5,)])
    optimizer = NATIVE.adamw([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=1.0)
    give_grads(params, 0)
    optimizer.step()
    assert list(optimizer.param_stats()) == ["group 0.0", "group 0.1", "group 1.0"]


def model_after_a_step():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = FusedHygieneAdamW(model, max_grad_norm=1.0)
    give_grads(list(model.parameters()), 0)
    optimizer.step()
    return model, optimizer


def test_by_group_and_by_role():
    _, optimizer = model_after_a_step()
    found, of_groups = optimizer.param_stats(), optimizer.group_stats()
    assert {"role embedding", "role matrix", "role bias", "role norm"} <= set(of_groups)
    assert of_groups["role embedding"].grad_norm == pytest.approx(found["0.weight"].grad_norm)
    for i, group in enumerate(optimizer.param_groups):
        expected = math.sqrt(sum(found[name].grad_norm ** 2 for name in group["param_names"]))
        assert of_groups[f"group {i}"].grad_norm == pytest.approx(expected)


def test_log_dict():
    model, optimizer = model_after_a_step()
    logged = optimizer.log_dict("o/", top_k=2)
    assert all(isinstance(value, float) for value in logged.values())
    assert logged["o/grad_norm"] == pytest.approx(optimizer.grad_norm.item())
    assert logged["o/skipped_steps"] == 0.0
    of_params = [name for name in logged if name.removeprefix("o/grad_norm/") in optimizer.param_stats()]
    norm = {name: s.grad_norm for name, s in optimizer.param_stats().items()}
    assert {name.removeprefix("o/grad_norm/") for name in of_params} == set(sorted(norm, key=norm.get)[-2:])
    model[1].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.log_dict()["optim/nonfinite/1.weight"] == 1.0
    with pytest.raises(ValueError, match="top_k >= 0 and every >= 1"):
        optimizer.log_dict(every=0)


def test_log_dict_once_in_a_while():
    _, optimizer = model_after_a_step()
    assert [bool(optimizer.log_dict(every=3)) for _ in range(7)] == [i % 3 == 0 for i in range(7)]


def test_a_parameter_that_is_listed_twice():
    (p,) = parameters([(6,)])
    optimizer = NATIVE.adamw([p], max_grad_norm=1.0)
    optimizer.param_groups[0]["params"].append(p)
    give_grads([p], 0)
    optimizer.step()
    assert [s.grad_norm for s in optimizer.param_stats().values()] == pytest.approx(norms([p]) * 2)


def is_lost(p, update):
    """Which updates are below half a unit in the last place of bfloat16, which has eight significant bits."""
    exponent = np.floor(np.log2(np.maximum(np.abs(p.astype(np.float64)), 2.0**-126)))
    return (np.abs(update) < 2.0 ** (exponent - 8)) & (update != 0)


FORMATS = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "float16": (torch.float16, {}),
    "bfloat16": (torch.bfloat16, {}),
    "master": (torch.bfloat16, {"master_weights": "split"}),
    "8bit": (torch.bfloat16, {"stochastic_rounding": True, "state_dtype": "8bit"}),
}


@pytest.mark.filterwarnings("ignore:the second moments")
@pytest.mark.parametrize(("dtype", "options"), FORMATS.values(), ids=FORMATS)
def test_stats(target, dtype, options, small_chunks):
    """Against float32 parameters, whose updates are those before rounding; and numpy for the norms."""
    shapes = [(64, 130), (77,), (0,), ()]
    params = parameters(shapes, dtype=dtype, device=target.device)
    optimizer = target.adamw(named(params), lr=1e-3, max_grad_norm=1.0, stats=True, **options)
    give_grads(params, 0, scale=3.0)
    wide = [
        torch.nn.Parameter(p.detach().clone().to(torch.float64 if p.dtype == torch.float64 else F32))
        for p in params
    ]
    peer = target.adamw(named(wide), lr=1e-3, max_grad_norm=1.0)
    for p, w in zip(params, wide, strict=True):
        w.grad = p.grad.to(w.dtype)
    before = [array(w).copy() for w in wide]
    optimizer.step()
    peer.step()
    for i, (name, found) in enumerate(optimizer.param_stats().items()):
        grad, after = array(params[i].grad).astype(np.float64), array(wide[i]).astype(np.float64)
        update = (array(wide[i]) - before[i]).astype(np.float64)
        rtol = 1e-12 if target.device == "cpu" else 1e-6
        assert found.grad_norm == pytest.approx(np.linalg.norm(grad.ravel()), rel=rtol), name
        assert found.grad_max == (np.abs(grad).max() if grad.size else 0.0)
        assert found.update_norm == pytest.approx(np.linalg.norm(update.ravel()), rel=rtol)
        assert found.param_norm == pytest.approx(np.linalg.norm(after.ravel()), rel=rtol)
        lost = is_lost(before[i], update).sum() if dtype == torch.bfloat16 else 0
        assert found.lost_updates == lost
    if dtype == torch.bfloat16:
        assert optimizer.param_stats()["p0"].lost_updates > 100


def test_stats_without_a_norm_pass_and_at_any_time(target):
    params = parameters([(300,), (4,)], device=target.device)
    optimizer = target.adamw(named(params))
    give_grads(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="no norms are known"):
        optimizer.param_stats()
    optimizer.stats = True
    optimizer.step()
    found = optimizer.param_stats()
    assert [s.grad_norm for s in found.values()] == pytest.approx(norms(params), rel=1e-6)
    assert all(s.update_norm > 0 for s in found.values())
    log = optimizer.log_dict()
    assert log["optim/update_ratio/p0"] == pytest.approx(found["p0"].update_norm / found["p0"].param_norm)
    assert "optim/grad_norm" not in log
    optimizer.stats = False
    optimizer.step()
    with pytest.raises(RuntimeError, match="no norms are known"):
        optimizer.param_stats()


def test_stats_of_a_skipped_step(target):
    """Gradients are known from the norm pass; nothing was updated."""
    params = parameters([(300,), (4,)], device=target.device)
    optimizer = target.adamw(named(params), skip_nonfinite=True, stats=True)
    for step in range(2):
        give_grads(params, step)
        if step:
            params[1].grad[2] = math.nan
        optimizer.step()
    first, second = optimizer.param_stats().values()
    assert first.grad_norm == pytest.approx(norms(params)[0], rel=1e-6)
    assert (first.nonfinite, second.nonfinite) == (False, True)
    assert (first.update_norm, first.param_norm, first.grad_max, first.lost_updates) == (0.0, None, None, 0)


def test_a_nan_among_the_stats(target):
    params = parameters([(300,), (70,)], device=target.device)
    optimizer = target.adamw(named(params), stats=True)
    give_grads(params, 0)
    params[0].grad[131] = -math.inf
    params[1].grad[66] = math.nan
    optimizer.step()
    first, second = optimizer.param_stats().values()
    assert first.grad_max == math.inf
    assert math.isnan(second.grad_max)
    assert first.nonfinite
    assert second.nonfinite


def test_stats_of_groups_are_those_of_their_parameters():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    optimizer = FusedHygieneAdamW(model, stats=True, max_grad_norm=1.0)
    give_grads(list(model.parameters()), 0)
    optimizer.step()
    of_params, of_groups = optimizer.param_stats(), optimizer.group_stats()
    for quantity in ("grad_norm", "update_norm", "param_norm"):
        total = math.sqrt(sum(getattr(s, quantity) ** 2 for s in of_params.values()))
        both = math.hypot(*(getattr(of_groups[f"group {i}"], quantity) for i in range(2)))
        assert both == pytest.approx(total)
    assert max(s.grad_max for s in of_params.values()) == max(
        of_groups[f"group {i}"].grad_max for i in range(2)
    )


@pytest.mark.parametrize("value", [2, "yes", None])
def test_stats_is_a_flag(value):
    with pytest.raises(ValueError, match="stats must be True or False"):
        FusedHygieneAdamW(parameters([(2,)]), stats=value)
