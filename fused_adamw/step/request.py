"""What the optimizer asks of one step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..device import scalar_on
from ..tables import Averaging, SpikeOptions, StepInputs
from .norm import NormGroup


class Request(NamedTuple):
    """What a step is asked for, beside the hyper-parameters of groups.

    Attributes:
        max_grad_norm: Clip to this global norm; None: no clipping.
        skip_nonfinite: Skip the step where the norm is not finite.
        grad_scale: The loss scale that the gradients still carry: a number, or one element on any device.
        found_inf: Not 0: skip the step. One element on any device: what a GradScaler found in this process.
        norm_group: Sums over the processes that hold the other parameters.
        seed: Of the noise of stochastic rounding.
        loss: A number, or one element on any device: tested as the norm is, where spikes are looked for.
        spikes: What a spike is.
        averaging: How averages follow their parameters.
        stats: Whether to find out what `stats` returns.
    """

    max_grad_norm: float | None
    skip_nonfinite: bool
    grad_scale: Any
    found_inf: Any
    norm_group: NormGroup | None
    seed: int
    loss: Tensor | float | None
    spikes: SpikeOptions
    averaging: Averaging
    stats: bool

    @property
    def needs_norm(self) -> bool:
        """Whether the norm of the gradients has to be known."""
        return self.max_grad_norm is not None or self.skip_nonfinite or self.spikes.window > 0

    def inputs(self, status: Tensor, sums: Tensor | None, found_inf: Any) -> StepInputs:
        """What kernels need to know, on the device of `status`."""
        return StepInputs(
            status,
            sums,
            math.inf if self.max_grad_norm is None else self.max_grad_norm,
            scalar_on(status.device, self.grad_scale),
            scalar_on(status.device, found_inf),
            self.skip_nonfinite,
            self.seed,
            scalar_on(status.device, self.loss, status.dtype),
            self.spikes,
            self.averaging,
        )
