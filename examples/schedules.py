"""Learning-rate schedules, all torch's: linear warmup from a tenth of the rate, then the decay asked for."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

SCHEDULES = ("cosine", "linear", "onecycle", "noam")
WARMUP_START = 0.1


def rate(step: int, schedule: str, warmup: int, total: int) -> float:
    """Return the share of the full learning rate that step `step` (from 0) is taken with."""
    if step < warmup:
        return WARMUP_START + (1 - WARMUP_START) * step / warmup
    progress = (step - warmup) / (total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    if schedule == "noam":
        return math.sqrt(max(warmup, 1) / max(step, 1))
    raise ValueError(f"unknown schedule {schedule!r}")


def build_scheduler(
    optimizer: Optimizer, schedule: str, lr: float, warmup: int, total: int, start: int = 0
) -> LRScheduler:
    """Build the scheduler of a run of `total` steps, standing at step `start`.

    Every schedule peaks at `lr` at step `warmup`. One step after the last, cosine and linear reach zero and
    onecycle a thousandth of `lr / 10`; noam falls with the inverse square root of the step, whatever `total`.
    """
    if schedule == "onecycle":
        return OneCycleLR(
            optimizer,
            max_lr=lr,
            total_steps=total + 1,
            pct_start=(warmup + 1) / (total + 1),
            div_factor=1 / WARMUP_START,
            final_div_factor=1e3,
            cycle_momentum=False,
            last_epoch=start - 1,
        )
    factor = partial(rate, schedule=schedule, warmup=warmup, total=total)
    return LambdaLR(optimizer, factor, last_epoch=start - 1)
