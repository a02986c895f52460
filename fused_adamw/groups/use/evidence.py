"""From what a forward pass did with parameters to findings.

Use stands above names and shapes, and below adapters, types and structures that leave no doubt. Those it can
refine: a matrix that is the first on the input is an `INPUT`, one whose result is the output an `OUTPUT`, one
whose result `topk` chooses from a `ROUTER`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..findings import Finding, say_role
from ..places import Located
from ..roles import MAPS, TABLES, Role
from .kinds import Kind
from .labels import Uses

# What scales activations. The later say more: a gain whose sine is taken is a frequency.
_SCALES = frozenset({Kind.GAIN, Kind.TEMPERATURE, Kind.FREQUENCY, Kind.RECURRENCE, Kind.SPREAD})
_REFINED = frozenset({Role.MATRIX, Role.CONVOLUTION})


def with_use(located: Sequence[Located], findings: Mapping[int, Finding], uses: Uses) -> dict[int, Finding]:
    """Add what a forward pass showed to what types, names and shapes say.

    Args:
        located: The tensors.
        findings: What was found for each, by `id` of its `Located`.
        uses: What a forward pass did with them.

    Returns:
        The findings; contradictions are noted in `contradicted`.
    """
    return {id(item): _refine(_judge(item, findings[id(item)], uses), item, uses) for item in located}


def _judge(item: Located, found: Finding, uses: Uses) -> Finding:
    key = id(item.param)
    if key not in uses.reached:
        if found.confidence == "high":
            return found
        return replace(found, evidence=f"{found.evidence}; the example inputs do not reach it")
    kinds = uses.kinds.get(key, set())
    if Kind.TABLE in kinds and any(kind.is_map for kind in kinds):
        return _judge_tied(found)
    kind = _decisive(kinds, key in uses.ambiguous)
    if kind is None:
        return found
    if kind.is_map and found.role in TABLES and key not in uses.outputs | uses.layers:
        return found  # queries are multiplied with rows, relative positions say, as activations with maps
    agrees = kind.is_map == (found.role in MAPS)
    contradiction = f"{say_role(found.role)} by {found.rule}, {say_role(kind.value.role)} by use"
    if found.confidence == "high" or found.rule == "adapter":
        return found if agrees else replace(found, contradicted=contradiction)
    meaning, unsaid = kind.value, found.rule in ("shape", "default")
    if agrees and not unsaid:
        same = found.role is meaning.role
        words = meaning.words if same else meaning.words.partition(":")[0]
        return replace(found, evidence=f"{found.evidence} and {words}", confidence="high")
    return replace(
        found,
        role=meaning.role,
        rule="use",
        evidence=meaning.words if unsaid else f"{meaning.words}, although {found.evidence}",
        because=f"use: {meaning.short}",
        confidence="high",
        contradicted="" if unsaid else contradiction,
    )


def _judge_tied(found: Finding) -> Finding:
    """The input picks its rows, and activations are multiplied by it: an embedding that is also the head."""
    if found.role is not Role.EMBEDDING:
        return found
    evidence = f"{found.evidence}, and activations are also multiplied by it: a head shares it"
    return replace(found, role=Role.TIED_EMBEDDING, evidence=evidence, confidence="high")


def _decisive(kinds: set[Kind], ambiguous: bool) -> Kind | None:
    """The kind that says most, or None where the kinds contradict each other."""
    if ambiguous:
        kinds = kinds - {Kind.GAIN}
    maps = [kind for kind in Kind if kind in kinds and kind.is_map]
    others = [kind for kind in Kind if kind in kinds and not kind.is_map]
    if maps:
        return None if others else maps[0]
    rows = [kind for kind in others if kind not in _SCALES]
    return rows[0] if rows else (others[-1] if others else None)


def _refine(found: Finding, item: Located, uses: Uses) -> Finding:
    """Tell the ends of a model and its routers from other maps."""
    if found.role not in _REFINED:
        return found
    key = id(item.param)
    for role, keys, words in (
        (Role.OUTPUT, uses.outputs, "its result is the model's output"),
        (Role.ROUTER, uses.routers, "its result chooses or weighs experts"),
        (Role.INPUT, uses.first_maps, "it is the first map on an input"),
    ):
        if key in keys:
            return replace(found, role=role, base=found.role, evidence=f"{found.evidence} and {words}")
    return found
