"""Step counts are float32, as torch's: they stand still at 2^24, and what goes by them does too."""

import copy

import pytest
import torch
from common import parameters, randn
from low_precision import BF16
from test_torch_peer import Race, assert_same_states

from fused_adamw import EMA

LAST = 2**24


def continued_at(race, count):
    """Let both optimizers go on from one checkpoint, with another count of steps."""
    race.run(1)
    saved = copy.deepcopy(race.theirs.state_dict())
    for state in saved["state"].values():
        state["step"].fill_(count)
    for optimizer in race.optimizers:
        optimizer.load_state_dict(saved)


def counts(optimizer):
    return {int(state["step"]) for state in optimizer.state.values()}


@pytest.mark.parametrize("amsgrad", [False, True])
def test_counts_end_where_those_of_torch_do(target, amsgrad):
    race = Race(target, lr=1e-2, amsgrad=amsgrad)
    continued_at(race, LAST - 2)
    for count in (LAST - 1, LAST, LAST, LAST, LAST):
        race.run(1)
        assert counts(race.ours) == counts(race.theirs) == {count}
    assert_same_states(race.ours, race.theirs, race.params, race.peers, race.steps)


def test_counts_go_on_in_checkpoints(target):
    """Of counts in float64 or int64, which may be above, the nearest in float32 is taken."""
    race = Race(target, lr=1e-2)
    race.run(1)
    saved = copy.deepcopy(race.ours.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(LAST + 3, dtype=torch.int64)
    race.ours.load_state_dict(saved)
    assert counts(race.ours) == {LAST + 4}
    race.ours.step()
    assert counts(race.ours) == {LAST + 4}


def stepped_at(target, count, **options):
    """A parameter, and the optimizer that has stepped it once from this count."""
    (p,) = params = parameters([(64, 64)], dtype=BF16, device=target.device)
    optimizer = target.adamw(params, lr=1e-2, **options)
    for number in (0, count):
        p.grad = randn(64, 64, dtype=BF16).to(target.device)
        for state in optimizer.state.values():
            state["step"].fill_(number)
        optimizer.step()
    return p.detach(), optimizer


def test_noise_repeats_itself_there(target):
    at = {
        count: stepped_at(target, count, stochastic_rounding=True)[0] for count in range(LAST - 2, LAST + 1)
    }
    assert not at[LAST - 2].equal(at[LAST - 1])
    assert at[LAST - 1].equal(at[LAST])  # both are number 2^24


@pytest.mark.parametrize(("every", "moves"), [(1, True), (2, True), (3, False)])
def test_averages_go_on_there_if_the_count_is_one_of_theirs(target, every, moves):
    p, optimizer = stepped_at(target, LAST, ema=EMA(0.5, every=every))
    (state,) = optimizer.state.values()
    before = state["ema"].clone()
    for q in optimizer.param_groups[0]["params"]:
        q.grad = randn(64, 64, seed=1, dtype=BF16).to(target.device)
    optimizer.step()
    assert state["ema"].equal(before) != moves
    assert p.isfinite().all()
