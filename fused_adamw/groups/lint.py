"""What deserves a look, in a report and as one warning when groups are built."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from torch.fx import GraphModule

from .decide import Decision, Options
from .marks import mark_of_tensor
from .overrides import ParamGroupWarning
from .places import Located, tensors_of, words
from .policies import get_policy
from .roles import Role

MAX_GROUPS = 100
_NORMS = frozenset({Role.NORM, Role.ZERO_CENTERED_NORM})
_MAPS = frozenset({Role.MATRIX, Role.CONVOLUTION, Role.UNKNOWN, Role.ADAPTER_MATRIX})
_MAPS |= {Role.INPUT, Role.OUTPUT, Role.ROUTER}


@dataclass(frozen=True)
class Lint:
    """One remark.

    Attributes:
        code: Stable name of the check.
        level: `warning` if it is probably a mistake, `note` if it may be meant.
        message: What was seen.
        names: The parameters concerned.
        kinds: A kind for each name, by which a long list is sorted; empty: there is one.
    """

    code: str
    level: Literal["warning", "note"]
    message: str
    names: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`message: a, b and 3 more`, or the same for each kind: `message: unknown: a, b; vector: c`."""
        if len(set(self.kinds)) < 2:
            return f"{self.message}: {_shorten(self.names)}" if self.names else self.message
        pairs = list(zip(self.names, self.kinds, strict=True))
        lists = [
            f"{kind}: {_shorten([name for name, k in pairs if k == kind])}"
            for kind in dict.fromkeys(self.kinds)
        ]
        return f"{self.message}: {'; '.join(lists)}"


def _shorten(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def lint(decisions: Sequence[Decision], groups: Sequence[Mapping[str, Any]]) -> list[Lint]:
    """Run every check.

    Args:
        decisions: One per trainable tensor.
        groups: The groups in use; a trainable tensor that is in none of them is reported.

    Returns:
        The remarks, warnings first.
    """
    found = [remark for check in _CHECKS if (remark := check(decisions)) is not None]
    grouped = {id(p) for group in groups for p in tensors_of(group)}
    found += _decay_of_groups(decisions, groups)
    lost = tuple(d.name for d in decisions if id(d.param) not in grouped)
    if lost:
        found.append(Lint("not-in-a-group", "warning", "trainable, but in no group, so never updated", lost))
    if len(groups) >= MAX_GROUPS:
        message = f"{len(groups)} groups: many optimizers launch kernels per group; merge equal options"
        found.append(Lint("many-groups", "warning", message, ()))
    return sorted(found, key=lambda remark: remark.level != "warning")


def warn(decisions: Sequence[Decision], groups: Sequence[Mapping[str, Any]], options: Options) -> None:
    """Warn once, at construction, about what is probably a mistake.

    A policy copied from another tool is taken as meant, so only the number of groups is remarked on.
    """
    copied = get_policy(options.policy).rule is not None
    remarks = [
        r for r in lint(decisions, groups) if r.level == "warning" and (not copied or r.code == "many-groups")
    ]
    if remarks:
        text = "; ".join(map(str, remarks))
        warnings.warn(
            f"{text}. explain_param_groups(model) gives the reasons", ParamGroupWarning, stacklevel=4
        )


def _norm_decays(decisions: Sequence[Decision]) -> Lint | None:
    names = [d for d in decisions if d.decays and not d.chosen and (d.role in _NORMS or _sounds_like_norm(d))]
    return _remark("norm-decays", "warning", "a norm decays", names)


def _sounds_like_norm(d: Decision) -> bool:
    """Unrecognised, but its class or its own name speaks of a norm."""
    if d.role not in (Role.UNKNOWN, Role.VECTOR):
        return False
    return any(word.endswith("norm") for word in (*words(d.owner), *words(d.located.places[0].local)))


def _matrix_exempt(decisions: Sequence[Decision]) -> Lint | None:
    exempt = [d for d in decisions if not d.decays and d.role in _MAPS and d.options["weight_decay"] == 0]
    return _remark("matrix-exempt", "note", "a matrix or convolution does not decay", exempt)


def _lost_mark(decisions: Sequence[Decision]) -> Lint | None:
    """A tensor without a mark whose namesake in a module of the same class has one.

    `copy.deepcopy`, `load_state_dict(assign=True)`, `to_empty` and `fully_shard` drop attributes of tensors.
    """
    raw = [d for d in decisions if not d.located.places[0].owner.__module__.startswith("torch.")]
    marked = {_kind(d.located) for d in raw if mark_of_tensor(d.param)}
    lost = [d for d in raw if d.decays and _kind(d.located) in marked and not mark_of_tensor(d.param)]
    return _remark(
        "lost-mark", "warning", "decays, but the same tensor of a sibling carries _no_weight_decay", lost
    )


def _kind(located: Located) -> tuple[type, str]:
    return type(located.places[0].owner), located.places[0].local


def _aliases_disagree(decisions: Sequence[Decision]) -> Lint | None:
    split = [d for d in decisions if d.disputed]
    return _remark("aliases-disagree", "warning", "shared by modules that speak for different roles", split)


def _lost_types(decisions: Sequence[Decision]) -> Lint | None:
    """Decays for want of a type, as an embedding does once torch.jit or torch.export have rebuilt it."""
    lost = [d for d in decisions if d.decays and d.rule in ("name", "shape", "default") and _is_rebuilt(d)]
    message = "decays, as torch.jit or torch.export took its module's type; build groups from the original"
    return _remark("lost-types", "warning", message, lost)


def _is_rebuilt(d: Decision) -> bool:
    place = d.located.places[0]
    if type(place.owner) is nn.Module:  # what torch.export leaves of submodules
        return any(isinstance(module, GraphModule) for _, module in place.ancestors)
    return type(place.owner).__module__.startswith(("torch.jit.", "torch.export."))


def _low_confidence(decisions: Sequence[Decision]) -> Lint | None:
    low = [d for d in decisions if d.confidence == "low" and not d.disputed]
    remark = _remark("low-confidence", "warning", "not recognised, decided with low confidence", low)
    return None if remark is None else replace(remark, kinds=tuple(str(d.role) for d in low))


def _use_disagrees(decisions: Sequence[Decision]) -> Lint | None:
    """A role by type, structure or name, and another one by what the example inputs' forward pass does."""
    against = [d for d in decisions if d.contradicted and not d.chosen]
    kinds = tuple(d.contradicted for d in against)
    message = "used in another way than it looks like"
    if len(set(kinds)) == 1:
        message += f" ({kinds[0]})"
    remark = _remark("use-disagrees", "warning", message, against)
    return None if remark is None else replace(remark, kinds=kinds)


def _left_out_below(decisions: Sequence[Decision]) -> Lint | None:
    left = [d for d in decisions if d.located.left_out_by]
    message = "parameters() of a submodule leaves out what parameters() of the model yields"
    return _remark("left-out-below", "warning", message, left)


def _decay_of_groups(decisions: Sequence[Decision], groups: Iterable[Mapping[str, Any]]) -> list[Lint]:
    """Groups in use that decide otherwise: a load replaces their options by those of the checkpoint."""
    live = {id(p): float(group.get("weight_decay", 0.0)) for group in groups for p in tensors_of(group)}
    began = [d for d in decisions if not d.decays and live.get(id(d.param), 0.0) > 0]
    ceased = [d for d in decisions if d.options["weight_decay"] > 0 and live.get(id(d.param), 1.0) == 0]
    remarks = [
        _remark("decays-in-its-group", "warning", "exempt, but the group in use decays", began),
        _remark("exempt-in-its-group", "warning", "decays, but not in the group in use", ceased),
    ]
    return [remark for remark in remarks if remark is not None]


def _remark(
    code: str, level: Literal["warning", "note"], message: str, found: Iterable[Decision]
) -> Lint | None:
    names = tuple(d.name for d in found)
    return Lint(code, level, message, names) if names else None


_CHECKS: tuple[Callable[[Sequence[Decision]], Lint | None], ...] = (
    _norm_decays,
    _matrix_exempt,
    _lost_mark,
    _aliases_disagree,
    _lost_types,
    _left_out_below,
    _use_disagrees,
    _low_confidence,
)
