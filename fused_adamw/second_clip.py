"""Warns when gradients were clipped before the step, which then clips them a second time."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

# A norm that stays this close to max_grad_norm for this many steps in a row is the work of another clip: one
# that merely drifts past it moves on sooner. Clipped bfloat16 gradients are too coarse to be recognised.
_TOLERANCE, _STEPS = 1e-4, 8


class SecondClipDetector:
    """Counts the steps in a row whose gradient norm equals `max_grad_norm`, and warns once."""

    def __init__(self) -> None:
        self._count = 0
        self._has_warned = False

    def observe(self, status: Tensor | None, max_grad_norm: float | None) -> None:
        """Look at the norm of one step.

        Args:
            status: Starts with the gradient norm. Read on the CPU only: elsewhere that would synchronise, and
                a fake tensor has no value.
            max_grad_norm: What the step clips to.
        """
        if self._has_warned or type(status) is not Tensor or status.device.type != "cpu":
            return
        if max_grad_norm is None or max_grad_norm == math.inf:
            return
        equal = math.isclose(status.tolist()[0], max_grad_norm, rel_tol=_TOLERANCE)
        self._count = self._count + 1 if equal else 0
        if self._count == _STEPS:
            self._has_warned = True
            warnings.warn(
                f"for {_STEPS} steps the gradient norm was max_grad_norm={max_grad_norm}: the gradients were "
                "probably clipped before step() too, and grad_norm is not the norm that they had. Clip once: "
                "remove clip_grad_norm_, or switch the framework's clipping off (docs/integrations.md).",
                stacklevel=2,
            )
