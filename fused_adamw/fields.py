"""Where a parameter's state keeps what a step reads: under which keys, and in which formats."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import FORMATS, Field, Format, Formats, plain_format

# `Optimizer.state`: a step reads only what it holds for the optimizer's own parameters, under `STATE_KEYS`.
# Whatever else users keep there is theirs.
State = Mapping[Any, Any]


class Keys(NamedTuple):
    """Under which keys a state has a field.

    Attributes:
        values: Of its values; "" for the parameter, which is in no state.
        side: Of what its format keeps beside them; None: nothing.
    """

    values: str
    side: str | None = None


MAXIMUM = "max_exp_avg_sq"  # with amsgrad only
MOMENTS = ("exp_avg", "exp_avg_sq", MAXIMUM)
RESIDUAL = "master_residual"
AVERAGE = "ema"
# A moment is kept as torch does, or as codes beside their scales.
CODED = {name: Keys(f"{name}_code", f"{name}_scale") for name in MOMENTS[:2]}
CODES = {"exp_avg": FORMATS["root_signed"], "exp_avg_sq": FORMATS["root_unsigned"]}
# Laid out as the parameter is.
LIKE_PARAMETER = (*MOMENTS, RESIDUAL, AVERAGE, *(keys.values for keys in CODED.values()))
SCALES = tuple(str(keys.side) for keys in CODED.values())
STATE_KEYS = ("step", *LIKE_PARAMETER, *SCALES)


class Rounding(NamedTuple):
    """What is rounded stochastically where it is kept in bfloat16.

    Attributes:
        params: Parameters that have no residual.
        moments: exp_avg_sq.
    """

    params: bool = False
    moments: bool = False


def keys_of(names: Container[str]) -> dict[str, Keys]:
    """Under which keys a state that has these keeps the parameter's residual, its moments, its average."""
    found = {"param": Keys("", RESIDUAL if RESIDUAL in names else None)}
    for name in MOMENTS:
        if name in CODED and CODED[name].values in names:
            found[name] = CODED[name]
        elif name in names:
            found[name] = Keys(name)
    if AVERAGE in names:
        found["average"] = Keys(AVERAGE)
    return found


def formats_of(dtypes: Mapping[str, torch.dtype], rounding: Rounding) -> Formats:
    """How a parameter and what belongs to it are kept.

    Args:
        dtypes: Of the parameter as "parameter", of its gradient as "gradient", and of its state by key.
        rounding: What is rounded stochastically.
    """
    keys = keys_of(dtypes)
    p, grad = dtypes["parameter"], dtypes["gradient"]
    m, v = keys["exp_avg"], keys["exp_avg_sq"]
    return Formats(
        FORMATS["bfloat16_split"] if keys["param"].side else _rounded(p, rounding.params),
        plain_format(grad),
        CODES["exp_avg"] if m.side else plain_format(dtypes[m.values]),
        CODES["exp_avg_sq"] if v.side else _rounded(dtypes[v.values], rounding.moments),
        _rounded(dtypes[AVERAGE], True) if AVERAGE in dtypes else None,
    )


def moments_of(state: Mapping[str, Any]) -> dict[str, Field]:
    """The moments that a state has."""
    found = {}
    for name, keys in keys_of(state).items():
        if name in MOMENTS:
            values: Tensor = state[keys.values]
            format = CODES[name] if keys.side else plain_format(values.dtype)
            found[name] = Field(format, values, state[keys.side] if keys.side else None)
    return found


def named(name: str, field: Field) -> dict[str, Tensor]:
    """A moment by the keys under which a state has it."""
    if field.side is None:
        return {name: field.values}
    return {CODED[name].values: field.values, str(CODED[name].side): field.side}


def _rounded(dtype: torch.dtype, stochastically: bool) -> Format:
    is_rounded = dtype is torch.bfloat16 and stochastically
    return FORMATS["bfloat16_stochastic"] if is_rounded else plain_format(dtype)
