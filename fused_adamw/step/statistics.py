"""What a norm pass leaves behind about single parameters: its partial sums, read when somebody asks."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..tables import StepInputs
from .launch import Bucket
from .norm import Reduction


class GradNorm(NamedTuple):
    """What a norm pass found of one gradient.

    Attributes:
        norm: Without the loss scale, before clipping; None: not known, as the loss scale of a step whose norm
            is not finite is not kept.
        nonfinite: Whether it holds an infinity or a NaN.
    """

    norm: float | None
    nonfinite: bool


def grad_norms(
    ids: Sequence[int],
    buckets: Sequence[Bucket],
    reduction: Reduction,
    inputs: StepInputs,
    addresses: bytes,
) -> dict[int, GradNorm]:
    """The norm of each gradient, as the last norm pass found it.

    The host waits for the devices; with DTensors it is a collective of each mesh.

    Args:
        ids: Of all parameters; one that is listed twice has its gradient at its last place.
        buckets: What was summed.
        reduction: Sums over processes.
        inputs: Those of the step.
        addresses: An int64 for each parameter: 0 where there was no gradient.

    Returns:
        By id, for parameters that had a gradient in this process.
    """
    squares = torch.zeros(len(ids), dtype=torch.float64, device="cpu")
    for bucket in buckets:
        squares[torch.tensor(bucket.slots, dtype=torch.int64, device="cpu")] = bucket.squares()
    scale = _unscaling(inputs)
    found = {}
    for id_, square, address in zip(
        ids, reduction.of_each(squares).tolist(), array("q", addresses), strict=True
    ):
        if address:
            nonfinite = not math.isfinite(square)
            is_known = nonfinite or scale is not None
            found[id_] = GradNorm(math.sqrt(square) * (scale or 1.0) if is_known else None, nonfinite)
    return found


def _unscaling(inputs: StepInputs) -> float | None:
    """What takes the loss scale out of the norm of a gradient; None: not known any more."""
    if inputs.grad_scale is None:
        return 1.0
    assert inputs.sums is not None
    norm, scaled = float(inputs.status[0]), math.sqrt(float(inputs.sums.sum()))
    if not (math.isfinite(norm) and math.isfinite(scaled)):
        return None
    return norm / scaled if scaled else 1.0
