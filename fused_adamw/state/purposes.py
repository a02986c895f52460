"""What each parameter of an optimizer is for: its role decides how its moments are kept."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..groups import Decision, Role
from .precision import Precision, is_role


class Purpose(NamedTuple):
    """What one parameter is for.

    Attributes:
        role: As `groups` decided it; None: not known.
        names: Several if it is tied, none if they are not known.
    """

    role: str | None
    names: tuple[str, ...]


class Purposes:
    """Purposes by the canonical name of the parameter, so that copies of the optimizer keep them."""

    def __init__(self) -> None:
        self._by_name: dict[str, Purpose] = {}

    def learn(self, decisions: Iterable[Decision]) -> None:
        """Note what was decided for a model."""
        for d in decisions:
            self._by_name[d.name] = Purpose(str(d.role), (d.name, *d.aliases))

    def knows(self, name: str | None) -> bool:
        """Whether the role of a parameter is known."""
        return name in self._by_name

    def of(self, name: str | None) -> Purpose:
        """What the parameter of a name is for."""
        if name is None:
            return Purpose(None, ())
        return self._by_name.get(name) or Purpose(None, (name,))


def check_state_roles(precision: Precision, purposes: Sequence[Purpose], has_roles: bool) -> None:
    """Refuse keys of `state_roles` that mean nothing.

    Args:
        precision: What was asked for.
        purposes: Of all parameters.
        has_roles: Whether the optimizer was built from a model.

    Raises:
        ValueError: A glob matches no parameter, or a role is named and no roles are known.
    """
    names = [name for purpose in purposes for name in purpose.names]
    for key in precision.state_roles:
        if is_role(key) and not has_roles:
            raise ValueError(
                f"state_roles[{key!r}]: roles are known of models alone. Pass the model instead of its "
                "parameters, or select parameters by a glob over their names."
            )
        if is_role(key) or any(fnmatchcase(name, key) for name in names):
            continue
        close = difflib.get_close_matches(key, [*names, *map(str, Role)], n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ValueError(f"state_roles[{key!r}] is no role, and no glob that matches a parameter{hint}")


def summarize_state(
    precision: Precision, params: Sequence[Tensor], purposes: Sequence[Purpose], has_roles: bool
) -> str:
    """Count what is kept in 8 bits: `8-bit moments: 48 of 148 params, by role; the others bfloat16`.

    Args:
        precision: What was asked for.
        params: All parameters.
        purposes: What they are for.
        has_roles: Whether the optimizer was built from a model.
    """
    coded = sum(
        not precision.formats_of(p, *purpose).exp_avg.dtype.is_floating_point
        for p, purpose in zip(params, purposes, strict=True)
    )
    how = "by role" if has_roles else "every matrix by its shape alone"
    line = f"8-bit moments: {coded} of {len(params)} params, {how}; the others' are in floating point"
    if has_roles:
        return line
    return f"{line}. Pass the model instead of its parameters to leave out embeddings, norms and positions."


def warn_of_nearest(
    precision: Precision, groups: Sequence[Mapping[str, Any]], purposes: Sequence[Purpose], stacklevel: int
) -> None:
    """Warn where second moments in bfloat16 change by less than nearest rounding lets them.

    Args:
        precision: What was asked for.
        groups: The optimizer's `param_groups`.
        purposes: What all parameters are for.
        stacklevel: As `warnings.warn` in the caller would take it.
    """
    if not (precision.stochastic_rounding is None and any(map(_is_bfloat16, groups))):
        return
    beta2s = [round(float(group["betas"][1]), 6) for group in groups]  # float32 tensors hold .99000001
    pairs = [(beta2, p) for beta2, group in zip(beta2s, groups, strict=True) for p in group["params"]]
    beta2s = [
        beta2
        for (beta2, p), purpose in zip(pairs, purposes, strict=True)
        if beta2 > 0.99 and precision.is_nearest_by_default(p, *purpose)
    ]
    if beta2s:
        beta2 = max(beta2s)
        warnings.warn(
            f"the second moments of {len(beta2s)} bfloat16 params are kept in bfloat16 and rounded to "
            f"nearest, as in torch.optim.AdamW. With beta2={beta2:g} they change by up to {1 - beta2:.2g} of "
            "themselves per step, mostly less than half a unit in the last place: they stay too large where "
            "gradients fall. Pass state_dtype=torch.bfloat16, which rounds them stochastically, or "
            "state_dtype=torch.float32; stochastic_rounding=False is torch's rounding without this warning.",
            stacklevel=stacklevel + 1,
        )


def _is_bfloat16(group: Mapping[str, Any]) -> bool:
    return any(p.dtype == torch.bfloat16 for p in group["params"])
