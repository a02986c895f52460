"""What a step leaves behind about single parameters, read when somebody asks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tables import FIRST_SKIPPED, ChunkStatsStruct, StatusStruct, word_of, words
from .launch import Bucket
from .norm import Reduction


class ParamStats(NamedTuple):
    """What the last step found of a parameter, or of several together. None: it was not asked for.

    Attributes:
        grad_norm: Of the gradient, without the loss scale and before clipping.
        grad_max: The largest magnitude in the gradient, likewise; None too where the step was skipped.
        nonfinite: Whether the gradient holds an infinity or a NaN.
        update_norm: Of what the step added to the parameter, decay included, before it was rounded to the
            parameter's format; 0 where the step was skipped.
        param_norm: Of the parameter after the step; None too where it was skipped.
        lost_updates: How many values were updated by less than half a unit in the last place of bfloat16,
            which rounding to nearest loses; 0 for parameters that are not bfloat16. With masters and
            stochastic rounding they are not lost.
    """

    grad_norm: float | None
    grad_max: float | None
    nonfinite: bool
    update_norm: float | None
    param_norm: float | None
    lost_updates: int | None


class LastStep(NamedTuple):
    """What is known of the last step without asking a device.

    Attributes:
        present: A byte for each parameter: whether it had a gradient.
        has_norm: Whether it had a norm pass.
        has_stats: Whether the update left stats.
    """

    present: bytes
    has_norm: bool
    has_stats: bool


_GRAD, _MAX, _UPDATE, _PARAM, _LOST = (
    word_of(ChunkStatsStruct, name)
    for name in ("grad_squares", "grad_max", "update_squares", "param_squares", "lost_updates")
)


def param_stats(
    ids: Sequence[int], buckets: Sequence[Bucket], reduction: Reduction, status: Tensor, last: LastStep
) -> dict[int, ParamStats]:
    """What the last step found of each parameter.

    The host waits for the devices; with DTensors it is a collective of each mesh.

    Args:
        ids: Of all parameters; one that is listed twice has its gradient at its last place.
        buckets: What was stepped.
        reduction: Sums over processes.
        status: Of the step.
        last: What else is known of it.

    Returns:
        By id, for parameters that had a gradient in this process.
    """
    of_step = status.cpu()
    loss_scale = float(of_step[word_of(StatusStruct, "loss_scale")])
    is_skipped = float(of_step[word_of(StatusStruct, "outcome")]) >= FIRST_SKIPPED
    found = torch.zeros(len(ids), words(ChunkStatsStruct), dtype=torch.float64, device="cpu")
    for bucket in buckets:
        slots = torch.tensor(bucket.slots, dtype=torch.int64, device="cpu")
        if last.has_stats and not is_skipped:
            found[slots] = bucket.stats()
        if last.has_norm:
            found[slots, _GRAD] = bucket.squares()
    largest = reduction.largest_of_each(found[:, _MAX]) if last.has_stats else found[:, _MAX]
    found = reduction.of_each(found)
    found[:, _MAX] = torch.where(found[:, _GRAD].isnan(), math.nan, largest)

    def stats_of(row: list[float]) -> ParamStats:
        has_grads, is_stepped = last.has_norm or not is_skipped, last.has_stats and not is_skipped
        return ParamStats(
            math.sqrt(row[_GRAD]) / loss_scale if has_grads else None,
            row[_MAX] / loss_scale if is_stepped else None,
            has_grads and not math.isfinite(row[_GRAD]),
            math.sqrt(row[_UPDATE]) if last.has_stats else None,
            math.sqrt(row[_PARAM]) if is_stepped else None,
            round(row[_LOST]) if last.has_stats else None,
        )

    rows = zip(ids, found.tolist(), last.present, strict=True)
    return {id_: stats_of(row) for id_, row, has_grad in rows if has_grad}
