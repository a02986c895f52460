"""From roles to Muon: which parameters are hidden matrices, and the rest for AdamW.

Muon's authors leave the first and the last map, embeddings and vectors to AdamW. The roles tell them apart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from .build import group_decisions
from .decide import Decision, Options, decide
from .fused import is_transposed, splits
from .lint import Lint, warn
from .overrides import Overrides, ParamGroupWarning
from .roles import TABLES, Role

Implementation = Literal["torch", "dion", "timm", "keller"]
Convolutions = Literal["adamw", "flatten"]


class _Takes(NamedTuple):
    """What an implementation of Muon takes, and how it wants groups.

    Attributes:
        what: The class, in words.
        stacks: Whether it takes a batch of matrices.
        convolutions: The numbers of dimensions of convolutions that it flattens.
        muon: Keys for groups of matrices.
        flattened: Keys for groups of convolutions besides.
        adamw: Keys for the other groups.
        names: Whether groups may hold `param_names`.
    """

    what: str
    stacks: bool
    convolutions: tuple[int, ...]
    muon: Mapping[str, Any]
    flattened: Mapping[str, Any]
    adamw: Mapping[str, Any]
    names: bool = True


# torch 2.15, dion's muon.py, timm 1.0.31's muon.py, Keller Jordan's muon.py.
_TAKES: dict[str, _Takes] = {
    "torch": _Takes("torch.optim.Muon", False, (), {}, {}, {}),
    "dion": _Takes(
        "dion's Muon", True, (3, 4, 5), {"algorithm": "muon"}, {"flatten": True}, {"algorithm": "adamw"}
    ),
    "timm": _Takes("timm's Muon", False, (3, 4, 5), {"use_muon": True}, {}, {"use_fallback": True}),
    "keller": _Takes("Keller Jordan's Muon", True, (4,), {"use_muon": True}, {}, {"use_muon": False}, False),
}
_HIDDEN = frozenset({Role.MATRIX, Role.POSITION_NETWORK})
# Reasons by role; any other role is its own reason.
_WHY = {
    Role.INPUT: "the first map reads data",
    Role.OUTPUT: "the last map makes the output",
    Role.ROUTER: "a router chooses experts",
    Role.ADAPTER_MATRIX: "low-rank factors are not orthogonalized unless an override says so",
    Role.ORTHOGONAL: "it is made orthogonal already",
    Role.SSM_CONVOLUTION: "a state-space convolution works channel by channel",
    Role.UNKNOWN: "no rule recognises it",
}


@dataclass(frozen=True)
class MuonHint:
    """How a tensor holds its matrices, for implementations that use it.

    Attributes:
        fan_out: Outputs of one matrix.
        fan_in: Inputs of one matrix; of a flattened convolution those of all places of its kernel.
        batch: How many matrices a stack holds.
        is_transposed: Whether they are kept as (in, out).
        splits: Sizes along the outputs of the matrices fused in it, q, k and v say; empty: one matrix, or not
            known.
        is_flattened: Whether it is a convolution.
    """

    fan_out: int
    fan_in: int
    batch: int = 1
    is_transposed: bool = False
    splits: tuple[int, ...] = ()
    is_flattened: bool = False


@dataclass(frozen=True)
class MuonSplit:
    """The parameters of a model in two parts.

    Attributes:
        muon: Groups of hidden matrices.
        adamw: Groups of all other trainable parameters.
        hints: How each tensor of the Muon part holds its matrices, by name.
        reasons: Why each parameter is in its part, by name.
        decisions: What was decided for each parameter, by name: its role above all.
    """

    muon: list[dict[str, Any]]
    adamw: list[dict[str, Any]]
    hints: dict[str, MuonHint]
    reasons: dict[str, str] = field(repr=False)
    decisions: dict[str, Decision] = field(repr=False)

    def __str__(self) -> str:
        """`muon: 48 params, adamw: 100 params`."""
        counts = (sum(len(group["params"]) for group in groups) for groups in (self.muon, self.adamw))
        return "muon: {} params, adamw: {} params".format(*counts)


def split_parameters(
    model: nn.Module,
    *,
    convolutions: Convolutions = "adamw",
    for_: Implementation = "torch",
    weight_decay: float = 0.01,
    overrides: Overrides | None = None,
    example_inputs: Any = None,
) -> MuonSplit:
    """Split a model; `fused_adamw.split_for_muon` is this with a line in the log."""
    if for_ not in _TAKES:
        raise ValueError(f"for_={for_!r}: expected one of {', '.join(get_args(Implementation))}")
    if convolutions not in get_args(Convolutions):
        raise ValueError(f"convolutions={convolutions!r}: expected 'adamw' or 'flatten'")
    takes = _TAKES[for_]
    if convolutions == "flatten" and not takes.convolutions:
        raise ValueError(f"convolutions='flatten': {takes.what} takes matrices only; expected 'adamw'")
    options = Options(weight_decay, overrides=overrides, example_inputs=example_inputs)
    decisions = decide(model, options)
    parts: dict[bool, list[Decision]] = {True: [], False: []}
    hints: dict[str, MuonHint] = {}
    reasons: dict[str, str] = {}
    for d in decisions:
        asked = d.options.get("muon")
        reason = _against(d, takes, convolutions == "flatten", asked)
        if asked and reason is not None:
            raise ValueError(f"an override sends {d.name!r} to Muon, but {reason}")
        reasons[d.name] = reason or "a hidden matrix"
        rest = {key: value for key, value in d.options.items() if key != "muon"}
        keys = takes.adamw
        if reason is None:
            hints[d.name] = hint = _hint(d)
            keys = {**takes.muon, **(takes.flattened if hint.is_flattened else {})}
        parts[reason is None].append(replace(d, options={**rest, **keys}))
    muon, adamw = (group_decisions(parts[is_muon], None) for is_muon in (True, False))
    _check_partition(decisions, [*muon, *adamw])
    warn(decisions, [*muon, *adamw], options)
    _warn_of_routes(decisions, reasons, takes)
    if not takes.names:
        for group in (*muon, *adamw):
            del group["param_names"]
    return MuonSplit(muon, adamw, hints, reasons, {d.name: d for d in decisions})


def _against(d: Decision, takes: _Takes, flatten: bool, asked: Any) -> str | None:
    """Why a parameter does not go to Muon, or None if it does."""
    shape, role = d.located.shape, d.role
    if asked is not None and not asked:
        return "an override says so"
    is_convolution = role is Role.CONVOLUTION
    if not asked:
        if is_convolution and not flatten:
            return "convolutions are left to AdamW unless convolutions='flatten'"
        if role not in _HIDDEN and not is_convolution:
            return _WHY.get(role, f"its role is {role}")
    if d.param.is_complex():
        return "it is complex"
    if sum(n > 1 for n in shape) < 2 or (1 in shape[-2:] and not is_convolution):
        return f"a tensor of shape {shape} has no matrix to orthogonalize"
    if is_convolution:
        if shape[1] == 1 or getattr(d.located.places[0].owner, "groups", 1) == shape[0]:
            return "a depthwise convolution works channel by channel"
        if len(shape) not in takes.convolutions:
            return f"{takes.what} does not flatten a convolution of {len(shape)} dimensions"
    elif len(shape) > 2 and not (takes.stacks and len(shape) == 3):
        return f"{takes.what} takes no stack of matrices of shape {shape}"
    return None


def _hint(d: Decision) -> MuonHint:
    shape, place = d.located.shape, d.located.places[0]
    if d.role is Role.CONVOLUTION:
        transposed = bool(getattr(place.owner, "transposed", False))
        kernel = math.prod(shape[2:])
        fan_out, fan_in = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        return MuonHint(fan_out, fan_in * kernel, is_transposed=transposed, is_flattened=True)
    transposed = is_transposed(place, shape)
    fan_out, fan_in = reversed(shape[-2:]) if transposed else shape[-2:]
    batch = math.prod(shape[:-2])
    return MuonHint(fan_out, fan_in, batch, transposed, splits(place, fan_out, fan_in))


def _check_partition(decisions: Sequence[Decision], groups: Sequence[Mapping[str, Any]]) -> None:
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == {id(d.param) for d in decisions}, "a parameter is in no group"


def _warn_of_routes(decisions: Sequence[Decision], reasons: Mapping[str, str], takes: _Takes) -> None:
    """Warn of what may be meant for Muon and does not go there."""
    remarks = []
    unknown = tuple(
        d.name for d in decisions if d.role is Role.UNKNOWN and reasons[d.name] != "a hidden matrix"
    )
    if unknown:
        message = "left to AdamW as no rule recognises it; an override {'muon': True} sends it to Muon"
        remarks.append(Lint("muon-unknown", "warning", message, unknown))
    sizes = {d.name: math.prod(d.located.shape) for d in decisions if d.role not in _TABLES}
    to_muon = sum(n for name, n in sizes.items() if reasons[name] == "a hidden matrix")
    if 2 * to_muon < sum(sizes.values()):
        share = to_muon / sum(sizes.values())
        why = _main_reason(sizes, reasons)
        message = (
            f"only {share:.0%} of the values outside embeddings and heads go to Muon; most others: {why}"
        )
        remarks.append(Lint("muon-few", "warning", message, ()))
    if remarks:
        warnings.warn("; ".join(map(str, remarks)), ParamGroupWarning, stacklevel=4)


def _main_reason(sizes: Mapping[str, int], reasons: Mapping[str, str]) -> str:
    by_reason: dict[str, int] = {}
    for name, n in sizes.items():
        if reasons[name] != "a hidden matrix":
            by_reason[reasons[name]] = by_reason.get(reasons[name], 0) + n
    return max(by_reason, key=lambda reason: by_reason[reason])


_TABLES = TABLES | {Role.TIED_EMBEDDING, Role.OUTPUT}
