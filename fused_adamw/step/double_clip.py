"""Warns when gradients were clipped before the step, which then clips them a second time."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from ..tables import StepInputs

# A norm that stays this close to max_grad_norm for this many steps in a row is the work of another clip: one
# that merely drifts past it moves on sooner. Clipped bfloat16 gradients are too coarse to be recognised.
_TOLERANCE, _STEPS = 1e-4, 8


class DoubleClipDetector:
    """Counts the steps in a row whose gradient norm equals `max_grad_norm`, and warns once."""

    def __init__(self) -> None:
        self._count = 0
        self._has_warned = False

    def observe(self, inputs: StepInputs) -> None:
        """Look at the norm of a step that is about to run: a warning may be turned into an error.

        Args:
            inputs: Those of the step. Read on the CPU only: elsewhere that would synchronise, and a fake
                tensor has no value.
        """
        sums, max_grad_norm = inputs.sums, inputs.max_grad_norm
        if self._has_warned or type(sums) is not Tensor or sums.device.type != "cpu":
            return
        scale = 1.0 if inputs.grad_scale is None else inputs.grad_scale.item()
        if scale == 0.0 or max_grad_norm == math.inf:
            return
        norm = math.sqrt(sum(sums.tolist())) / scale
        equal = math.isclose(norm, max_grad_norm, rel_tol=_TOLERANCE)
        self._count = self._count + 1 if equal else 0
        if self._count == _STEPS:
            self._has_warned = True
            warnings.warn(
                f"for {_STEPS} steps the gradient norm was max_grad_norm={max_grad_norm}: the gradients were "
                "probably clipped before step() too, and grad_norm is not the norm that they had. Clip once: "
                "remove clip_grad_norm_, or switch the framework's clipping off (docs/integrations.md).",
                stacklevel=2,
            )
