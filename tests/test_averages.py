"""Averages of the weights: what the step keeps, what `swap_ema` exchanges, what is saved and loaded."""

import contextlib
import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from common import NATIVE, array, give_grads, parameters, snapshot, twins, unchanged_since, with_gaps
from torch import nn

from fused_adamw import EMA, FusedHygieneAdamW

SHAPES = [(300,), (20, 7), (), (0,)]


def decay_of(ema, n):
    """The decay after n averages, from the formulas of timm and diffusers."""
    decay = 0.5 ** (ema.every / ema.half_life) if ema.half_life else ema.decay
    warm = {None: decay, "timm": 1 - (1 + n) ** (-2 / 3), "diffusers": (1 + n) / (10 + n)}
    return min(decay, warm[ema.warmup])


def averaged(ema, history):
    """The average in float64: of parameters after each step, the first of them before the first step."""
    average, n = history[0], 0
    for step, p in enumerate(history[1:], 1):
        if step <= ema.start_step + ema.every:
            average, n = p, 0  # the parameter itself, also at the first update
        elif (step - ema.start_step) % ema.every == 0:
            n += 1
            average = average + (1 - decay_of(ema, n)) * (p - average)
    return average


EMAS = [
    EMA(0.9),
    EMA(0.3),  # lerp's other branch
    EMA(0.0),
    EMA(half_life=3.0, every=2),
    EMA(0.99, warmup="timm", start_step=2),
    EMA(0.99, warmup="diffusers", every=3, start_step=1),
]


@pytest.mark.parametrize("ema", EMAS, ids=str)
def test_it_follows_the_parameters(target, ema):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params, lr=0.05, ema=ema)
    history = [[array(p).astype(np.float64) for p in params]]
    for step in range(9):
        give_grads(params, step)
        optimizer.step()
        history.append([array(p).astype(np.float64) for p in params])
        for i, p in enumerate(params):
            expected = averaged(ema, [values[i] for values in history])
            np.testing.assert_allclose(array(optimizer.state[p]["ema"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_step_is_that_without_averages(target, amsgrad):
    params = parameters(SHAPES, device=target.device)
    peers = twins(params)
    ours = target.adamw(params, amsgrad=amsgrad, max_grad_norm=1.0, ema=EMA(0.9))
    theirs = target.adamw(peers, amsgrad=amsgrad, max_grad_norm=1.0)
    for step in range(4):
        give_grads(params, step)
        give_grads(peers, step)
        ours.step()
        theirs.step()
    for p, peer in zip(params, peers, strict=True):
        assert torch.equal(p, peer)
        assert all(torch.equal(ours.state[p][key], value) for key, value in theirs.state[peer].items())


DTYPES = {
    "float32": (torch.float32, {}, torch.float32),
    "float64": (torch.float64, {}, torch.float64),
    "complex64": (torch.complex64, {}, torch.complex64),
    "bfloat16": (torch.bfloat16, {}, torch.float32),
    "master": (torch.bfloat16, {"master_weights": "split"}, torch.float32),
    "8bit": (torch.bfloat16, {"master_weights": "split", "state_dtype": "8bit"}, torch.float32),
}


@pytest.mark.filterwarnings("ignore:the second moments")
@pytest.mark.parametrize(("dtype", "options", "kept"), DTYPES.values(), ids=DTYPES)
def test_average_of_the_master(dtype, options, kept):
    """Of float32 masters where there are any: with decay 0 the average is what the step computed."""
    params = parameters([(64, 128), (30,)], dtype=dtype)
    optimizer = NATIVE.adamw(params, ema=EMA(0.0), **options)
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
    for p in params:
        assert optimizer.state[p]["ema"].dtype == kept
    if dtype.is_complex or "master_weights" not in options:
        assert all(torch.equal(optimizer.state[p]["ema"], p.to(kept)) for p in params)
    else:
        model = nn.ParameterList(params)
        masters = optimizer.master_state_dict(model)
        assert all(torch.equal(optimizer.state[p]["ema"], masters[str(i)]) for i, p in enumerate(params))
        assert not torch.equal(optimizer.state[params[0]]["ema"], params[0].float())


def test_an_average_in_bfloat16_does_not_stall():
    """Rounded to nearest, steps of a thousandth would be lost; rounded by chance, they add up."""
    p = nn.Parameter(torch.ones(20_000))
    optimizer = NATIVE.adamw([p], lr=0.0, weight_decay=0.0, ema=EMA(0.999, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.data.fill_(2.0)
    for _ in range(500):
        optimizer.step()
    found, expected = optimizer.state[p]["ema"].double().mean().item(), 2 - 0.999**500
    assert found == pytest.approx(expected, rel=3e-4)


def test_without_a_gradient_it_stays():
    params = parameters([(4,), (5,), (6,)])
    optimizer = NATIVE.adamw(params, ema=EMA(0.5))
    give_grads(params[:2], 0)
    optimizer.step()
    before = optimizer.state[params[1]]["ema"].clone()
    give_grads(params[:1], 1)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[params[1]]["ema"], before)
    assert params[2] not in optimizer.state


def test_a_skipped_step_changes_no_average(target):
    params = parameters([(40,)], device=target.device)
    optimizer = target.adamw(params, skip_nonfinite=True, ema=EMA(0.5))
    give_grads(params, 0)
    optimizer.step()
    give_grads(params, 1)
    params[0].grad[3] = math.nan
    before = snapshot(optimizer)
    optimizer.step()
    assert unchanged_since(optimizer, before)


def model_and_optimizer(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)).to(dtype)
    model[2].weight = model[0].weight  # tied
    optimizer = FusedHygieneAdamW(model, lr=0.1, ema=EMA(0.5), **options)
    for step in range(4):
        give_grads(list(model.parameters()), step)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_swap(dtype, error):
    model, optimizer = model_and_optimizer(dtype, stochastic_rounding=False)
    averages = {p: optimizer.state[p]["ema"].clone() for p in model.parameters()}
    before = snapshot(optimizer)
    with contextlib.nullcontext() if error is None else pytest.raises(error), optimizer.swap_ema():
        assert all(torch.equal(p, averages[p].to(dtype)) for p in model.parameters())
        if error is not None:
            raise error
    assert unchanged_since(optimizer, before)
    optimizer.step()


@pytest.mark.parametrize("shape", [(), (0,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_swap_of_any_shape(shape, dtype):
    (p,) = parameters([shape], dtype=dtype)
    optimizer = NATIVE.adamw([p], lr=0.1, ema=EMA(0.9), stochastic_rounding=False)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before = snapshot(optimizer)
    with optimizer.swap_ema():
        assert torch.equal(p, before[0][2]["ema"].to(dtype))
    assert unchanged_since(optimizer, before)


@pytest.mark.parametrize("at", [n / 2 for n in range(44)])
def test_swap_is_undone_wherever_it_is_interrupted(at, monkeypatch):
    """An interrupt comes before or after any copy, on the way there and on the way back."""
    _, optimizer = model_and_optimizer()
    before = snapshot(optimizer)
    count, copy_ = itertools.count(), torch.Tensor.copy_

    def interrupted(t, *args):
        if (n := next(count)) == at:
            raise KeyboardInterrupt
        result = copy_(t, *args)
        if n + 0.5 == at:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.swap_ema():
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert unchanged_since(optimizer, before)
    with optimizer.swap_ema():
        pass
    assert unchanged_since(optimizer, before)


def test_what_is_refused_inside_of_a_swap():
    model, optimizer = model_and_optimizer()
    saved = optimizer.state_dict()
    with optimizer.swap_ema():
        for call in (
            optimizer.step,
            optimizer.state_dict,
            optimizer.state_dict_compact,
            lambda: optimizer.load_state_dict(saved),
            lambda: optimizer.ema_state_dict(model),
            lambda: optimizer.master_state_dict(model),
            lambda: optimizer.load_master(model.state_dict()),
            lambda: copy.deepcopy(optimizer),
            lambda: pickle.dumps(optimizer),
        ):
            with pytest.raises(RuntimeError, match=r"inside of swap_ema\(\)"):
                call()
        with pytest.raises(RuntimeError, match="inside of"), optimizer.swap_ema():
            pass


def test_state_dict_of_the_averages():
    model, optimizer = model_and_optimizer()
    found = optimizer.ema_state_dict(model)
    assert list(found) == list(model.state_dict())
    assert found["0.weight"] is found["2.weight"]
    assert torch.equal(found["0.weight"], optimizer.state[model[0].weight]["ema"])
    assert torch.equal(found["1.running_mean"], model[1].running_mean)
    other = copy.deepcopy(model)
    other.load_state_dict(found)
    with optimizer.swap_ema():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_state_dict_needs_the_model_of_the_averages():
    _, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match="is not in the model's state_dict"):
        optimizer.ema_state_dict(nn.Linear(6, 6))


def test_without_averages():
    model = nn.Linear(3, 3)
    optimizer = FusedHygieneAdamW(model)
    give_grads(list(model.parameters()), 0)
    optimizer.step()
    assert "ema" not in optimizer.state[model.weight]
    for call in (lambda: optimizer.ema_state_dict(model), lambda: optimizer.swap_ema().__enter__()):
        with pytest.raises(ValueError, match=r"build it with ema=EMA"):
            call()


@pytest.mark.parametrize("way", ["state_dict", "state_dict_compact", "deepcopy"])
@pytest.mark.parametrize(
    "options", [{}, {"master_weights": "split", "state_dtype": "8bit"}], ids=["plain", "low precision"]
)
def test_it_goes_on_as_if_nothing_had_been(way, options):
    dtype = torch.bfloat16 if options else torch.float32
    ema = EMA(0.9, warmup="timm", start_step=1, every=2)
    params = parameters([(64, 128), (50,)], dtype=dtype)
    ours = NATIVE.adamw(params, ema=ema, **options)
    for step in range(4):
        give_grads(params, step)
        ours.step()
    if way == "deepcopy":
        others, theirs = copy.deepcopy((params, ours))
    else:
        others = twins(params)
        theirs = NATIVE.adamw(others, ema=ema, **options)
        theirs.load_state_dict(copy.deepcopy(getattr(ours, way)()))
    for step in range(4, 9):
        for of_one, optimizer in ((params, ours), (others, theirs)):
            give_grads(of_one, step)
            optimizer.step()
    for p, other in zip(params, others, strict=True):
        assert torch.equal(p, other)
        assert torch.equal(ours.state[p]["ema"], theirs.state[other]["ema"])


def test_a_checkpoint_without_averages():
    """They start from the parameters as they are then."""
    params = parameters([(8,)])
    plain = torch.optim.AdamW(params)
    give_grads(params, 0)
    plain.step()
    optimizer = NATIVE.adamw(params, lr=0.1, ema=EMA(0.9))
    optimizer.load_state_dict(plain.state_dict())
    before = params[0].detach().clone()
    give_grads(params, 1)
    optimizer.step()
    expected = before + 0.1 * (params[0] - before)
    torch.testing.assert_close(optimizer.state[params[0]]["ema"], expected)


def test_a_checkpoint_with_averages_in_an_optimizer_without():
    params = parameters([(8,), (3,)])
    saved = NATIVE.adamw(params, ema=EMA(0.9))
    give_grads(params, 0)
    saved.step()
    plain = torch.optim.AdamW(twins(params))
    plain.load_state_dict(saved.state_dict())
    optimizer = NATIVE.adamw(twins(params))
    with pytest.warns(UserWarning, match=r"averages of 2 parameters, number 0 of group 0 among them"):
        optimizer.load_state_dict(saved.state_dict())
    assert all("ema" not in state for state in optimizer.state.values())


def test_the_average_of_the_reference_beside_kernels():
    """In one step: a parameter that is not dense, and one that kernels take."""
    params = parameters([(8, 4), (6,)])
    peers = twins(params)
    params[0].data = with_gaps(params[0])
    ours, theirs = (
        NATIVE.adamw(params, ema=EMA(0.7)),
        FusedHygieneAdamW(peers, ema=EMA(0.7), backend="reference"),
    )
    for step in range(3):
        give_grads(params, step)
        give_grads(peers, step)
        ours.step()
        theirs.step()
    assert len(ours._plan.fallbacks) == 1
    for p, peer in zip(params, peers, strict=True):
        torch.testing.assert_close(ours.state[p]["ema"], theirs.state[peer]["ema"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, ValueError, "decay must be in"),
        ({"decay": math.nan}, ValueError, "decay must be in"),
        ({"decay": "0.9"}, TypeError, "decay must be a number, got '0.9'"),
        ({"half_life": 0}, ValueError, "half_life must be a finite number > 0"),
        ({"half_life": math.inf}, ValueError, "half_life must be a finite number > 0"),
        ({"decay": 0.9, "half_life": 5}, ValueError, "decay or half_life, not both"),
        ({"warmup": "linear"}, ValueError, "warmup must be None, 'timm' or 'diffusers', got 'linear'"),
        ({"start_step": -1}, ValueError, "start_step must be at least 0, got -1"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be an integer, got 1.5"),
        ({"every": True}, TypeError, "every must be an integer, got True"),
        ({"dtype": torch.float16}, ValueError, "dtype must be None, torch.float32 or torch.bfloat16"),
    ],
)
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        EMA(**options)


def test_the_argument_has_to_be_an_ema():
    with pytest.raises(TypeError, match=r"ema must be None or an EMA, such as EMA\(decay=0.9999\), got 0.9"):
        FusedHygieneAdamW(parameters([(2,)]), ema=0.9)


@pytest.mark.parametrize("warmup", [None, "timm", "diffusers"])
def test_the_default_dtype_does_not_reach_an_average(target, default_dtype, warmup):
    ends = []
    for dtype in (torch.float64, torch.bfloat16):
        default_dtype(torch.float32)
        params = parameters([(65,)], dtype=torch.float64, device=target.device)
        optimizer = target.adamw(params, lr=0.1, ema=EMA(0.7, warmup=warmup))
        for step in range(4):
            default_dtype(torch.float32)
            give_grads(params, step)
            default_dtype(dtype)
            optimizer.step()
        ends.append(optimizer.state[params[0]]["ema"])
    assert torch.equal(*ends)
