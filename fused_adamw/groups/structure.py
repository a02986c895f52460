"""Classes that no registry knows: built like a norm, an activation, an embedding or an ordinary layer."""

from __future__ import annotations

import re

from torch import nn

from .findings import Finding, say_owner, with_article
from .places import Located, Place, class_of, plain_name, shape_of, words
from .roles import Role

_NORM_WORDS = frozenset({"norm", "normalization", "ln", "rms", "grn", "bn", "gn"})
_LAYER_WORDS = frozenset({"linear", "conv", "dense", "fc", "patch", "proj", "projection"})
_REPARAMETRIZED = frozenset(
    {"weight", "spectral"}
)  # weight norm and spectral norm are no norms of activations
_GAIN_WORDS = frozenset({"weight", "gamma", "scale", "g"})
_BIAS_WORDS = frozenset({"bias", "beta", "shift", "b"})
_WEIGHT_WORDS = frozenset({"weight", "weights", "kernel", "w"})
_LAYER_ATTRIBUTES = (("in_features", "out_features"), ("in_channels", "out_channels"), ("kernel_size",))
_ACTIVATION = re.compile(r"(ReLU|GELU|SiLU|Swish|Mish|Snake|TLU|Act|Activation)(Beta|\d*d)?$")
_MAP_ENDS = frozenset({("linear",), ("bilinear",), ("conv",), ("tensor", "product")})
_ELEMENTWISE = frozenset(
    {"elementwise", "diagonal", "diag", "scale", "norm"}
)  # layers with a gain per channel
_FREQUENCY_ENDS = frozenset({"frequency", "frequencies", "freqs", "periodic"})
_EMBEDDING_ENDS = frozenset({"embedding", "embeddings", "embed"})


def by_structure(place: Place, located: Located) -> Finding | None:
    """Judge a tensor of an unknown class without parameterised children by what the class looks like.

    Args:
        place: Where the tensor hangs.
        located: The tensor.

    Returns:
        The finding, or None if the class looks like nothing in particular, or like a layer.
    """
    owner, local = place.owner, set(words(place.local))
    if isinstance(owner, (nn.Linear, nn.Embedding)) or _has_parameterised_children(owner):
        return None
    if local <= _WEIGHT_WORDS and _is_layer(owner, located):
        return None
    for find in (_norm, _activation, _embedding, _flat_map, _frequencies):
        found = find(place, located, local)
        if found is not None:
            return found
    return None


def _norm(place: Place, located: Located, local: set[str]) -> Finding | None:
    owner, name = place.owner, class_of(place.owner).__name__
    kinds = _class_words(owner)
    if not (_NORM_WORDS & kinds or any(word.endswith("norm") for word in kinds)):
        return None
    if not located.is_vector and not (_ends_as_norm(name) and local <= _GAIN_WORDS):
        return None
    role = Role.BIAS if local & _BIAS_WORDS else Role.NORM
    if role is Role.NORM and getattr(owner, "zero_centered_gamma", False):
        role = Role.ZERO_CENTERED_NORM
    clause = f"{say_owner(place)} is {with_article(name)}, built like a norm"
    if located.is_vector:
        return Finding(role, "structure", clause, "high", name)
    if local == {"weight"} and located.shape not in _shapes_of_biases(owner):
        return Finding(role, "structure", f"{clause}, but its shape may be a matrix", "low", name)
    return Finding(role, "structure", clause, "medium", name)


def _activation(place: Place, located: Located, local: set[str]) -> Finding | None:
    name = class_of(place.owner).__name__
    if not (located.is_vector and _ACTIVATION.search(name)):
        return None
    clause = f"{say_owner(place)} is {with_article(name)}, built like an activation"
    return Finding(Role.BIAS if "bias" in local else Role.ACTIVATION, "structure", clause, "high", name)


def _embedding(place: Place, located: Located, local: set[str]) -> Finding | None:
    name = class_of(place.owner).__name__
    if not (set(words(name)[-1:]) & _EMBEDDING_ENDS and place.local == "weight"):
        return None
    if sum(n > 1 for n in located.shape) != 2:
        return None
    clause = f"{say_owner(place)} is {with_article(name)}, built like an embedding"
    return Finding(Role.EMBEDDING, "structure", clause, "medium", name)


def _flat_map(place: Place, located: Located, local: set[str]) -> Finding | None:
    """The weight of a layer stored in a vector: the path matrices of an equivariant map, say."""
    name = class_of(place.owner).__name__
    kinds = words(name)
    if not (located.is_vector and located.shape and max(located.shape) > 1 and local <= _WEIGHT_WORDS):
        return None
    if (kinds[-1:] not in _MAP_ENDS and kinds[-2:] not in _MAP_ENDS) or set(kinds) & _ELEMENTWISE:
        return None
    clause = f"{say_owner(place)} is {with_article(name)}, built like a layer"
    return Finding(Role.MATRIX, "structure", clause, "medium", name)


def _frequencies(place: Place, located: Located, local: set[str]) -> Finding | None:
    """The weight of a class of frequencies: Fourier features, periodic activations."""
    name = class_of(place.owner).__name__
    if not (local <= _WEIGHT_WORDS and set(words(name)[-1:]) & _FREQUENCY_ENDS):
        return None
    clause = f"{say_owner(place)} is {with_article(name)}, built like a set of frequencies"
    return Finding(Role.FREQUENCY, "structure", clause, "medium", name)


def _is_layer(owner: nn.Module, located: Located) -> bool:
    """Whether a weight belongs to a linear layer or a convolution, whatever else its class is called."""
    shape = located.shape
    if len(shape) < 2:
        return False
    if any(len(bias) == 1 and bias[0] in (shape[0], shape[-1]) for bias in _shapes_of_biases(owner)):
        return True  # a norm's bias has the shape of its gain
    if any(all(hasattr(owner, name) for name in names) for names in _LAYER_ATTRIBUTES):
        return True
    if located.is_vector:
        return False
    return sum(n > 1 for n in shape) > 3 or bool((_LAYER_WORDS | _REPARAMETRIZED) & _class_words(owner))


def _shapes_of_biases(owner: nn.Module) -> list[tuple[int, ...]]:
    held = owner._parameters.items()
    return [shape_of(p) for key, p in held if p is not None and plain_name(key, owner) in ("bias", "b")]


def _class_words(owner: nn.Module) -> set[str]:
    classes = [cls for cls in type(owner).__mro__ if cls not in (object, nn.Module)]
    return {word for cls in classes for word in words(cls.__name__)} - {"module"}


def _ends_as_norm(name: str) -> bool:
    return any(word in _NORM_WORDS or word.endswith("norm") for word in words(name)[-1:])


def _has_parameterised_children(module: nn.Module) -> bool:
    """Whether a child has parameters of its own; what makes the module's own tensors is no child."""
    children = [child for name, child in module.named_children() if name != "parametrizations"]
    return any(p is not None for child in children for m in child.modules() for p in m._parameters.values())
