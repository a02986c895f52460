"""What was found out about a tensor: a role, with the evidence for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .places import Place
from .roles import Role

Rule = Literal[
    "override", "mark", "adapter", "type", "structure", "use", "name", "shape", "default", "policy"
]
Confidence = Literal["high", "medium", "low"]


@dataclass(frozen=True)
class Finding:
    """A role, and why.

    Attributes:
        role: What the tensor is for.
        rule: Which kind of evidence decided.
        evidence: The evidence, as a clause for the report.
        confidence: `high`, `medium` or `low`.
        because: The evidence in a word or two, the same for all layers that repeat.
        others: The roles that other places of a shared tensor speak for.
        places: What each place of a shared tensor speaks for, in words.
        base: The role that this one refines, and whose settings it follows: an output is a matrix.
        contradicted: What its use in a forward pass says against the role, or the other way round, in words.
    """

    role: Role
    rule: Rule
    evidence: str
    confidence: Confidence
    because: str
    others: frozenset[Role] = frozenset()
    places: str = ""
    base: Role | None = None
    contradicted: str = ""


def say_owner(place: Place) -> str:
    """Name the owner of a tensor: its path, or "the model"."""
    return place.owner_name or "the model"


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun or a class name."""
    return f"{'an' if noun[:1].lower() in 'aeiou' or noun[:2] in ('LN', 'RM') else 'a'} {noun}"


def say_role(role: Role) -> str:
    """Name a role in a sentence: "a weight norm gain"."""
    return with_article(str(role).replace("_", " "))
