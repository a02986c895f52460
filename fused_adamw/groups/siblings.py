"""Siblings: tensors of one module and one shape whose names differ by one word should not be split.

`W_query` and `W_key`, `fan_in` and `fan_out` are the same kind of thing. Where only one of them has a telling
name, the others take its role; where their names contradict each other, all of them are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .findings import Finding, say_role
from .places import Located, words
from .roles import Role

# Words that say what a tensor is: siblings that differ by one of these differ in kind.
_KINDS = frozenset(
    {"weight", "weights", "w", "kernel", "matrix", "proj", "projection", "gate", "gates", "temperature"}
)
_KINDS |= {"bias", "biases", "b", "gain", "gamma", "beta", "scale", "shift", "norm"}
_KINDS |= {
    "embed",
    "embeds",
    "emb",
    "embedding",
    "embeddings",
    "token",
    "tokens",
    "pos",
    "position",
    "positions",
    "table",
}
_MAPS = frozenset({Role.MATRIX, Role.CONVOLUTION, Role.ADAPTER_MATRIX, Role.UNKNOWN})

_Family = tuple[int, tuple[int, ...], tuple[str, ...]]


def reconcile(located: Sequence[Located], findings: Mapping[int, Finding]) -> dict[int, Finding]:
    """Compare what was found for siblings.

    Args:
        located: The tensors.
        findings: What was found for each, by `id` of its `Located`.

    Returns:
        The findings, some replaced by less confident ones.
    """
    families: dict[_Family, list[Located]] = {}
    for item in located:
        if item.is_vector or findings[id(item)].rule not in ("name", "default"):
            continue
        name, holder = item.places[0].held[0]
        parts = words(name)
        for i in range(len(parts) if len(parts) > 1 else 0):
            if parts[i] not in _KINDS:
                families.setdefault((id(holder), item.shape, (*parts[:i], "*", *parts[i + 1 :])), []).append(
                    item
                )
    result = dict(findings)
    for family in families.values():
        if len(family) > 1:
            _reconcile_family(family, result)
    return result


def _reconcile_family(family: Sequence[Located], findings: dict[int, Finding]) -> None:
    roles = {findings[id(item)].role for item in family}
    known = roles - {Role.UNKNOWN}
    if not known or not roles - _MAPS or len(roles) == 1:
        return
    if len(known) == 1:
        (role,) = known
        told = next(item for item in family if findings[id(item)].role is role)
        for item in family:
            if findings[id(item)].role is Role.UNKNOWN:
                evidence = f"its sibling {told.name} of the same shape is {say_role(role)}"
                findings[id(item)] = replace(
                    findings[id(item)], role=role, rule="name", evidence=evidence, because="its sibling"
                )
    elif roles & _MAPS:
        for item in family:
            other = next(
                o for o in family if (findings[id(o)].role in _MAPS) != (findings[id(item)].role in _MAPS)
            )
            evidence = (
                f"{findings[id(item)].evidence}, but its sibling {other.name} of the same shape is "
                f"{say_role(findings[id(other)].role)}"
            )
            findings[id(item)] = replace(findings[id(item)], evidence=evidence, confidence="low")
