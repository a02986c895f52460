"""From tensors to their roles, with the evidence: the strongest that applies, one after the other.

1. adapter: the tensor hangs in an adapter's container.
2. type: the registry knows the owner's class (seen through parametrizations).
3. structure: the owner is unknown, but built like a norm, an activation or an embedding.
4. name: the local name of a raw parameter, and those of its siblings.
5. shape: a vector is a gain or a bias, something larger with no telling name is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from .findings import Confidence, Finding, say_owner, say_role, with_article
from .places import Located, Place, class_of, own_names, shape_of, words
from .roles import ADAPTERS, EXACT, NAMES, TABLES, NameRule, Role, roles_of_type
from .siblings import reconcile
from .structure import by_structure

_POSITION_WORDS = frozenset({"pos", "position", "positional", "cpb", "peg", "rpe", "relpos"})
_LAYERS = frozenset({Role.MATRIX, Role.CONVOLUTION, Role.SSM_CONVOLUTION, Role.POSITION_NETWORK})

_ALONE = [
    rule for rule in NAMES if not (rule.beside or rule.map_only or rule.vector_only)
]  # those that a module's name may match


def identify(located: Sequence[Located]) -> dict[int, Finding]:
    """Find the role of every tensor from all its places.

    Args:
        located: The tensors of a model.

    Returns:
        A finding per tensor, by `id` of its `Located`. An embedding that is also the weight of a linear layer
        is a `TIED_EMBEDDING`; otherwise the first place decides, and the finding lists what the others speak
        for.
    """
    reader = _Reader()
    return reconcile(located, {id(item): reader.judge(item) for item in located})


class _Reader:
    """Judges tensors one by one; remembers the names that each module holds."""

    def __init__(self) -> None:
        self._names: dict[int, set[tuple[str, ...]]] = {}

    def judge(self, located: Located) -> Finding:
        judged = [(place, self._judge_at(place, located)) for place in located.places]
        # A place where only the shape speaks says nothing against one that says more.
        telling = [(p, f) for p, f in judged if f.rule not in ("shape", "default")] or judged
        first = telling[0][1]
        roles = {finding.role for _, finding in telling}
        if len(roles) == 1:
            return first
        places = ", ".join(f"{place.name} is {say_role(finding.role)}" for place, finding in telling)
        if roles <= TABLES:  # one library's position is another's embedding: nothing to choose
            return first
        if roles <= {*TABLES, Role.MATRIX}:
            evidence = f"an embedding and a head share it ({places})"
            return replace(first, role=Role.TIED_EMBEDDING, evidence=evidence, confidence="high")
        return replace(first, others=frozenset(roles - {first.role}), places=places)

    def _judge_at(self, place: Place, located: Located) -> Finding:
        if place.is_norm_of_weight:
            evidence = f"it is the weight-norm gain of {say_owner(place)}"
            return Finding(Role.WEIGHT_NORM_GAIN, "type", evidence, "high", class_of(place.owner).__name__)
        found = self._judge_as_if_plain(place, located)
        if place.is_orthogonalized and found.role in {*_LAYERS, Role.UNKNOWN}:
            evidence = f"{say_owner(place)} is made orthogonal from it"
            return replace(found, role=Role.ORTHOGONAL, rule="type", evidence=evidence, confidence="high")
        return found

    def _judge_as_if_plain(self, place: Place, located: Located) -> Finding:
        for find in (self._by_adapter, _by_type, _by_structure, self._by_name):
            finding = find(place, located)
            if finding is not None:
                return finding
        return _by_shape(place, located)

    def _by_adapter(self, place: Place, located: Located) -> Finding | None:
        if place.local == "bias":
            return None
        near = place.ancestors[:-4:-1]
        for component in (*(name for name, _ in place.held), *(component for component, _ in near)):
            if component in ADAPTERS:
                return _adapter(ADAPTERS[component], component, "high")
        if any(component.startswith("trainable_tokens_") for component, _ in place.ancestors):
            return _adapter(Role.EMBEDDING, "trainable_tokens", "high")
        listed = _listed_adapter(place)
        return self._of_listed_adapter(listed, place, located) if listed else None

    def _of_listed_adapter(self, component: str, place: Place, located: Located) -> Finding | None:
        """Decide by type, name and number of dimensions what a tensor of an unknown adapter is."""
        typed = _by_type(place, located)
        if typed is not None and typed.role not in _LAYERS:
            return None
        named = None if typed else self._by_name(place, located)
        if named is not None and named.role is Role.BIAS:
            return None
        is_gain = len(located.shape) < 2 or (named is not None and named.role is Role.GAIN)
        return _adapter(Role.ADAPTER_GAIN if is_gain else Role.ADAPTER_MATRIX, component, "medium")

    def _by_name(self, place: Place, located: Located) -> Finding | None:
        for name, holder in place.held:  # the innermost name that says something
            role, confidence = EXACT.get(name), "medium"
            if role is None and not name.isdigit():
                rule = next((rule for rule in NAMES if self._applies(rule, name, holder, located)), None)
                role, confidence = (rule.role, rule.confidence) if rule else (None, "")
            if role is not None:
                clause = f"{name!r} is a usual name for {say_role(role)}"
                return Finding(
                    role, "name", clause, "low" if confidence == "low" else "medium", f"name {name}"
                )
        return None

    def _applies(self, rule: NameRule, name: str, holder: nn.Module, located: Located) -> bool:
        if rule.vector_only and not located.is_vector:
            return False
        if rule.map_only and located.is_vector and len(located.shape) != 2:
            return False
        parts = words(name)
        if not rule.pattern.fullmatch("_".join(parts)):
            return False
        if rule.biased and not _has_bias(name, holder, located):
            return False
        return rule.beside is None or self._holds(holder, parts, *rule.beside)

    def _holds(self, holder: nn.Module, parts: tuple[str, ...], word: str, others: tuple[str, ...]) -> bool:
        """Whether `holder` has a tensor called like this one, but with another word in place of `word`."""
        if id(holder) not in self._names:
            self._names[id(holder)] = own_names(holder)
        return any(
            (*parts[:i], *other.split("_"), *parts[i + 1 :]) in self._names[id(holder)]
            for i, part in enumerate(parts)
            if part == word
            for other in others
        )


def _has_bias(name: str, holder: nn.Module, located: Located) -> bool:
    """Whether `holder` has a `<name>_bias`, a vector as long as one end of the tensor."""
    bias = next((p for key, p in holder._parameters.items() if key == f"{name}_bias"), None)
    if bias is None or located.is_vector:
        return False
    return len(shape_of(bias)) == 1 and shape_of(bias)[0] in (located.shape[0], located.shape[-1])


def _adapter(role: Role, component: str, confidence: Confidence) -> Finding:
    is_rows = role is Role.EMBEDDING
    evidence = "it replaces rows of an embedding" if is_rows else f"it belongs to the adapter {component}"
    return Finding(role, "adapter", evidence, confidence, f"adapter {component}")


def _listed_adapter(place: Place) -> str | None:
    """The entry of PEFT's `adapter_layer_names` of a module above that leads to the tensor."""
    path = place.name.split(".")
    for depth, (_, module) in list(enumerate(place.ancestors))[:-5:-1]:
        listed = vars(module).get("adapter_layer_names", getattr(type(module), "adapter_layer_names", None))
        if isinstance(listed, (tuple, list)) and path[depth] in listed:
            return path[depth]
    return None


def _by_type(place: Place, located: Located) -> Finding | None:
    known = roles_of_type(class_of(place.owner))
    if known is None:
        return None
    base, roles = known
    role = next((role for glob, role in roles.items() if fnmatchcase(place.local, glob)), None)
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
    return Finding(role, "type", f"{say_owner(place)} is {with_article(name)}{via}", "high", name)


def _by_structure(place: Place, located: Located) -> Finding | None:
    found = by_structure(place, located)
    if found is not None and found.role is Role.EMBEDDING:
        return replace(found, role=_kind_of_table(place))
    return found


def _kind_of_table(place: Place) -> Role:
    """An embedding of positions, queries or special tokens says so in its class or attribute name."""
    attribute = place.owner_name.rpartition(".")[2]
    for name in (attribute, class_of(place.owner).__name__):
        local = "_".join(words(name))
        if local in ("token", "tokens"):  # a table of all of them
            return Role.EMBEDDING
        rule = next((rule for rule in _ALONE if rule.pattern.fullmatch(local)), None)
        if rule is not None and rule.role in TABLES:
            return rule.role
    return Role.EMBEDDING


def _kind_of_map(place: Place, role: Role) -> Role:
    """A matrix or convolution may be part of a state-space layer or of a network that makes positions."""
    depth = place.owner_name.count(".") + 1 if place.owner_name else 0
    near = place.ancestors[max(depth - 2, 1) : depth + 1]  # the owner, its parent and its grandparent
    parent = place.ancestors[depth - 1][1] if depth else place.owner
    if role is Role.CONVOLUTION and {("a", "log"), ("a", "logs"), ("a",)} & own_names(parent):
        return Role.SSM_CONVOLUTION
    if any("patch" in words(class_of(module).__name__) for _, module in near):
        return role  # a patch embedding is often called pos_embed
    for component, module in near:
        if _POSITION_WORDS & {*words(component), *words(class_of(module).__name__)}:
            return Role.POSITION_NETWORK
    return role


def _by_shape(place: Place, located: Located) -> Finding:
    shape, name = located.shape, next((n for n, _ in place.held if not n.isdigit()), place.local)
    kind = f"no rule knows {name!r} of {class_of(place.owner).__name__}"
    if len(shape) <= 1:
        evidence = f"{kind}, and it has {len(shape)} dimensions"
        return Finding(Role.VECTOR, "shape", evidence, "medium", f"shape {name}")
    if located.is_vector:
        # One row or column may also be a matrix with one output.
        confidence: Confidence = "low" if len(shape) == 2 and max(shape) > 1 else "medium"
        evidence = f"{kind}, and only one dimension of its shape {shape} is larger than one"
        return Finding(Role.VECTOR, "shape", evidence, confidence, f"shape {name}")
    if len(shape) == 3 and shape[0] == 1:
        evidence = f"{kind}, and the first dimension of its shape {shape} waits for a batch: learned rows"
        return Finding(Role.QUERY, "shape", evidence, "low", f"shape {name}")
    evidence = f"{kind}, and its shape {shape} may be a matrix"
    return Finding(Role.UNKNOWN, "default", evidence, "low", f"default {name}")
