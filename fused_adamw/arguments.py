"""The arguments that torch's AdamW does not have: which values they take, and how they are shown."""

from __future__ import annotations

from typing import Any

import torch

# They are attributes of the optimizer, not group keys: those would end up in checkpoints, and torch's
# checkpoints, which lack them, would not load.
OWN = ("max_grad_norm", "skip_nonfinite", "norm_process_group", "state_dtype", "backend")
_UNSET = (None, False)
_STATE_DTYPES = (None, torch.float32, torch.bfloat16)


def number_of(value: Any) -> float | None:
    """The value as a float; None if it is no number, as a string is none: torch would not take it."""
    try:
        return None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def checked_max_grad_norm(value: Any) -> float | None:
    """The norm to clip to as a float, or None.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not positive.
    """
    if value is None:
        return None
    if isinstance(value, bool) or (number := number_of(value)) is None:
        raise TypeError(f"max_grad_norm must be None or a number, got {value!r}")
    if number == 0.0:
        raise ValueError(
            "max_grad_norm must be None or a number > 0, got 0, which would scale every gradient to zero: "
            "pass None to switch clipping off"
        )
    if not number > 0.0:
        raise ValueError(f"max_grad_norm must be None or a number > 0, got {number}")
    return number


def checked_skip_nonfinite(value: Any) -> bool:
    """The value as a bool.

    Raises:
        ValueError: It is neither True nor False.
    """
    if value not in (False, True):
        raise ValueError(f"skip_nonfinite must be True or False, got {value!r}")
    return bool(value)


def checked_state_dtype(value: Any) -> torch.dtype | None:
    """The dtype of moments, or None.

    Raises:
        ValueError: Moments cannot have it.
    """
    if value not in _STATE_DTYPES:
        raise ValueError(f"state_dtype must be None, torch.float32 or torch.bfloat16, got {value!r}")
    dtype: torch.dtype | None = value
    return dtype


def check_numbers(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Refuse what torch would compare with 0, and fail on without saying what it is.

    Raises:
        TypeError: A hyper-parameter is not a number.
    """
    named = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    try:
        named |= {"betas[0]": betas[0], "betas[1]": betas[1]}
    except (TypeError, IndexError):
        raise TypeError(f"betas must be two numbers, got {betas!r}") from None
    for name, value in named.items():
        if isinstance(value, str):
            raise TypeError(
                f"{name} must be a number, got the string {value!r}: pass float({value!r}). YAML reads 1e-3 "
                "as a string, 1.0e-3 as a number."
            )
        if not isinstance(value, torch.Tensor) and number_of(value) is None:
            raise TypeError(f"{name} must be a number, got {value!r}")


def set_options(optimizer: Any) -> dict[str, Any]:
    """What was set of the arguments that change results, for `repr` and `defaults`."""
    values = {name: getattr(optimizer, name) for name in OWN if name != "backend"}
    return {name: value for name, value in values.items() if value not in _UNSET}
