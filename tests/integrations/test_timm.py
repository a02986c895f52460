"""The pieces of timm's train.py."""

import pytest
import torch
from groups.torchvision_stub import torchvision_stub

from fused_adamw import FusedHygieneAdamW

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

with torchvision_stub():
    timm = pytest.importorskip("timm")
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry
    from timm.scheduler import create_scheduler_v2
    from timm.utils import NativeScaler


def test_loop():
    def train(clip):
        model = Model()
        optimizer = torch_adamw(model)
        scheduler, _ = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=2, updates_per_epoch=3, step_on_epochs=False
        )
        scaler, updates = NativeScaler("cpu"), 0
        for i, batch in enumerate(loader(), start=1):
            scaler(
                loss_of(model, batch) / 2,
                optimizer,
                clip_grad=clip,
                parameters=model.parameters(),
                need_update=i % 2 == 0,
            )
            if i % 2 == 0:
                optimizer.zero_grad()
                updates += 1
                scheduler.step_update(updates)
        return model

    names = run_snippet("timm")
    assert_same(names["model"], train)
    assert_norms_before_clipping(names["logged"], 6)
    assert names["optimizer"].param_groups[0]["lr"] < LR / 2  # the scheduler did schedule


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    return default_registry


def test_by_name(registry):
    names = run_snippet("timm", 1)
    optimizer = names["optimizer"]
    assert type(optimizer) is FusedHygieneAdamW
    assert optimizer.max_grad_norm == CLIP
    expected = FusedHygieneAdamW(Model(), lr=LR, weight_decay=WEIGHT_DECAY)
    for group, other in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert {**group, "params": len(group["params"])} == {**other, "params": len(other["params"])}


def test_by_name_with_the_groups_of_timm(registry):
    registry.register(OptimInfo("hygieneadamw", FusedHygieneAdamW, has_betas=True))
    model = Model()
    ours = create_optimizer_v2(model, opt="hygieneadamw", lr=LR, weight_decay=WEIGHT_DECAY)
    theirs = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    assert len(ours.param_groups) == 2
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert all(p is q for p, q in zip(group["params"], other["params"], strict=True))
        assert group["weight_decay"] == other["weight_decay"]
    assert isinstance(ours, torch.optim.AdamW)
