"""The GPT of the example at any width, parametrized so that learning rates transfer between widths (muP)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from examples.models import GPT, GPTConfig

BASE_WIDTH = 64
HEAD_SIZE = 16


def build(width: int = BASE_WIDTH, mup: bool = True) -> GPT:
    """Build a GPT.

    Heads have one size at every width, so that the scale of attention need not change.

    Args:
        width: Of the residual stream, a multiple of 16.
        mup: Whether hidden maps start with a standard deviation ∝ fan-in^-1/2, and the result of the tied
            head is multiplied by base width / width. Otherwise the model is the example's own.
    """
    model = GPT(GPTConfig(layers=2, heads=width // HEAD_SIZE, width=width))
    if mup:
        m = width / BASE_WIDTH
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.weight.data.div_(math.sqrt(m))

        def multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output / m

        model.head.register_forward_hook(multiply)
    return model
