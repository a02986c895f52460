"""What an average of the weights is that the step keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .formats import FORMATS, Format, plain_format
from .tables import WARMUPS, Averaging, as_number


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of the weights: each step adds `(1 - decay) * (p - average)` to it.

    It is updated inside the step, where the parameter is in registers: of the float32 master where there is
    one, else of the parameter as it is kept. Equal to `torch.optim.swa_utils.AveragedModel` with
    `get_ema_multi_avg_fn(decay)` and to timm's `ModelEmaV3`. Steps are counted for each parameter, as its
    state's `step`; one without a gradient keeps its average as it is.

    Args:
        decay: What is kept of the average at each update, in [0, 1); None: 0.9999, or what `half_life` says.
        half_life: After so many steps the weight of a parameter's value in the average has halved.
        warmup: How decay is reached, after n updates of the average: "timm", `1 - (1 + n)^(-2/3)`; or
            "diffusers", `(1 + n) / (10 + n)`; at most `decay`. None: at once.
        start_step: Until so many steps have been made, and at the first update, the average is the parameter.
        every: Update at every so many steps only.
        dtype: Of the average: `torch.float32`; or `torch.bfloat16`, rounded stochastically, as it moves by
            too little for rounding to nearest. None: float32. Parameters of 64 bits, and complex ones, keep
            averages of their own dtype.

    Raises:
        ValueError: A value is out of range, or both `decay` and `half_life` are given.
        TypeError: A value is not a number.
    """

    decay: float | None = None
    half_life: float | None = None
    warmup: Literal["timm", "diffusers"] | None = None
    start_step: int = 0
    every: int = 1
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and self.half_life is not None:
            raise ValueError(f"pass decay or half_life, not both: got {self.decay!r} and {self.half_life!r}")
        for name in ("decay", "half_life"):
            if (value := getattr(self, name)) is not None:
                try:
                    object.__setattr__(self, name, as_number(value))
                except (TypeError, ValueError):
                    raise TypeError(f"{name} must be a number, got {value!r}") from None
        if self.decay is not None and not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")
        if self.half_life is not None and not 0.0 < self.half_life < math.inf:
            raise ValueError(f"half_life must be a finite number > 0, got {self.half_life}")
        if self.warmup not in WARMUPS:
            raise ValueError(f"warmup must be None, 'timm' or 'diffusers', got {self.warmup!r}")
        for name, least in (("start_step", 0), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be None, torch.float32 or torch.bfloat16, got {self.dtype!r}")

    @property
    def averaging(self) -> Averaging:
        """What kernels need to know."""
        decay = 0.9999 if self.decay is None else self.decay
        if self.half_life is not None:
            decay = 0.5 ** (self.every / self.half_life)
        return Averaging(decay, WARMUPS.index(self.warmup), self.start_step, self.every)

    def format_of(self, p: Tensor) -> Format:
        """How the average of a parameter is kept.

        Args:
            p: The parameter.
        """
        if p.is_complex() or p.dtype == torch.float64:
            return plain_format(p.dtype)
        return FORMATS["bfloat16_stochastic" if self.dtype == torch.bfloat16 else "float32"]


def checked_ema(value: Any) -> EMA | None:
    """The value, if it is one.

    Raises:
        TypeError: It is neither None nor an `EMA`.
    """
    if value is None or isinstance(value, EMA):
        return value
    raise TypeError(f"ema must be None or an EMA, such as EMA(decay=0.9999), got {value!r}")
