"""The snippets for plain PyTorch: accumulation, and AMP."""

import pytest
import torch

from fused_adamw import FusedHygieneAdamW

from .loops import (
    Model,
    assert_norms_before_clipping,
    assert_same,
    loader,
    loss_of,
    run_snippet,
    torch_adamw,
    train_epoch,
)


def test_accumulation():
    def train(clip):
        model = Model()
        optimizer = torch_adamw(model)
        for i, batch in enumerate(loader(), start=1):
            (loss_of(model, batch) / 2).backward()
            if i % 2 == 0:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        return model

    names = run_snippet("Plain PyTorch")
    assert_same(names["model"], train)
    assert_norms_before_clipping(names["logged"], 6)


def test_grad_scaler():
    def train(clip):
        model = Model()
        optimizer = torch_adamw(model)
        scaler = torch.amp.GradScaler("cpu")
        for batch in loader():
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model

    names = run_snippet("Plain PyTorch", 1)
    assert_same(names["model"], train)
    assert len(names["logged"]) == 6
    # The first loss scale, 65536, makes the large batches overflow: both sides must have skipped the same.
    assert names["optimizer"].skipped_steps > 0
    assert names["scaler"].get_scale() < 65536


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_clipping_again_is_not_the_same(clip):
    """With another threshold the smaller one wins, and the norm is that which the other left."""
    model = Model()
    optimizer = FusedHygieneAdamW(model, lr=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    for batch in loader():
        loss_of(model, batch).backward()
        before = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(optimizer.grad_norm, before.clamp(max=clip), rtol=1e-5, atol=0)

    def train(c):
        peer = Model()
        return train_epoch(peer, torch_adamw(peer), None if c is None else min(c, clip))

    assert_same(model, train)
