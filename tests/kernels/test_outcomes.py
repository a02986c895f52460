"""What becomes of steps: each outcome, the guard against spikes and what it remembers, in every kernel."""

import math

import numpy as np
import pytest
from format_codes import F32, STOCHASTIC
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_adamw.tables import OUTCOMES, Averaging, SpikeOptions, StatusStruct, status_words

from . import outcomes
from .model import Model, Param

SKIP = SpikeOptions(sigmas=3.0, window=5, warmup=3)
CLIP = SKIP._replace(clips=True, sigmas=2.0)
ROWS = [Param(33, step=1.0), Param(9, grad=False, step=1.0), Param(0)]


def guarded(kernels, spikes: SpikeOptions, norms=(), **options) -> Model:
    """A model that has made steps of these norms."""
    model = Model(kernels, ROWS, spikes=spikes, **options)
    for norm in norms:
        model.update(sums=[norm**2])
    return model


def test_statuses_are_as_long_as_kernels_make_them():
    assert outcomes.OUTCOMES == OUTCOMES
    for window in (0, 1, 128):
        assert len(outcomes.Outcomes(SpikeOptions(window=window)).words()) == status_words(window)
    assert StatusStruct.counts.size == 8 * len(OUTCOMES)


def test_without_a_guard_nothing_is_remembered(kernels):
    model = Model(kernels, ROWS)
    for norm in (1.0, 1e6, math.inf, math.nan):
        assert model.update(sums=[norm**2]).outcome == "stepped"


@pytest.mark.parametrize("spikes", [SKIP, CLIP], ids=["skip", "clip"])
def test_a_spike_is_skipped_or_clipped(kernels, spikes):
    model = guarded(kernels, spikes, (1.0, 1.1, 0.9))
    assert model.update(sums=[1e4]).outcome == ("clipped_spike" if spikes.clips else "spike")
    assert model.update(sums=[1.0]).outcome == "stepped"
    assert model.update(sums=[1e4], max_grad_norm=math.inf).outcome != "stepped"


@pytest.mark.parametrize("spikes", [SKIP, CLIP], ids=["skip", "clip"])
def test_nothing_is_a_spike_before_enough_is_known(kernels, spikes):
    model = guarded(kernels, spikes, (1.0, 1.0))
    assert model.update(sums=[1e8]).outcome == "stepped"


def test_equal_norms_are_no_spikes(kernels):
    model = guarded(kernels, SKIP, [2.0] * 8)
    assert model.update(sums=[4.0]).outcome == "stepped"
    assert model.update(sums=[4.0 * (1 + 1e-7)]).outcome == "stepped"
    assert model.update(sums=[4.1]).outcome == "spike"


@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 300])
def test_windows_of_any_length(kernels, window):
    """Rings that have gone around and are about to again; shorter and longer than what is read at once."""
    model = Model(kernels, [], spikes=SpikeOptions(3.0, window, min(window, 3)))
    random = np.random.default_rng(window)
    model.outcomes.norms.values = random.uniform(0.9, 1.1, 2 * window - 2).tolist()
    model.status.write(model.outcomes.words())
    for norm in random.uniform(0.9, 1.1, 4):
        model.update(sums=[norm**2])
    assert model.update(sums=[1e4]).outcome == "spike"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("spikes", [SKIP, CLIP], ids=["skip", "clip"])
def test_what_is_not_finite_is_skipped_and_never_remembered(kernels, spikes, bad):
    """A NaN in the window would let everything after it pass, or nothing."""
    model = guarded(kernels, spikes, (bad, 1.0, 1.1, bad, 0.9))
    assert model.update(sums=[bad]).outcome == "nonfinite"
    assert model.update(sums=[1.0]).outcome == "stepped"
    assert model.update(sums=[1e4]).outcome != "stepped"


@pytest.mark.parametrize("spikes", [SKIP, CLIP], ids=["skip", "clip"])
def test_losses_are_tested_as_norms_are(kernels, spikes):
    """Whatever is done with a norm, the step of a loss that is a spike is skipped."""
    model = Model(kernels, ROWS, spikes=spikes)
    for loss in (2.0, 2.1, 1.9):
        model.update(sums=[1.0], loss=loss)
    assert model.update(sums=[1.0], loss=50.0).outcome == "loss_spike"
    assert model.update(sums=[1.0], loss=math.nan).outcome == "nonfinite"
    assert model.update(sums=[1.0], loss=-math.inf).outcome == "nonfinite"
    assert model.update(sums=[1e6], loss=2.0).outcome == ("clipped_spike" if spikes.clips else "spike")
    assert model.update(sums=[1.0]).outcome == "stepped"  # without a loss
    assert model.update(sums=[1.0], loss=2.0).outcome == "stepped"


def test_overflows_are_no_part_of_a_streak(kernels):
    model = guarded(kernels, SKIP, (1.0, 1.0, 1.0))
    for found_inf in (0.0, 1.0, 0.0):
        model.update(sums=[1e6], found_inf=found_inf)
    assert model.outcomes.streak == 2


def test_long_streaks(kernels):
    """Longer than the norms that are kept of them; they end with a step."""
    model = guarded(kernels, SKIP, (1.0, 1.0, 1.0))
    for i in range(outcomes.REFUSED + 3):
        model.update(sums=[1e6 + i])
    model.update(sums=[1.0])
    model.update(sums=[math.nan])
    assert model.outcomes.streak == 1


def test_with_loss_scales(kernels):
    model = Model(kernels, ROWS, spikes=CLIP)
    for scale in (8.0, 2.0, 1024.0, 4.0):
        model.update(sums=[scale**2], loss_scale=scale, found_inf=0.0)
    assert model.update(sums=[4.0 * 100.0**2], loss_scale=2.0, found_inf=0.0).outcome == "clipped_spike"


def test_a_guard_of_many_blocks(kernels):
    """All blocks of a launch decide the same, by what was there before any of them wrote."""
    params = [Param(3 * kernels.block + 9, step=1.0), Param(40)]
    options = {"spikes": CLIP, "average": F32, "averaging": Averaging(0.9), "stats": True}
    model = Model(kernels, params, chunk_size=kernels.block, **options)
    for norm in (1.0, 1.1, 0.9, 100.0):
        model.update(kernels.grids[-1], sums=[norm**2])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_series_of_steps(cpu, data):
    """Norms, losses, overflows and options of any kind; the CPU kernels, which are fast enough."""
    numbers = st.floats(1e-3, 10.0) | st.sampled_from([1.0, 1e8, math.inf, math.nan])
    window = data.draw(st.integers(1, 6))
    spikes = SpikeOptions(
        data.draw(st.sampled_from([0.5, 3.0])),
        window,
        data.draw(st.integers(1, window)),
        data.draw(st.booleans()),
    )
    model = Model(cpu, [Param(3)], average=STOCHASTIC, averaging=Averaging(0.9), spikes=spikes)
    for _ in range(data.draw(st.integers(1, 20))):
        model.update(
            sums=[data.draw(numbers) ** 2],
            loss=data.draw(st.none() | numbers),
            found_inf=data.draw(st.sampled_from([None, 0.0, 0.0, 1.0])),
        )
