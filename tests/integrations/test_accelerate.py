"""Accelerate: its wrappers, accumulation, trackers."""

import pytest

from .loops import (
    Model,
    assert_norms_before_clipping,
    assert_same,
    loader,
    loss_of,
    run_snippet,
    torch_adamw,
)

accelerate = pytest.importorskip("accelerate")
tracking = pytest.importorskip("accelerate.tracking")


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Accelerate keeps its settings for the life of the process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Tracker(tracking.GeneralTracker):
    name = "list"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged = []

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.logged.append(values["grad_norm"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loop(accumulate):
    def train(clip):
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulate)
        model = Model()
        prepared, optimizer, batches = accelerator.prepare(model, torch_adamw(model), loader())
        for batch in batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, batch))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        return model

    tracker = Tracker()
    names = run_snippet(
        "Accelerate",
        accumulate=accumulate,
        trackers=tracker,
    )
    assert_same(names["model"], train)
    assert_norms_before_clipping(tracker.logged, 6)
    assert not hasattr(names["optimizer"], "grad_norm")  # hence .optimizer in the docs
