"""What an optimizer refuses, before anything is changed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_hypers(group: dict[str, Any], index: int) -> None:
    """Check what a group says: torch looks at the defaults alone."""
    if group["differentiable"]:
        raise RuntimeError(
            "`fused` does not support `differentiable`: the step of FusedHygieneAdamW has no derivative. "
            "Use torch.optim.AdamW to differentiate through the optimizer."
        )
    beta1, beta2 = group["betas"]
    for name, value, below in (
        ("lr", group["lr"], math.inf),
        ("betas[0]", beta1, 1.0),
        ("betas[1]", beta2, 1.0),
        ("eps", group["eps"], math.inf),
        ("weight_decay", group["weight_decay"], math.inf),
    ):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            continue  # reading it would synchronise
        if not 0.0 <= float(value) < below:
            limit = f" and below {below}" if below != math.inf else ""
            raise ValueError(
                f"invalid {name} in parameter group {index}: {value}, expected a finite number >= 0{limit}"
            )


def check_no_transform() -> None:
    """Refuse `torch.func`: tensors inside its transforms stand for others, and have no memory to step."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "FusedHygieneAdamW.step() cannot run inside a torch.func transform (grad, vmap, ...): it has no "
            "derivative and no batching rule. Use the functional torch.optim.adamw.adamw there."
        )
