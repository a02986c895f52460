"""What scales the learning rate of each tensor: how deep it sits, its role, how wide its layer is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from .findings import Finding
from .fused import is_transposed
from .layers import layer_depths
from .overrides import as_number
from .places import Located
from .roles import MAPS, Role, as_role
from .walk import walk

_Options = Mapping[str, Any]


@dataclass(frozen=True)
class WidthScale:
    """Learning rates for a model that is wider than the one they were tuned on: muP for AdamW.

    With m = fan-in / fan-in of the base model, the learning rate of a hidden map is divided by m and its
    weight decay multiplied by m, so that their product is kept. Embeddings, the first map, biases, norms and
    other vectors stay as they are. Initialization and the scale of attention are the model's own affair.

    Args:
        base: The base model, also one on the meta device; or the fan-in of each of its maps by name.
        output: What becomes of the last map: "lr": it is scaled as hidden ones are; "multiplier": its
            learning rate stays, and the report says by what the model has to multiply its result. A tied head
            always takes a multiplier, as its learning rate is that of the embedding.
        eps: The optimizer's eps, to be divided by m for what is scaled; None: eps is left alone.

    Attributes:
        fan_in: The fan-ins by name: plain data, which no wrapper can lose.

    Raises:
        TypeError: `base` is neither, or a fan-in or `eps` is no number.
        ValueError: A fan-in is not positive, or `output` is unknown.
    """

    base: nn.Module | Mapping[str, int] = field(repr=False)
    output: Literal["lr", "multiplier"] = "lr"
    eps: float | None = None
    fan_in: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.output not in ("lr", "multiplier"):
            raise ValueError(f"WidthScale: output must be 'lr' or 'multiplier', got {self.output!r}")
        if self.eps is not None:
            as_number(self.eps, "WidthScale: eps")
        if isinstance(self.base, nn.Module):
            pairs = {item.name: float(fan_in(item)) for item in walk(self.base) if len(item.shape) > 1}
        elif isinstance(self.base, Mapping):
            pairs = {name: as_number(n, f"WidthScale: fan-in of {name}") for name, n in self.base.items()}
        else:
            raise TypeError(f"WidthScale: base must be a model or a mapping of fan-ins, got {self.base!r}")
        for name, n in pairs.items():
            if not n > 0:
                raise ValueError(f"WidthScale: fan-in of {name} must be > 0, got {n}")
        object.__setattr__(self, "fan_in", pairs)
        object.__setattr__(self, "base", pairs)  # the model is not kept


@dataclass(frozen=True)
class Scaling:
    """What scales one tensor's options.

    Attributes:
        layer: Its layer under layer-wise decay.
        lr: Factor on the learning rate.
        weight_decay: Factor on the default weight decay.
        options: Group options besides, weaker than any other.
        multiplier: What the model has to multiply the result of this map by.
        said: The width's share, in words.
    """

    layer: int | None = None
    lr: float = 1.0
    weight_decay: float = 1.0
    options: _Options = field(default_factory=dict)
    multiplier: float = 1.0
    said: str = ""


NONE = Scaling()


def scalings(
    model: nn.Module,
    located: Sequence[Located],
    findings: Mapping[int, Finding],
    layer_decay: float | None,
    lr_by_role: Mapping[Role | str, float] | str | None,
    width: WidthScale | None,
    lr: float | Tensor | None,
) -> dict[str, Scaling]:
    """Work out what scales each tensor.

    Args:
        model: The model.
        located: Its tensors.
        findings: What was found for each, by `id` of its `Located`.
        layer_decay: Factor per layer below the top.
        lr_by_role: Factors by role, or the name of a preset.
        width: How wide the model is.
        lr: The learning rate to be scaled.

    Returns:
        A `Scaling` by name; empty if nothing is scaled.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A factor is out of range, a role or preset unknown, or `width` lacks a fan-in.
    """
    given = {"layer_decay": layer_decay, "lr_by_role": lr_by_role, "width": width}
    scaling = next((name for name, value in given.items() if value is not None), None)
    if scaling is None:
        return {}
    depths = _layer_scales(model, located, findings, layer_decay)
    by_role = _by_role(lr_by_role, located, findings)
    if width is not None and not isinstance(width, WidthScale):
        raise TypeError(f"width: expected a WidthScale, got {type(width).__name__}")
    if lr is None and not isinstance(lr_by_role, str):
        raise ValueError(f"{scaling} scales a learning rate; expected lr=, got None")
    result = {}
    for item in located:
        found = findings[id(item)]
        layer, factor = depths.get(item.name, (None, 1.0))
        options = by_role.get(found.role) or by_role.get(found.base or found.role) or {}
        factor *= options.get("lr_scale", 1.0)
        rest = {key: value for key, value in options.items() if key != "lr_scale"}
        scaled = _by_width(item, found.role, width)
        result[item.name] = Scaling(
            layer,
            factor * scaled.lr,
            scaled.weight_decay,
            {**rest, **scaled.options},
            scaled.multiplier,
            scaled.said,
        )
    return result


def fan_in(item: Located) -> int:
    """The inputs of a map, over all places of a convolution's kernel."""
    shape, place = item.shape, item.places[0]
    if len(shape) < 2:
        return 1
    if hasattr(place.owner, "kernel_size"):
        inputs = shape[0] if getattr(place.owner, "transposed", False) else shape[1]
        return inputs * math.prod(shape[2:])
    return shape[-2] if is_transposed(place, shape) else shape[-1]


def _by_width(item: Located, role: Role, width: WidthScale | None) -> Scaling:
    is_output = role in (Role.OUTPUT, Role.TIED_EMBEDDING)
    if width is None or len(item.shape) < 2 or not (is_output or (role in MAPS and role is not Role.INPUT)):
        return NONE
    if item.name not in width.fan_in:
        raise ValueError(
            f"width: the base has no fan-in of {item.name!r}; expected a base model with the same names, or "
            "a mapping that lists every map"
        )
    m = fan_in(item) / width.fan_in[item.name]
    if m == 1:
        return NONE
    if role is Role.TIED_EMBEDDING or (is_output and width.output == "multiplier"):
        return Scaling(multiplier=1 / m, said=f"{m:g} × as wide: multiply its result by {1 / m:g}")
    options = {} if width.eps is None else {"eps": width.eps / m}
    said = f"{m:g} × as wide: lr / {m:g}, weight decay × {m:g}"
    return Scaling(lr=1 / m, weight_decay=m, options=options, said=said)


def _layer_scales(
    model: nn.Module, located: Sequence[Located], findings: Mapping[int, Finding], factor: float | None
) -> dict[str, tuple[int | None, float]]:
    """The layer of each tensor and the factor on its learning rate; empty without layer decay."""
    if factor is None:
        return {}
    number = as_number(factor, "layer_decay")
    if not 0 < number <= 1:
        raise ValueError(f"layer_decay: expected a factor in (0, 1], got {factor!r}")
    depths = layer_depths(model, located, {item.name: findings[id(item)].role for item in located})
    top = max(depths.values())
    return {name: (depth, number ** (top - depth)) for name, depth in depths.items()}


def _by_role(
    asked: Mapping[Role | str, float] | str | None,
    located: Sequence[Located],
    findings: Mapping[int, Finding],
) -> Mapping[Role, _Options]:
    """Group options by role; `lr_scale` for a factor."""
    if asked is None:
        return {}
    if isinstance(asked, str):
        if asked not in PRESETS:
            raise ValueError(f"lr_by_role={asked!r}: expected a mapping, or one of {', '.join(PRESETS)}")
        tables = (i for i in located if findings[id(i)].role in (Role.EMBEDDING, Role.TIED_EMBEDDING))
        table = next(tables, None)
        if table is None:
            raise ValueError(f"lr_by_role={asked!r} goes by the width of the token embedding; found none")
        return PRESETS[asked](table.shape[-1])
    if not isinstance(asked, Mapping):
        raise TypeError(f"lr_by_role: expected a mapping of roles to factors, got {asked!r}")
    return {as_role(role): {"lr_scale": as_number(x, f"lr_by_role[{role}]")} for role, x in asked.items()}


def _nanochat(width: int) -> Mapping[Role, _Options]:
    """nanochat/gpt.py, `setup_optimizers`: tuned at width 768."""
    scale = (width / 768) ** -0.5
    common = {"betas": (0.8, 0.95), "eps": 1e-10}
    return {
        Role.EMBEDDING: {"lr": 0.2 * scale, **common},
        Role.OUTPUT: {"lr": 0.004 * scale, **common},
    }


PRESETS: dict[str, Callable[[int], Mapping[Role, _Options]]] = {"nanochat": _nanochat}
