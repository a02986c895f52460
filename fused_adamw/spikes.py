"""What a spike is, a gradient norm or a loss far above those before, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .tables import SpikeOptions, as_number


@dataclass(frozen=True)
class SpikeGuard:
    """What to do about a step whose gradient norm is far above those before.

    A norm is a spike if it exceeds the mean of the last accepted ones by more than `sigmas` of their standard
    deviations. Norms that are not finite are always skipped, and no norm that was skipped enters the history,
    so a NaN cannot poison it. All this is decided on the device, in the launches that there are anyway, by
    the same numbers in all processes.

    Args:
        sigmas: How many standard deviations above the mean a norm may be.
        window: Of how many accepted norms.
        warmup: How many norms have to be accepted before any can be a spike.
        on: "skip": the step changes nothing, not even step counts. "clip": gradients are clipped to the
            limit, which enters the history in place of their norm; with `sigmas=2.5` about what ZClip does
            (https://arxiv.org/abs/2504.02507).
        max_consecutive: After more skipped steps in a row than this, the optimizer raises when its status is
            next read. Steps that a GradScaler skips do not count.

    Raises:
        ValueError: A value is out of range.
        TypeError: A value is not a number.
    """

    sigmas: float = 6.0
    window: int = 128
    warmup: int = 128
    on: Literal["skip", "clip"] = "skip"
    max_consecutive: int = 20

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "sigmas", as_number(self.sigmas))
        except (TypeError, ValueError):
            raise TypeError(f"sigmas must be a number, got {self.sigmas!r}") from None
        if not 0.0 < self.sigmas < float("inf"):
            raise ValueError(f"sigmas must be a finite number > 0, got {self.sigmas}")
        for name, least in (("window", 2), ("warmup", 2), ("max_consecutive", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.on not in ("skip", "clip"):
            raise ValueError(f"on must be 'skip' or 'clip', got {self.on!r}")

    @property
    def options(self) -> SpikeOptions:
        """What kernels need to know."""
        return SpikeOptions(self.sigmas, self.window, self.warmup, self.on == "clip")


def checked_guard(value: Any) -> SpikeGuard | None:
    """The value, if it is one.

    Raises:
        TypeError: It is neither None nor a `SpikeGuard`.
    """
    if value is None or isinstance(value, SpikeGuard):
        return value
    raise TypeError(f"guard must be None or a SpikeGuard, such as SpikeGuard(sigmas=6), got {value!r}")
