"""Which tensors make up a model: those that it yields itself, each once, with all its places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .places import Located, Place, is_wrapping, place_of, places, shape_of, shapes_before_fsdp1, unwrap


def walk(model: nn.Module) -> list[Located]:
    """List every parameter that `model.parameters()` yields, once and in that order.

    Args:
        model: Any module, wrapped or not. If it overrides `parameters()` or `named_parameters()`, its word
            counts: what it does not yield is left out, what only it knows is found in its plain attributes.

    Returns:
        One `Located` per tensor, frozen ones included; a tied tensor has several places.
    """
    sharded = shapes_before_fsdp1(model)
    found: dict[int, Located] = {}
    for place, param in places(model):
        _add(found, place, param, sharded)
    inner = unwrap(model)
    kept = _yielded_through_wrappers(model, inner, found)
    for place, param in _unregistered(inner, [param for param in kept if id(param) not in found]):
        _add(found, place, param, sharded)
    result = [found[id(param)] for param in kept]
    _note_what_submodules_leave_out(model, inner, result)
    return result


def _add(
    found: dict[int, Located], place: Place, param: Tensor, sharded: Mapping[int, tuple[int, ...]]
) -> None:
    if id(param) not in found:
        found[id(param)] = Located(param, [], sharded.get(id(param)) or shape_of(param))
    found[id(param)].places.append(place)


def _yielded_through_wrappers(
    model: nn.Module, inner: nn.Module, found: Mapping[int, Located]
) -> list[Tensor]:
    """What the wrapped model yields, without what a wrapper of it leaves out."""
    kept: list[Tensor] = list({id(param): param for param in inner.parameters()}.values())
    while model is not inner:
        outer = {id(param) for param in model.parameters()}
        kept = [param for param in kept if id(param) in outer or id(param) not in found]
        model = next(m for key, m in model._modules.items() if m is not None and is_wrapping(model, key))
    return kept


def _unregistered(inner: nn.Module, missing: list[Tensor]) -> list[tuple[Place, Tensor]]:
    """Places of tensors that a model yields from plain attributes, lists of modules say, or from nowhere."""
    if not missing:
        return []
    wanted = {id(param) for param in missing}
    found = [
        (place, param)
        for attribute, value in vars(inner).items()
        if attribute not in ("_parameters", "_modules", "_buffers")
        for place, param in _places_in(inner, attribute, value)
        if id(param) in wanted
    ]
    wanted -= {id(param) for _, param in found}
    names = {id(param): name for name, param in inner.named_parameters()}
    for i, param in enumerate(missing):
        if id(param) in wanted:
            name = names.get(id(param), f"parameters.{i}")
            found.append((replace(place_of(name.rpartition(".")[2], (("", inner),)), name=name), param))
    return found


def _places_in(inner: nn.Module, attribute: str, value: Any) -> Iterator[tuple[Place, Tensor]]:
    root = ("", inner)
    if isinstance(value, nn.Module):
        yield from places(value, (root, (attribute, value)))
    elif isinstance(value, nn.Parameter):
        yield place_of(attribute, (root,)), value
    elif isinstance(value, (list, tuple, dict)):
        holder = nn.ModuleList()  # stands for the container, which says as little
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, nn.Module):
                yield from places(item, (root, (attribute, holder), (str(key), item)))
            elif isinstance(item, nn.Parameter):
                yield place_of(str(key), (root, (attribute, holder))), item


def _note_what_submodules_leave_out(model: nn.Module, inner: nn.Module, result: list[Located]) -> None:
    said: dict[int, set[int] | None] = {id(model): None, id(inner): None}
    for item in result:
        for place in item.places:
            for depth, (_, module) in enumerate(place.ancestors):
                if id(module) not in said:
                    said[id(module)] = _yielded_by_own_word(module)
                kept = said[id(module)]
                if kept is not None and id(item.param) not in kept:
                    item.left_out_by = ".".join(component for component, _ in place.ancestors[1 : depth + 1])


def _yielded_by_own_word(module: nn.Module) -> set[int] | None:
    """Identities of what a module yields by a `parameters()` of its own; None if it has none."""
    if not _overrides_parameters(module):
        return None
    try:
        return {id(param) for param in module.parameters()}
    except Exception:  # it needs arguments, or yields no tensors: it says nothing here
        return None


def _overrides_parameters(module: nn.Module) -> bool:
    for method in ("parameters", "named_parameters"):
        owner = next(cls for cls in type(module).__mro__ if method in vars(cls))
        if method in vars(module) or not owner.__module__.startswith("torch."):
            return True
    return False


def is_model(params: object) -> bool:
    """Whether an optimizer's first argument is a model, and not a module that torch takes for tensors.

    `nn.ParameterList` is an iterable of tensors to `torch.optim`, like any module that iterates over tensors
    or group dicts; an `nn.ParameterDict` iterates over names, which torch refuses.
    """
    if not isinstance(params, nn.Module):
        return False
    if isinstance(params, (nn.ParameterList, nn.ParameterDict)):
        return False
    if not callable(getattr(type(params), "__iter__", None)):
        return True
    first = next(iter(params), None)  # type: ignore[call-overload]
    return not isinstance(first, (Tensor, dict, tuple))


def trainable(located: list[Located]) -> list[Located]:
    """Keep the tensors that an optimizer may step, and refuse those that it could not step correctly.

    Args:
        located: What `walk` returned.

    Returns:
        The tensors that require a gradient.

    Raises:
        TypeError: If a trainable tensor is neither floating point nor complex.
        ValueError: If a tensor is an FSDP `FlatParameter` or a lazy parameter without a shape yet.
    """
    kept = []
    for item in located:
        kind = type(item.param).__name__
        if kind == "FlatParameter" or getattr(item.param, "_is_flat_param", False):
            raise ValueError(
                f"parameter {item.name!r} is an FSDP FlatParameter: weights, norms and biases flattened into "
                "one vector, so no rule can tell which values should decay. Wrap the model with "
                "FullyShardedDataParallel(..., use_orig_params=True) or fully_shard(), or build the "
                "groups before wrapping."
            )
        if not item.param.requires_grad:
            continue
        if isinstance(item.param, UninitializedParameter):
            raise ValueError(
                f"parameter {item.name!r} is lazy and has no shape yet; expected an initialized tensor. Run "
                "one forward pass before building the groups."
            )
        if not (item.param.dtype.is_floating_point or item.param.dtype.is_complex):
            raise TypeError(
                f"parameter {item.name!r} requires a gradient but has dtype {item.param.dtype}; expected "
                "a floating-point or complex dtype. Freeze it with requires_grad_(False)."
            )
        kept.append(item)
    return kept
