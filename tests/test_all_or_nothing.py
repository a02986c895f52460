"""A step or a load that raises has changed nothing, wherever it raises."""

import copy
import functools
import warnings

import pytest
import torch
from common import give_grads, parameters, snapshot, unchanged_since
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

SHAPES = [(3, 4), (5,), ()]


class Refused(Exception):
    """Raised by what a test puts in the way."""


class FailsAt:
    """Calls a function so many times, then raises."""

    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def __call__(self, *args, **kwargs):
        if self.calls == 0:
            raise Refused
        self.calls -= 1
        return self.function(*args, **kwargs)


def problem(target, steps=2, **options):
    params = parameters(SHAPES, device=target.device)
    optimizer = target.adamw(params, lr=0.1, **options)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, steps)
    return params, optimizer


def assert_refused(optimizer, act, error=Refused):
    """And the same act succeeds afterwards, if nothing is in its way."""
    before, keys = snapshot(optimizer), {p: list(s) for p, s in optimizer.state.items()}
    norm, skipped = optimizer.grad_norm, optimizer.skipped_steps
    with pytest.raises(error):
        act()
    assert unchanged_since(optimizer, before)
    assert {p: list(s) for p, s in optimizer.state.items()} == keys
    assert (optimizer.grad_norm is None) == (norm is None)
    assert norm is None or torch.equal(optimizer.grad_norm, norm)
    assert optimizer.skipped_steps == skipped


@pytest.mark.filterwarnings("error")
def test_a_warning_of_a_double_clip(target):
    params, optimizer = problem(target, 0, max_grad_norm=1.0)
    if target.device != "cpu":
        pytest.skip("no warning")
    for step in range(8):
        give_grads(params, step)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        if step < 7:
            optimizer.step()
    assert_refused(optimizer, optimizer.step, UserWarning)
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 8


@pytest.mark.parametrize("calls", range(2 * len(SHAPES)))
def test_memory_for_the_first_moments(target, monkeypatch, calls):
    _, optimizer = problem(target, 0)
    with monkeypatch.context() as context:
        context.setattr(torch, "zeros_like", FailsAt(torch.zeros_like, calls))
        assert_refused(optimizer, optimizer.step)
    assert not optimizer.state
    optimizer.step()


@pytest.mark.parametrize("function", ["zeros", "empty", "tensor"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
def test_memory_for_the_tables(target, monkeypatch, function, first):
    """Wherever it runs out, until there is enough."""
    params, optimizer = problem(target, 0 if first else 2, max_grad_norm=1.0)
    if not first:
        params[0].data = params[0].data.clone()

    def step(calls):
        with monkeypatch.context() as context:
            context.setattr(torch, function, FailsAt(getattr(torch, function), calls))
            optimizer.step()

    for calls in range(20):
        try:
            assert_refused(optimizer, functools.partial(step, calls))
        except pytest.fail.Exception:  # it has stepped
            break
        assert not (first and optimizer.state)
    assert calls < 19
    assert optimizer.state[params[0]]["step"].item() == (1 if first else 3)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_sum_over_processes(target, steps):
    def refuse(_):
        raise Refused

    params, optimizer = problem(target, steps, max_grad_norm=1.0)
    optimizer.norm_process_group = refuse
    assert_refused(optimizer, optimizer.step)
    optimizer.norm_process_group = None
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == steps + 1


@pytest.mark.parametrize("attribute", ["grad_scale", "found_inf"])
def test_what_a_scaler_left(target, attribute):
    _, optimizer = problem(target)
    setattr(optimizer, attribute, "no number")
    assert_refused(optimizer, optimizer.step, (TypeError, ValueError, RuntimeError))


class WithoutSquareRoot(TwoTensor):
    """A wrapper that lacks an operator of the update."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sqrt.default:
            raise Refused
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("position", range(3))
def test_a_subclass_that_lacks_an_operator(target, position):
    if target.device != "cpu":
        pytest.skip("on the CPU")
    params = parameters(SHAPES[:2])
    params.insert(position, nn.Parameter(WithoutSquareRoot(torch.ones(4), torch.ones(4))))
    optimizer = target.adamw(params)
    for p in params:
        p.grad = torch.ones_like(p.detach())
    before = [p.detach().clone() for p in params if type(p) is nn.Parameter]
    with pytest.raises(Refused):
        optimizer.step()
    assert all(map(torch.equal, before, (p for p in params if type(p) is nn.Parameter)))
    assert not optimizer.state


def test_a_closure(target):
    def refuse():
        raise Refused

    _, optimizer = problem(target)
    assert_refused(optimizer, lambda: optimizer.step(refuse))


@pytest.mark.parametrize("calls", range(2 * len(SHAPES)))
def test_memory_for_a_loaded_state(target, monkeypatch, calls):
    _, optimizer = problem(target)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    optimizer.step()
    with monkeypatch.context() as context:
        context.setattr(torch, "zeros_like", FailsAt(torch.zeros_like, calls))
        assert_refused(optimizer, lambda: optimizer.load_state_dict(saved))
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 7.0


def test_parameters_made_in_inference_mode(target):
    """The mode is part of what is compared."""
    with torch.inference_mode():
        _, optimizer = problem(target)
    assert_refused(optimizer, optimizer.step, RuntimeError)
    with torch.inference_mode():
        optimizer.step()


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["inference", "grad", "default device", "autocast"],
)
def test_modes_change_nothing(target, mode):
    """Whether a plan is made in one, or kept."""
    ends = []
    for inside in ([], range(6), [2], [0, 4]):
        params = parameters(SHAPES, device=target.device)
        optimizer = target.adamw(params, max_grad_norm=1.0)
        for step in range(6):
            give_grads(params, step)
            if step == 4:
                optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].clone()
            if step in inside:
                with warnings.catch_warnings(), mode():
                    optimizer.step()
            else:
                optimizer.step()
        ends.append([p.detach() for p in params])
    for end in ends[1:]:
        assert all(map(torch.equal, ends[0], end))
