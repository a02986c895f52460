"""From a tensor to its role, with the evidence: the strongest that applies, one after the other.

1. adapter: the tensor hangs in a PEFT adapter container.
2. type: the registry knows the owner's class (seen through parametrizations).
3. structure: the owner is unknown, but built like a norm, an activation or an embedding.
4. name: the local name of a raw parameter.
5. shape: a vector is a gain or a bias, something larger with no telling name is unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from .roles import ADAPTERS, NAMES, Role, roles_of_type
from .walk import Located, Place, class_of, words

Rule = Literal["override", "mark", "adapter", "type", "structure", "name", "shape", "default", "policy"]
Confidence = Literal["high", "medium", "low"]

_NORM_WORDS = frozenset({"norm", "normalization", "ln", "rms", "grn", "bn", "gn"})
_ACTIVATION = re.compile(r"(ReLU|GELU|SiLU|Swish|Mish|Snake|TLU|Act|Activation)(Beta|\d*d)?$")
_EMBEDDING_ENDS = frozenset({("embedding",), ("embeddings",), ("embed",)})
_POSITION_WORDS = frozenset({"pos", "position", "positional", "cpb", "peg", "rpe", "relpos"})
_TABLES = frozenset({Role.EMBEDDING, Role.POSITION, Role.QUERY, Role.TOKEN})


@dataclass(frozen=True)
class Finding:
    """A role, and why.

    Attributes:
        role: What the tensor is for.
        rule: Which kind of evidence decided.
        evidence: The evidence, as a clause for the report.
        confidence: `high`, `medium` or `low`.
        others: The roles that other places of a shared tensor speak for.
        places: What each place of a shared tensor speaks for, in words.
    """

    role: Role
    rule: Rule
    evidence: str
    confidence: Confidence
    others: frozenset[Role] = frozenset()
    places: str = ""


def identify(located: Located) -> Finding:
    """Find the role of a tensor from all its places.

    Args:
        located: The tensor.

    Returns:
        One finding. An embedding that is also the weight of a linear layer is a `TIED_EMBEDDING`; otherwise
        the first place decides, and the finding lists what the others speak for.
    """
    findings = [_identify_at(place, located) for place in located.places]
    first = findings[0]
    roles = {finding.role for finding in findings}
    if len(roles) == 1:
        return first
    places = ", ".join(
        f"{place.name} is {_article(str(finding.role))} {_say(finding.role)}"
        for place, finding in zip(located.places, findings, strict=True)
    )
    if roles <= _TABLES:  # one library's position is another's embedding: nothing to choose
        return first
    if roles <= {*_TABLES, Role.MATRIX}:
        return Finding(
            Role.TIED_EMBEDDING, first.rule, f"an embedding and a head share it ({places})", "high"
        )
    return replace(first, others=frozenset(roles - {first.role}), places=places)


def _identify_at(place: Place, located: Located) -> Finding:
    for find in (_by_adapter, _by_parametrization, _by_type, _by_structure, _by_name):
        finding = find(place, located)
        if finding is not None:
            return finding
    return _by_shape(place, located)


def _by_adapter(place: Place, located: Located) -> Finding | None:
    if place.local == "bias":
        return None
    for component in (place.local, *(component for component, _ in place.ancestors[:-4:-1])):
        if component in ADAPTERS:
            role = ADAPTERS[component]
            return Finding(role, "adapter", f"it belongs to the adapter {component}", "high")
    if any(component.startswith("trainable_tokens_") for component, _ in place.ancestors):
        return Finding(Role.EMBEDDING, "adapter", "it replaces rows of an embedding", "high")
    return None


def _by_parametrization(place: Place, located: Located) -> Finding | None:
    """Split weight norm into gain and direction, torch's parametrizations and the older hooks alike."""
    siblings = place.owner._parameters
    if place.parametrization is not None:
        kinds = {type(step).__name__ for step in place.parametrization}
        if "_WeightNorm" in kinds and place.part == "original0":
            return _weight_norm_gain(place)
        if "_Orthogonal" in kinds:
            return Finding(Role.ORTHOGONAL, "type", f"{_owner(place)} is made orthogonal from it", "high")
    elif place.local.endswith("_g") and f"{place.local[:-2]}_v" in siblings:
        return _weight_norm_gain(place)
    return None


def _weight_norm_gain(place: Place) -> Finding:
    return Finding(Role.WEIGHT_NORM_GAIN, "type", f"it is the weight-norm gain of {_owner(place)}", "high")


def _by_type(place: Place, located: Located) -> Finding | None:
    known = roles_of_type(class_of(place.owner))
    if known is None:
        return None
    base, roles = known
    local = _plain(place)
    role = next((role for glob, role in roles.items() if fnmatchcase(local, glob)), None)
    if role is None:
        return None
    if role is Role.NORM and getattr(place.owner, "zero_centered_gamma", False):
        role = Role.ZERO_CENTERED_NORM  # TransformerEngine's attribute
    if role is Role.EMBEDDING:
        role = _kind_of_table(place)
    if role in (Role.MATRIX, Role.CONVOLUTION):
        role = _kind_of_map(place, role)
    name = class_of(place.owner).__name__
    via = "" if name == base else f" (a {base})"
    return Finding(role, "type", f"{_owner(place)} is {_article(name)} {name}{via}", "high")


def _kind_of_table(place: Place) -> Role:
    """An embedding of positions, queries or special tokens says so in its class or attribute name."""
    attribute = place.owner_name.rpartition(".")[2]
    for name in (attribute, class_of(place.owner).__name__):
        rule = next((rule for rule in NAMES if rule.pattern.fullmatch("_".join(words(name)))), None)
        if rule is not None and rule.role in _TABLES:
            return rule.role
    return Role.EMBEDDING


def _kind_of_map(place: Place, role: Role) -> Role:
    """A matrix or convolution may be part of a state-space layer or of a network that makes positions."""
    depth = place.owner_name.count(".") + 1 if place.owner_name else 0
    near = place.ancestors[max(depth - 2, 1) : depth + 1]  # the owner, its parent and its grandparent
    parent = place.ancestors[depth - 1][1] if depth else place.owner
    if role is Role.CONVOLUTION and {"A_log", "A_logs", "A"} & set(parent._parameters):
        return Role.SSM_CONVOLUTION
    if any("patch" in words(class_of(module).__name__) for _, module in near):
        return role  # a patch embedding is often called pos_embed
    for component, module in near:
        if _POSITION_WORDS & {*words(component), *words(class_of(module).__name__)}:
            return Role.POSITION_NETWORK
    return role


def _by_structure(place: Place, located: Located) -> Finding | None:
    """A class we do not know, without parameterised children, named like a norm, activation or embedding."""
    owner = place.owner
    if isinstance(owner, (nn.Linear, nn.Embedding)) or _has_parameterised_children(owner):
        return None
    name = class_of(owner).__name__
    kinds = {
        word for cls in type(owner).__mro__ if cls.__module__ != "builtins" for word in words(cls.__name__)
    }
    kinds -= {"module"}
    local = set(words(place.local))
    is_norm = bool(_NORM_WORDS & kinds) or any(word.endswith("norm") for word in kinds)
    if is_norm and (
        located.is_vector or (_ends_as_norm(name) and local <= {"weight", "gamma", "scale", "g"})
    ):
        role = Role.BIAS if local & {"bias", "beta", "shift", "b"} else Role.NORM
        if role is Role.NORM and getattr(owner, "zero_centered_gamma", False):
            role = Role.ZERO_CENTERED_NORM
        clause = f"{_owner(place)} is {_article(name)} {name}, built like a norm"
        return Finding(role, "structure", clause, "high" if located.is_vector else "medium")
    if located.is_vector and _ACTIVATION.search(name):
        clause = f"{_owner(place)} is {_article(name)} {name}, built like an activation"
        role = Role.BIAS if "bias" in local else Role.ACTIVATION
        return Finding(role, "structure", clause, "high")
    if (
        words(name)[-1:] in _EMBEDDING_ENDS
        and place.local == "weight"
        and sum(n > 1 for n in located.shape) == 2
    ):
        clause = f"{_owner(place)} is {_article(name)} {name}, built like an embedding"
        return Finding(_kind_of_table(place), "structure", clause, "medium")
    return None


def _by_name(place: Place, located: Located) -> Finding | None:
    local = "_".join(words(_plain(place)))
    for rule in NAMES:
        if rule.vector_only and not located.is_vector:
            continue
        if rule.map_only and located.is_vector and len(located.shape) != 2:
            continue
        held = place.owner._parameters
        if (rule.beside and rule.beside not in held) or (rule.not_beside and rule.not_beside in held):
            continue
        if rule.pattern.fullmatch(local):
            clause = f"{place.local!r} is a usual name for {_article(str(rule.role))} {_say(rule.role)}"
            return Finding(rule.role, "name", clause, "medium")
    return None


def _by_shape(place: Place, located: Located) -> Finding:
    shape, kind = located.shape, f"no rule knows {place.local!r} of {class_of(place.owner).__name__}"
    if len(shape) <= 1:
        return Finding(Role.VECTOR, "shape", f"{kind}, and it has {len(shape)} dimensions", "medium")
    if located.is_vector and shape[0] == 1 and len(shape) > 2:
        return Finding(Role.VECTOR, "shape", f"{kind}, and its shape {shape} is a broadcast vector", "low")
    return Finding(Role.UNKNOWN, "default", f"{kind}, and its shape {shape} may be a matrix", "low")


def _plain(place: Place) -> str:
    """The local name without what the older hook-based weight norm and spectral norm append."""
    for suffix in ("_v", "_orig"):
        stem = place.local.removesuffix(suffix)
        partner = stem + {"_v": "_g", "_orig": "_u"}[suffix]
        if stem != place.local and (partner in place.owner._parameters or partner in place.owner._buffers):
            return stem
    return place.local


def _ends_as_norm(name: str) -> bool:
    last = words(name)[-1:]
    return bool(last) and (last[0] in _NORM_WORDS or last[0].endswith("norm"))


def _has_parameterised_children(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters())


def _owner(place: Place) -> str:
    return place.owner_name or "the model"


def _article(noun: str) -> str:
    return "an" if noun[:1].lower() in "aeiou" or noun[:2] in ("LN", "RM") else "a"


def _say(role: Role) -> str:
    return str(role).replace("_", " ")
