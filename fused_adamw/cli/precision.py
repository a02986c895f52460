"""How a model's tensors would be kept: the options for it, and a table with bytes and reasons."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from ..arguments import checked_precision
from ..groups import Decision
from ..groups.render import fold, name_of, shape_of
from ..state.precision import Kept, Precision, StateDtype
from ..state.purposes import Purpose, check_state_roles

_FORMATS: dict[str, StateDtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OPTIONS = ("dtype", "master_weights", "stochastic_rounding", "state_dtype", "state_role")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments about formats on `parser`: those of the optimizer, and the model's dtype."""
    about = parser.add_argument_group("formats", "as for FusedHygieneAdamW")
    about.add_argument("--dtype", choices=_DTYPES, help="convert the model's parameters first")
    about.add_argument("--master-weights", choices=["split"])
    about.add_argument("--stochastic-rounding", action=argparse.BooleanOptionalAction)
    about.add_argument("--state-dtype", choices=_FORMATS)
    about.add_argument(
        "--state-role",
        action="append",
        default=[],
        metavar="ROLE=FORMAT",
        help="a role, or a glob over names",
    )


def is_asked(args: argparse.Namespace) -> bool:
    """Whether any of the arguments was given."""
    return any(getattr(args, name) not in (None, []) for name in _OPTIONS)


def converted(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model in the dtype that was asked for."""
    return model if args.dtype is None else model.to(_DTYPES[args.dtype])


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The optimizer's arguments.

    Raises:
        ValueError: If a value of `--state-role` has no format.
    """
    roles = {}
    for text in args.state_role:
        key, _, value = text.rpartition("=")
        if not key or value not in _FORMATS:
            raise ValueError(f"--state-role {text!r}: expected ROLE=float32, ROLE=bfloat16 or ROLE=8bit")
        roles[key] = _FORMATS[value]
    return {
        "master_weights": args.master_weights,
        "stochastic_rounding": args.stochastic_rounding,
        "state_dtype": None if args.state_dtype is None else _FORMATS[args.state_dtype],
        "state_roles": roles or None,
    }


class KeptReport:
    """How each tensor of a model is kept.

    Args:
        decisions: One per tensor.
        options: From `options_of`.

    Raises:
        ValueError: If a format cannot be had.
    """

    def __init__(self, decisions: Sequence[Decision], options: dict[str, Any]) -> None:
        self._decisions = decisions
        self._precision: Precision = checked_precision(**options, seed=0)
        purposes = [Purpose(str(d.role), (d.name, *d.aliases)) for d in decisions]
        check_state_roles(self._precision, purposes, has_roles=True)
        self._purposes = {d.name: purpose for d, purpose in zip(decisions, purposes, strict=True)}

    def kept(self, d: Decision) -> Kept:
        """The formats of a tensor and its moments."""
        if (refusal := self._precision.refusal(d.param)) is not None:
            raise ValueError(f"parameter {d.name!r} {refusal}")
        return self._precision.formats_of(d.param, *self._purposes[d.name])

    def reason(self, d: Decision) -> str:
        """Why its moments are kept so."""
        return self._precision.reason(d.param, *self._purposes[d.name])

    def sentence(self, d: Decision) -> str:
        """`h.0.attn.weight is kept as float32 and its moments as root_signed and root_unsigned: ...`."""
        kept = self.kept(d)
        per_value = _per_value(self.nbytes([d]), [d])
        return (
            f"{d.name} is kept as {kept.param.name}, exp_avg as {kept.exp_avg.name} and exp_avg_sq as "
            f"{kept.exp_avg_sq.name}, in {per_value} bytes per value: {self.reason(d)}."
        )

    def nbytes(self, decisions: Sequence[Decision]) -> int:
        """Bytes of parameters and moments, without gradients."""
        return sum(format.nbytes(d.param.shape) for d in decisions for format in self.kept(d))

    def to_dict(self, d: Decision) -> dict[str, Any]:
        """The formats of one tensor as plain data."""
        names = {key: format.name for key, format in self.kept(d)._asdict().items()}
        return {**names, "bytes": self.nbytes([d]), "reason": self.reason(d)}

    def total(self) -> str:
        """One line: bytes in all and per value."""
        total = self.nbytes(self._decisions)
        return (
            f"parameters and moments: {total:,} bytes, {_per_value(total, self._decisions)} per value, "
            "without gradients"
        )

    def __rich__(self) -> Group:
        table = Table(box=SIMPLE_HEAD)
        for heading in ("parameter", "shape", "role", "kept as", "exp_avg", "exp_avg_sq"):
            table.add_column(heading, overflow="fold")
        table.add_column("bytes", justify="right", no_wrap=True)
        table.add_column("moments by", overflow="fold")
        for rows in fold(self._decisions, lambda d: (d.role, self.kept(d), self.reason(d))):
            first = rows[0]
            names = [format.name for format in self.kept(first)]
            per_value = _per_value(self.nbytes(rows), rows)
            table.add_row(
                name_of(rows), shape_of(rows), str(first.role), *names, per_value, self.reason(first)
            )
        return Group(table, Text(f"{self.total()} (the column bytes is per value)"))


def _per_value(nbytes: int, decisions: Sequence[Decision]) -> str:
    values = sum(d.param.numel() for d in decisions)
    return f"{nbytes / values:.4g}" if values else "–"
