"""One pass over a model: every tensor once, with every place where it hangs.

A *place* is a name in the module tree. Two things stand between a name and the module that gives the
tensor its meaning, and this file sees through both: wrappers, which add a path component
(`_orig_mod`, `module`, ...), and holders, which stand between a module and its own tensor
(`ParametrizationList`, `ParameterList`, `ParameterDict`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

# Components that only a wrapper ever adds: torch.compile, FSDP1, torch's checkpoint_wrapper.
WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# `module` is also a fine name for a user's own attribute, so it is dropped only under these classes.
WRAPPERS_WITH_MODULE = frozenset(
    {
        "AveragedModel",  # torch.optim.swa_utils
        "DataParallel",
        "DeepSpeedEngine",
        "DistributedDataParallel",
        "Float16Module",  # Megatron-LM
        "FullyShardedDataParallel",
    }
)

# Holders keep tensors for the module above them and mean nothing by themselves.
HOLDERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor hangs.

    Attributes:
        name: Canonical name: the path without wrapper components.
        local: The tensor's name inside its owner, e.g. `weight`.
        owner: The module the tensor belongs to; holders and parametrizations are looked through.
        owner_name: Canonical path of the owner ("" is the model itself).
        ancestors: `(component, module)` from the model down to the module that holds the tensor,
            wrappers left out.
        parametrization: The list that produces the tensor, when the owner's tensor is parametrized.
        part: The tensor's name inside that list: `original`, `original0`, ...
    """

    name: str
    local: str
    owner: nn.Module
    owner_name: str
    ancestors: tuple[tuple[str, nn.Module], ...]
    parametrization: ParametrizationList | None = None
    part: str = ""


@dataclass(eq=False)
class Located:
    """A tensor and its places; the first one gives it its name, the others are aliases."""

    param: Tensor
    places: list[Place]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(place.name for place in self.places[1:])

    @property
    def is_vector(self) -> bool:
        """Whether at most one dimension is larger than one: a vector, however it is broadcast."""
        return sum(size != 1 for size in self.shape) <= 1


def walk(model: nn.Module) -> list[Located]:
    """List every parameter of `model` once, in the order of `model.named_parameters()`.

    Args:
        model: Any module, wrapped or not.

    Returns:
        One `Located` per tensor, frozen ones included; a tied tensor has several places.
    """
    found: dict[int, Located] = {}
    sharded = _shapes_before_fsdp1(model)
    for place, param in _places(model):
        if id(param) not in found:
            found[id(param)] = Located(param, [], sharded.get(id(param)) or _shape(param))
        found[id(param)].places.append(place)
    return list(found.values())


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


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, FSDP1, `torch.compile` and checkpoint wrappers."""
    while True:
        inner = next(
            (m for key, m in model._modules.items() if m is not None and _is_wrapping(model, key)), None
        )
        if inner is None:
            return model
        model = inner


def canonical(path: str) -> str:
    """Drop the components that only wrappers add from a name found outside a model.

    A leading `module.` is dropped too: it is what DDP writes into checkpoints.
    """
    parts = [part for part in path.split(".") if part not in WRAPPER_COMPONENTS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def class_of(module: nn.Module) -> type:
    """Return the class its author wrote: `fully_shard` and parametrize subclass it on the fly."""
    for cls in type(module).__mro__:
        if not cls.__module__.startswith(("torch.nn.utils.parametrize", "torch.distributed.fsdp")):
            return cls
    return type(module)


def tensors_of(group: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a parameter group, which may hold a single one instead of a list."""
    params = group["params"]
    return [params] if isinstance(params, Tensor) else list(params)


@lru_cache(maxsize=4096)
def words(name: str) -> tuple[str, ...]:
    """Split an identifier into lower-case words: `A_log`, `LayerNorm2d`, `pos_embed1` lose their numbers."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name))
    found = (re.sub(r"(?<=[a-z])\d+d?$|^\d+d?$", "", word) for word in name.lower().split("_"))
    return tuple(word for word in found if word)


def _shape(param: Tensor) -> tuple[int, ...]:
    if isinstance(param, UninitializedParameter):
        return ()
    # DeepSpeed ZeRO-3 empties the tensor and keeps its shape aside.
    return tuple(getattr(param, "ds_shape", param.shape))


def _shapes_before_fsdp1(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """FSDP1 with `use_orig_params=True` flattens every parameter; its flat parameter remembers the shapes."""
    shapes: dict[int, tuple[int, ...]] = {}
    for module in model.modules():
        flat = getattr(vars(module).get("_handle"), "flat_param", None)
        params, kept = getattr(flat, "_params", None), getattr(flat, "_shapes", None)
        if params and kept:
            shapes.update({id(p): tuple(shape) for p, shape in zip(params, kept, strict=False)})
    return shapes


def _is_wrapping(module: nn.Module, component: str) -> bool:
    if component in WRAPPER_COMPONENTS:
        return True
    return component == "module" and any(cls.__name__ in WRAPPERS_WITH_MODULE for cls in type(module).__mro__)


def _places(model: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """Walk the tree in pre-order. Shared modules are visited at every place, cycles once."""
    active: set[int] = set()

    def visit(module: nn.Module, path: tuple[tuple[str, nn.Module], ...]) -> Iterator[tuple[Place, Tensor]]:
        if id(module) in active:
            return
        active.add(id(module))
        for key, param in module._parameters.items():
            if param is not None:
                yield _place(key, path), param
        for key, child in module._modules.items():
            if child is None:
                continue
            if _is_wrapping(module, key):  # the wrapped module takes its wrapper's place in the path
                yield from visit(child, (*path[:-1], (path[-1][0], child)))
            else:
                yield from visit(child, (*path, (key, child)))
        active.discard(id(module))

    yield from visit(model, (("", model),))


def _place(key: str, path: tuple[tuple[str, nn.Module], ...]) -> Place:
    name = ".".join((*(component for component, _ in path[1:]), key))
    depth, local, part = len(path) - 1, key, ""
    parametrization = None
    holder = path[depth][1]
    # host -> ModuleDict "parametrizations" -> ParametrizationList "weight" -> "original"
    if isinstance(holder, ParametrizationList) and depth >= 2 and path[depth - 1][0] == "parametrizations":
        parametrization, part, local = holder, key, path[depth][0]
        depth -= 2
    while depth > 0 and isinstance(path[depth][1], HOLDERS):
        local = path[depth][0]
        depth -= 1
    return Place(
        name=name,
        local=local,
        owner=path[depth][1],
        owner_name=".".join(component for component, _ in path[1 : depth + 1]),
        ancestors=path,
        parametrization=parametrization,
        part=part,
    )


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
