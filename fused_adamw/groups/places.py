"""Where tensors hang in a model.

A *place* is a name in the module tree. Two things stand between a name and the module that gives the
tensor its meaning, and this file sees through both: wrappers, which add a path component
(`_orig_mod`, `module`, ...), and holders, which stand between a module and its own tensor
(`ParametrizationList`, `ParameterList`, `ParameterDict`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

Path = tuple[tuple[str, nn.Module], ...]  # (component, module) from the model down

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

# Holders keep tensors for the module above them and mean nothing by themselves; their subclasses may.
HOLDERS = frozenset({nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict, nn.Sequential})

# A shared module is listed under this many paths at most: time grows with modules, not with paths.
MAX_PATHS = 64


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor hangs.

    Attributes:
        name: Canonical name: the path without wrapper components.
        held: `(name, module that holds it)` from the tensor's own name up to its name in the owner: several
            if lists or dicts of parameters stand between. What torch's utilities append is dropped.
        owner: The module the tensor belongs to; holders and parametrizations are looked through.
        owner_name: Canonical path of the owner ("" is the model itself).
        ancestors: `(component, module)` from the model down to the module that holds the tensor,
            wrappers left out.
        is_norm_of_weight: Whether weight norm split it off as the length of a weight.
        is_orthogonalized: Whether an orthogonal parametrization makes the weight from it.
    """

    name: str
    held: tuple[tuple[str, nn.Module], ...]
    owner: nn.Module
    owner_name: str
    ancestors: Path
    is_norm_of_weight: bool = False
    is_orthogonalized: bool = False

    @property
    def local(self) -> str:
        """The tensor's name inside its owner, e.g. `weight`."""
        return self.held[-1][0]


@dataclass(eq=False)
class Located:
    """A tensor and its places; the first one gives it its name, the others are aliases.

    Attributes:
        param: The tensor.
        places: Where it hangs.
        shape: Its shape before sharding.
        left_out_by: A submodule whose own `parameters()` does not yield it, though the model's does.
    """

    param: Tensor
    places: list[Place]
    shape: tuple[int, ...]
    left_out_by: str = ""

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


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, FSDP1, `torch.compile` and checkpoint wrappers."""
    while True:
        inner = next(
            (m for key, m in model._modules.items() if m is not None and is_wrapping(model, key)), None
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


def class_of(module: nn.Module) -> type[Any]:
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


def shape_of(param: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole tensor, `()` as long as it is lazy."""
    if isinstance(param, UninitializedParameter):
        return ()
    # DeepSpeed ZeRO-3 empties the tensor and keeps its shape aside.
    return tuple(getattr(param, "ds_shape", param.shape))


def shapes_before_fsdp1(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """FSDP1 with `use_orig_params=True` flattens every parameter; its flat parameter remembers the shapes."""
    shapes: dict[int, tuple[int, ...]] = {}
    for module in model.modules():
        flat = getattr(vars(module).get("_handle"), "flat_param", None)
        params, kept = getattr(flat, "_params", None), getattr(flat, "_shapes", None)
        if params and kept:
            shapes.update({id(p): tuple(shape) for p, shape in zip(params, kept, strict=False)})
    return shapes


def is_wrapping(module: nn.Module, component: str) -> bool:
    """Whether `component` of `module` is what a wrapper wraps."""
    if component in WRAPPER_COMPONENTS:
        return True
    return component == "module" and any(cls.__name__ in WRAPPERS_WITH_MODULE for cls in type(module).__mro__)


def places(model: nn.Module, path: Path | None = None) -> list[tuple[Place, Tensor]]:
    """List the tensors below a module with their places, in pre-order.

    Args:
        model: The module.
        path: How to get to it from the model, its own component last; None: it is the model.

    Returns:
        A pair per place. Shared modules are visited at `MAX_PATHS` places at most, cycles once.
    """
    found: list[tuple[Place, Tensor]] = []
    active: set[int] = set()
    visits: dict[int, int] = {}

    def visit(module: nn.Module, path: Path) -> None:
        if id(module) in active or visits.get(id(module), 0) == MAX_PATHS:
            return
        active.add(id(module))
        visits[id(module)] = visits.get(id(module), 0) + 1
        for key, param in module._parameters.items():
            if param is not None:
                found.append((place_of(key, path), param))
        for key, child in module._modules.items():
            if child is None:
                continue
            if is_wrapping(module, key):  # the wrapped module takes its wrapper's place in the path
                visit(child, (*path[:-1], (path[-1][0], child)))
            else:
                visit(child, (*path, (key, child)))
        active.discard(id(module))

    visit(model, path or (("", model),))
    return found


def place_of(key: str, path: Path) -> Place:
    """Describe the place of the tensor `key` of the last module of `path`."""
    depth = len(path) - 1
    holder = path[depth][1]
    name = plain_name(key, holder)
    is_norm, orthogonal = is_norm_of_weight(name, holder), False
    # host -> ModuleDict "parametrizations" -> ParametrizationList "weight" -> "original"
    if isinstance(holder, ParametrizationList) and depth >= 2 and path[depth - 1][0] == "parametrizations":
        steps = {type(step).__name__ for step in holder}
        is_norm = "_WeightNorm" in steps and name == "original0"
        orthogonal = "_Orthogonal" in steps
        name, holder = path[depth][0], path[depth - 2][1]
        depth -= 2
    held = [(name.removesuffix("_g") if is_norm else name, holder)]
    while depth > 0 and class_of(path[depth][1]) in HOLDERS:
        held.append((path[depth][0], path[depth - 1][1]))
        depth -= 1
    if depth > 0 and isinstance(path[depth][1], (nn.ParameterList, nn.ParameterDict)):
        held.append(
            (path[depth][0], path[depth - 1][1])
        )  # a subclass: its keys may say nothing, its name may
    return Place(
        name=".".join((*(component for component, _ in path[1:]), key)),
        held=tuple(held),
        owner=path[depth][1],
        owner_name=".".join(component for component, _ in path[1 : depth + 1]),
        ancestors=path,
        is_norm_of_weight=is_norm,
        is_orthogonalized=orthogonal,
    )


def plain_name(name: str, holder: nn.Module) -> str:
    """Drop what pruning, spectral norm and the older weight norm append to the name of a tensor."""
    stem = name.removesuffix("_orig")
    if stem != name and ({f"{stem}_mask", f"{stem}_u"} & set(holder._buffers)):
        return plain_name(stem, holder)
    stem = name.removesuffix("_v")
    if stem != name and is_norm_of_weight(f"{stem}_g", holder):
        return stem
    return name


def own_names(module: nn.Module) -> set[tuple[str, ...]]:
    """Names of the tensors that a module holds, directly or through holders, split into words."""
    names = {plain_name(key, module) for key, param in module._parameters.items() if param is not None}
    held = (nn.ParameterList, nn.ParameterDict)
    names |= {key for key, child in module._modules.items() if isinstance(child, held)}
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict):
        names |= set(parametrizations._modules)
    return {words(name) for name in names}


def is_norm_of_weight(name: str, holder: nn.Module) -> bool:
    """Whether `name` is the `weight_g` of a `weight_v`: a length per row, so never a matrix itself."""
    if not name.endswith("_g"):
        return False
    length, direction = (
        next((p for n in (key, f"{key}_orig") if (p := holder._parameters.get(n)) is not None), None)
        for key in (name, f"{name[:-2]}_v")
    )
    if length is None or direction is None or not name[:-2]:
        return False
    shape = shape_of(length)
    return sum(n != 1 for n in shape) <= 1 and length.dim() in (0, direction.dim())
