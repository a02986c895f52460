"""The guard against spikes: which steps it lets through, what it remembers, what it tells."""

import copy
import math
import statistics

import pytest
import torch
from common import NATIVE, array, parameters, snapshot, twins, unchanged_since

from fused_adamw import FusedHygieneAdamW, SpikeGuard

INF, NAN = math.inf, math.nan


class Oracle:
    """The guard in ten lines of Python: what becomes of each norm."""

    def __init__(self, guard):
        self.guard, self.norms, self.losses = guard, [], []

    def limit(self, accepted):
        if len(accepted) < self.guard.warmup:
            return INF
        window = accepted[-self.guard.window :]
        mean = statistics.fmean(window)
        return mean + self.guard.sigmas * max(statistics.stdev(window), 1e-6 * abs(mean))

    def __call__(self, norm, loss=None):
        limit = self.limit(self.norms)
        outcome = "stepped"
        if norm > limit:
            outcome = "clipped" if self.guard.on == "clip" else "spike"
        if loss is not None and loss > self.limit(self.losses):
            outcome = "loss_spike"
        if not math.isfinite(norm) or (loss is not None and not math.isfinite(loss)):
            outcome = "nonfinite"
        if outcome in ("stepped", "clipped"):
            self.norms.append(min(norm, limit))
            if loss is not None:
                self.losses.append(loss)
        return outcome


def norms_to_meet(n=60):
    """A run with spikes, one after another, single ones and those that are not numbers."""
    generator = torch.Generator().manual_seed(0)
    norms = (1.0 + 0.1 * torch.randn(n, generator=generator)).tolist()
    special = {3: NAN, 12: 50.0, 13: 60.0, 20: NAN, 21: INF, 30: 1e30, 40: 1.7, 41: 1.6, 50: 3.0}
    return [special.get(i, norm) for i, norm in enumerate(norms)]


class Run:
    """One parameter whose gradient has the norm that is asked for."""

    def __init__(self, target, guard, **options):
        self.params = parameters([(50,)], device=target.device)
        self.optimizer = target.adamw(self.params, lr=1e-3, guard=guard, **options)
        self.counts = {}

    def step(self, norm, loss=None):
        p = self.params[0]
        p.grad = torch.zeros_like(p)
        p.grad[7] = norm
        if loss is not None:
            self.optimizer.observe(loss)
        before = None if p not in self.optimizer.state else snapshot(self.optimizer)
        self.optimizer.step()
        now = {k: int(v) for k, v in self.optimizer.skipped_steps_by_reason.items()}
        grown = [reason for reason in now if now[reason] > self.counts.get(reason, 0)]
        self.counts = now
        if grown and before is not None:
            assert unchanged_since(self.optimizer, before)
        return grown[0] if grown else "stepped"


@pytest.mark.parametrize("sigmas", [2.5, 6.0])
@pytest.mark.parametrize("on", ["skip", "clip"])
@pytest.mark.parametrize(("window", "warmup"), [(8, 8), (16, 5), (4, 10)])
def test_decisions(target, on, sigmas, window, warmup):
    guard = SpikeGuard(sigmas, window, warmup, on)
    run, oracle = Run(target, guard, max_grad_norm=1e9), Oracle(guard)
    outcomes, before = [], None
    for norm in norms_to_meet(30 if target.slow else 60):
        limit, expected = oracle.limit(oracle.norms), oracle(norm)
        outcomes.append(expected)
        found = run.step(norm)
        assert found == ("stepped" if expected == "clipped" else expected)
        if expected == "clipped":
            assert int(run.optimizer._counts()[1]) == outcomes.count("clipped")
            peer = Run(target, None, max_grad_norm=limit)  # clipped to the limit
            peer.params[0].data.copy_(before[0])
            peer.optimizer.load_state_dict({k: v for k, v in before[1].items() if k != "guard"})
            peer.step(norm)
            torch.testing.assert_close(run.params[0], peer.params[0], rtol=1e-6, atol=0)
        before = run.params[0].detach().clone(), copy.deepcopy(run.optimizer.state_dict())
    assert {"stepped", "nonfinite", "clipped" if on == "clip" else "spike"} <= set(outcomes)
    assert run.optimizer.skipped_steps.item() == sum(o not in ("stepped", "clipped") for o in outcomes)


def test_losses_under_the_same_test(target):
    guard = SpikeGuard(3.0, 8, 8)
    run, oracle = Run(target, guard), Oracle(guard)
    generator = torch.Generator().manual_seed(1)
    losses = (-2.0 + 0.1 * torch.randn(30, generator=generator)).tolist()
    losses[15], losses[16], losses[20] = 5.0, NAN, None
    for i, loss in enumerate(losses):
        as_tensor = loss if loss is None or i % 2 else torch.tensor(loss, device=target.device)
        assert run.step(1.0 + 0.01 * (i % 5), as_tensor) == oracle(1.0 + 0.01 * (i % 5), loss), i
    assert run.counts["loss_spike"] >= run.counts["nonfinite"] == 1


def test_a_loss_counts_for_one_step():
    run = Run(NATIVE, SpikeGuard(3.0, 4, 4))
    assert run.step(1.0, NAN) == "nonfinite"
    assert run.step(1.0) == "stepped"


def test_equal_norms_are_no_spikes():
    run = Run(NATIVE, SpikeGuard(1.0, 4, 4))
    assert {run.step(0.1) for _ in range(20)} == {"stepped"}
    assert run.step(0.2) == "spike"


def test_a_nan_does_not_poison_the_history():
    run = Run(NATIVE, SpikeGuard(6.0, 4, 4))
    for norm in (1.0, 1.1, NAN, 0.9, INF, 1.0, NAN):
        run.step(norm)
    assert [run.step(norm) for norm in (1.0, 1.1, 0.9)] == ["stepped"] * 3
    assert run.counts["nonfinite"] == 3
    assert torch.isfinite(run.params[0]).all()


def test_overflow_under_a_loss_scale_is_none_of_its_business():
    """A GradScaler lowers its scale step after step at first; norms are those without it."""
    params = parameters([(10,)])
    optimizer = NATIVE.adamw(params, guard=SpikeGuard(3.0, 4, 4, max_consecutive=2))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    for _ in range(6):
        params[0].grad = torch.full((10,), INF)
        optimizer.step()
    optimizer.found_inf = torch.tensor(0.0)
    for i in range(8):
        optimizer.grad_scale = torch.tensor(2.0**i)
        params[0].grad = torch.ones(10) * 2.0**i
        optimizer.step()
    reasons = {k: int(v) for k, v in optimizer.skipped_steps_by_reason.items()}
    assert reasons == {"overflow": 6, "nonfinite": 0, "spike": 0, "loss_spike": 0}


def test_a_long_streak_raises_when_the_status_is_read(target):
    run = Run(target, SpikeGuard(6.0, 4, 4, max_consecutive=3))
    for _ in range(5):
        run.step(1.0)
    optimizer, p = run.optimizer, run.params[0]
    for i in range(4):
        p.grad[7] = 100.0 + i
        optimizer.step()
    for read in (
        lambda: optimizer.skipped_steps,
        lambda: optimizer.grad_norm,
        optimizer.param_stats,
        optimizer.log_dict,
    ):
        with pytest.raises(
            RuntimeError, match=r"4 steps in a row were skipped .* 100, 101, 102, 103, the limit"
        ):
            read()
        for i in range(4):
            p.grad[7] = 100.0 + i
            optimizer.step()
    with pytest.raises(RuntimeError, match="SpikeGuard"):
        read()
    run.counts = {k: int(v) for k, v in optimizer.skipped_steps_by_reason.items()}  # not again
    assert run.step(1.0) == "stepped"
    assert optimizer.skipped_steps.item() == 20


@pytest.mark.parametrize(
    "way", ["state_dict", "state_dict_compact", "guard_state_dict", "deepcopy", "by_name"]
)
@pytest.mark.parametrize("has_plan", [False, True])
def test_the_history_goes_on(way, has_plan):
    guard = SpikeGuard(3.0, 8, 6)
    first = Run(NATIVE, guard)
    norms = norms_to_meet(40)
    for norm in norms[:17]:
        first.step(norm, norm)
    if way == "deepcopy":
        second = copy.deepcopy(first)
    else:
        second = Run(NATIVE, guard)
        if has_plan:
            second.step(7.0)
        if way == "guard_state_dict":
            second.optimizer.load_guard_state_dict(first.optimizer.guard_state_dict())
        elif way == "by_name":
            named = [("p", second.params[0])]
            second.optimizer = NATIVE.adamw(named, guard=guard)
            second.optimizer.load_state_dict_by_name(first.optimizer.state_dict(), named)
        else:
            saved = copy.deepcopy(getattr(first.optimizer, way)())
            second.optimizer.load_state_dict(saved)
            torch.optim.AdamW(twins(first.params)).load_state_dict(saved)
        second.counts = first.counts
    assert [second.step(norm, norm) for norm in norms[17:]] == [first.step(norm, norm) for norm in norms[17:]]
    assert second.optimizer.skipped_steps.item() == first.optimizer.skipped_steps.item()


@pytest.mark.parametrize("window", [3, 8, 9, 20])
@pytest.mark.parametrize("n", [2, 8, 11, 19])
def test_a_window_of_another_size(window, n):
    """It takes the latest norms of the history."""
    before, after = SpikeGuard(3.0, 8, 2), SpikeGuard(3.0, window, 2)
    first, second = Run(NATIVE, before), Run(NATIVE, after)
    norms = [1.0 + 0.1 * math.sin(i) for i in range(n)]
    for norm in norms:
        assert first.step(norm) == "stepped"
    second.optimizer.load_guard_state_dict(first.optimizer.guard_state_dict())
    oracle = Oracle(after)
    oracle.norms = norms[-8:]
    for i in range(n, n + 30):
        norm = 1.0 + 0.1 * math.sin(i) + 0.3 * ((i - n) % 11 == 0)
        expected = oracle(norm)
        second.counts = {k: int(v) for k, v in second.optimizer.skipped_steps_by_reason.items()}
        assert second.step(norm) == expected, i


@pytest.mark.parametrize(
    "saved", [{}, {"window": 8, "status": torch.zeros(3)}, {"window": "8", "status": None}]
)
def test_a_history_that_is_none(saved):
    run = Run(NATIVE, SpikeGuard())
    run.step(1.0)
    before, status = snapshot(run.optimizer), run.optimizer._status.clone()
    state_dict = {**run.optimizer.state_dict(), "guard": saved}
    for load in (
        lambda: run.optimizer.load_guard_state_dict(saved),
        lambda: run.optimizer.load_state_dict(state_dict),
    ):
        with pytest.raises(ValueError, match="expected what guard_state_dict"):
            load()
    assert unchanged_since(run.optimizer, before)
    assert torch.equal(run.optimizer._status, status)


def test_without_a_guard():
    params = parameters([(3,)])
    optimizer = FusedHygieneAdamW(params)
    assert optimizer.guard is None
    assert "guard" not in optimizer.state_dict()
    for call in (lambda: optimizer.observe(1.0), optimizer.guard_state_dict):
        with pytest.raises(ValueError, match="build it with guard=SpikeGuard"):
            call()


def test_the_guard_measures_without_clipping():
    params = parameters([(3,)])
    peers = twins(params)
    ours, theirs = NATIVE.adamw(params, guard=SpikeGuard()), NATIVE.adamw(peers)
    for p in (*params, *peers):
        p.grad = torch.full((3,), 100.0)
    ours.step()
    theirs.step()
    assert torch.equal(params[0], peers[0])
    assert ours.grad_norm.item() == pytest.approx(100 * 3**0.5)
    assert array(params[0]).shape == (3,)


def test_losses_of_more_than_one_element():
    with pytest.raises(ValueError, match=r"loss must have one element, got a tensor of shape \(2,\)"):
        FusedHygieneAdamW(parameters([(3,)]), guard=SpikeGuard()).observe(torch.zeros(2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigmas": 0}, ValueError, "sigmas must be a finite number > 0, got 0.0"),
        ({"sigmas": INF}, ValueError, "sigmas must be a finite number > 0"),
        ({"sigmas": "6"}, TypeError, "sigmas must be a number, got '6'"),
        ({"window": 1}, ValueError, "window must be at least 2, got 1"),
        ({"warmup": 1}, ValueError, "warmup must be at least 2, got 1"),
        ({"warmup": 2.0}, TypeError, "warmup must be an integer, got 2.0"),
        ({"max_consecutive": 0}, ValueError, "max_consecutive must be at least 1, got 0"),
        ({"on": "stop"}, ValueError, "on must be 'skip' or 'clip', got 'stop'"),
    ],
)
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        SpikeGuard(**options)


def test_the_argument_has_to_be_a_guard():
    with pytest.raises(
        TypeError, match=r"guard must be None or a SpikeGuard, such as SpikeGuard\(sigmas=6\)"
    ):
        FusedHygieneAdamW(parameters([(2,)]), guard=True)
