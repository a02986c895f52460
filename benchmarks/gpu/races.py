"""The races on a GPU, what is to be reached on an H100 and on an H200, and why no more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..cases import (
    GPT2,
    GPT2_WITH_BESIDES,
    GPT2_XL,
    GPT2_XL_BF16,
    GPT2_XL_LOW_PRECISION,
    MANY,
    RESNET50,
    VIT_B,
    Case,
    Race,
)


@dataclass(frozen=True)
class Targets:
    """What one kind of GPU is to reach.

    Attributes:
        ratios: Over each peer.
        copy_fraction: Share of copy bandwidth.
    """

    ratios: Mapping[str, float] = field(default_factory=dict)
    copy_fraction: float | None = None


@dataclass(frozen=True)
class GpuRace:
    """A race with its targets.

    Attributes:
        race: What is run.
        h100: Targets on an H100.
        h200: Targets on an H200.
        why: What bounds the race, and so the targets.
    """

    race: Race
    h100: Targets = Targets()
    h200: Targets = Targets()
    why: str = ""

    def on(self, device: str) -> Race:
        """The race with the targets of a device, by its name; without targets on other devices."""
        kind = re.search(r"\b(H100|H200)\b", device)
        targets = getattr(self, kind[0].lower()) if kind else Targets()
        return replace(self.race, target_ratios=targets.ratios, target_copy_fraction=targets.copy_fraction)


def _both(copy_fraction: float | None = None, **ratios: float) -> dict[str, Any]:
    targets = Targets(ratios, copy_fraction)
    return {"h100": targets, "h200": targets}


def _ratios(h100: float, h200: float) -> dict[str, Any]:
    return {"h100": Targets({"fused": h100}), "h200": Targets({"fused": h200})}


_STEP = {**_both(fused=0.97), "why": "equal bytes: no slower, but for noise"}
_XL = Targets({"fused": 1.25, "fused+grad_scale": 1.12}, 0.92)


def _low_precision(case: Case) -> GpuRace:
    """Moved bytes are to go as fast as a copy, codes less so: they take five square roots per pair."""
    assert case.precision is not None
    fraction = 0.75 if case.name.endswith("8bit") else 0.85
    targets = Targets({"float32+copy": round(0.85 * 46 / case.precision.moved[0], 2)}, fraction)
    why = "bytes, against float32 with a copy in bfloat16" + "; codes cost square roots" * (fraction < 0.8)
    return GpuRace(Race(case), targets, targets, why)


def _besides(case: Case) -> GpuRace:
    """What needs no memory is to cost next to nothing; an average less than one that is made afterwards."""
    assert case.besides is not None
    if case.besides.ema is None:
        return GpuRace(Race(case), **_both(plain=0.97), why="equal bytes, and arithmetic that memory hides")
    averages = {"fused+average": 1.2, "fused+timm": 1.2, "plain+average": 1.05}
    return GpuRace(Race(case), **_both(**averages), why="bytes: 52 and 44 against 40 per parameter")


# Races of one case are neighbours: its tensors are made once.
GPU_RACES = (
    GpuRace(
        Race(GPT2_XL), _XL, _XL, "bytes: 40 and 36 against 32 per parameter; memory is the limit of all three"
    ),
    GpuRace(
        Race(GPT2_XL, clip=False), **_both(0.92, fused=0.97), why="equal bytes: no slower, but for noise"
    ),
    GpuRace(
        Race(GPT2_XL_BF16),
        Targets({"fused": 1.2}, 0.88),
        Targets({"fused": 1.2}, 0.85),
        "half the bytes for the same arithmetic, which shows where memory is faster",
    ),
    GpuRace(Race(GPT2_XL_BF16, clip=False), **_STEP),
    *map(_low_precision, GPT2_XL_LOW_PRECISION),
    GpuRace(Race(GPT2), **_both(fused=1.2), why="4 GB per step: bytes, less what launches cost both"),
    GpuRace(Race(GPT2, clip=False), **_STEP),
    *map(_besides, GPT2_WITH_BESIDES),
    GpuRace(
        Race(RESNET50),
        **_ratios(1.4, 1.8),
        why="0.8 GB per step: memory takes 0.2 to 0.3 ms, torch's host more",
    ),
    GpuRace(Race(RESNET50, gradients="moved"), why="each step starts with the device idle: for the record"),
    GpuRace(Race(RESNET50, clip=False), **_STEP),
    GpuRace(
        Race(VIT_B),
        **_ratios(1.4, 1.6),
        why="2.8 GB per step: bytes, and torch's launches for each of 50 groups",
    ),
    GpuRace(
        Race(MANY),
        **_both(fused=8.0),
        why="next to no bytes: what is left is our host, which reads 2000 gradients",
    ),
    GpuRace(Race(MANY, clip=False), **_STEP),
)
# What native takes, over what Triton takes, where memory bounds both.
NATIVE_OVER_TRITON = 0.9
