"""Warns when gradients were clipped before the step, which then clips them a second time."""

from __future__ import annotations

import ctypes
import math
import warnings

from torch import Tensor

from ..tables import StepInputs

# A norm that stays this close to max_grad_norm for this many steps in a row is the work of another clip: one
# that merely drifts past it moves on sooner. Clipped bfloat16 gradients are too coarse to be recognised.
_TOLERANCE, _STEPS = 1e-4, 8


def _sums_of(inputs: StepInputs) -> ctypes.Array[ctypes.c_double] | None:
    """The sums of squares of a step where they are; None: there is no clip, or they are not on the host."""
    sums = inputs.sums
    if type(sums) is not Tensor or sums.device.type != "cpu" or inputs.max_grad_norm == math.inf:
        return None
    return (ctypes.c_double * sums.numel()).from_address(sums.data_ptr())


class DoubleClipDetector:
    """Counts the steps in a row whose gradient norm equals `max_grad_norm`, and warns once."""

    def __init__(self) -> None:
        self._count = 0
        self._has_warned = False
        # Of the steps as they now are: their inputs, and the sums in them, read in place.
        self._inputs: StepInputs | None = None
        self._sums: ctypes.Array[ctypes.c_double] | None = None

    def observe(self, inputs: StepInputs) -> None:
        """Look at the norm of a step that is about to run: a warning may be turned into an error.

        Args:
            inputs: Those of the step. Read on the CPU only: elsewhere that would synchronise, and a fake
                tensor has no value.
        """
        if inputs is not self._inputs:
            self._inputs, self._sums = inputs, _sums_of(inputs)
        if self._has_warned or self._sums is None:
            return
        max_grad_norm = inputs.max_grad_norm
        scale = 1.0 if inputs.grad_scale is None else inputs.grad_scale.item()
        if scale == 0.0:
            return
        norm = math.sqrt(sum(self._sums)) / scale
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
