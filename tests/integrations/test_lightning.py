"""Lightning and Fabric: loops, precision, clipping, logging."""

import warnings

import pytest
import torch

import fused_adamw
from fused_adamw import FusedHygieneAdamW, build_param_groups

from .loops import (
    CLIP,
    LR,
    WEIGHT_DECAY,
    Model,
    assert_norms_before_clipping,
    assert_same,
    loader,
    loss_of,
    run_snippet,
    torch_adamw,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations of what it imports
    lightning = pytest.importorskip("lightning")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    fabric_loggers = pytest.importorskip("lightning.fabric.loggers")

OPTIONS = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class ListLogger(loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append(metrics["grad_norm"])


class PeerModule(lightning.LightningModule):
    def __init__(self, model, build):
        super().__init__()
        self.model = model
        self.build = build

    def training_step(self, batch, batch_idx):
        return loss_of(self.model, batch)

    def configure_optimizers(self):
        return self.build(self.model)


def fit(build, clip, **more):
    model = Model()
    trainer = lightning.Trainer(gradient_clip_val=clip, logger=False, **OPTIONS, **more)
    trainer.fit(PeerModule(model, build), loader())
    return model


@pytest.mark.parametrize(
    "more",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulation", "bf16-mixed"],
)
def test_trainer(more):
    logger = ListLogger()
    names = run_snippet(
        "Lightning",
        options={**OPTIONS, **more, "logger": logger},
    )
    assert_same(names["model"], lambda clip: fit(torch_adamw, clip, **more))
    if not more:
        assert_norms_before_clipping(logger.logged, 12)


def test_mixed_precision_refuses_a_double_clip():
    def build(model):
        return FusedHygieneAdamW(model, max_grad_norm=1.0)

    with pytest.raises(RuntimeError, match="FusedHygieneAdamW, does not allow for gradient clipping"):
        fit(build, CLIP, precision="bf16-mixed")


@pytest.mark.parametrize("make", [fused_adamw.AdamW, FusedHygieneAdamW])
def test_a_bare_swap_keeps_the_framework_s_clipping(make):
    """Under bf16-mixed, too, where Lightning asks whether the optimizer unscales."""

    def build(model):
        return make(build_param_groups(model, WEIGHT_DECAY), lr=LR)

    ours = fit(build, CLIP, precision="bf16-mixed")
    assert_same(ours, lambda clip: fit(torch_adamw, clip, precision="bf16-mixed"))


def test_the_logged_learning_rate_keeps_its_name(tmp_path):
    """lr-AdamW: Lightning takes it from the class."""
    monitor = lightning.pytorch.callbacks.LearningRateMonitor()
    logger = loggers.CSVLogger(tmp_path)
    names = []
    for make in (torch.optim.AdamW, fused_adamw.AdamW):
        model = Model()
        trainer = lightning.Trainer(logger=logger, callbacks=[monitor], **OPTIONS)
        trainer.fit(PeerModule(model, lambda m, make=make: make(m.parameters())), loader())
        names.append(list(monitor.lrs))
    assert names == [["lr-AdamW"]] * 2


def fabric_options(**more):
    return {"accelerator": "cpu", "devices": 1, **more}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision):
    def train(clip):
        fabric = lightning.Fabric(**fabric_options(precision=precision))
        model = Model()
        wrapped, optimizer = fabric.setup(model, torch_adamw(model))
        for batch in loader():
            fabric.backward(loss_of(wrapped, batch))
            if clip is not None:
                fabric.clip_gradients(wrapped, optimizer, max_norm=clip)
            optimizer.step()
            optimizer.zero_grad()
        return model

    logger = ListLogger()
    names = run_snippet("Fabric", options=fabric_options(precision=precision, loggers=logger))
    assert_same(names["model"], train)
    assert_norms_before_clipping(logger.logged, 6)


def test_wrappers_pass_the_norm_on_and_keep_a_threshold_to_themselves():
    """Why the docs go through `.optimizer` to set it."""
    fabric = lightning.Fabric(**fabric_options())
    model = Model()
    wrapped, optimizer = fabric.setup(model, FusedHygieneAdamW(model, max_grad_norm=1.0))
    fabric.backward(loss_of(wrapped, next(iter(loader()))))
    optimizer.step()
    assert torch.equal(optimizer.grad_norm, optimizer.optimizer.grad_norm)
    optimizer.max_grad_norm = 0.5
    assert optimizer.optimizer.max_grad_norm == 1.0
