"""What the user asks for by hand: a selector, and a setting for everything it selects.

A selector is a glob over the canonical name, a compiled regular expression (searched in the name), a module
type (every parameter below a module of that type), a module of the model (every parameter below it) or a
predicate `(name, tensor) -> bool`. Aliases count.

A setting is a bool (decay or not), a number (this weight decay), or a mapping of options: `weight_decay`,
`weight_decay_scale`, `lr`, `lr_scale`, and any other group option of the optimizer, such as `betas`.
"""

from __future__ import annotations

import difflib
import math
import numbers
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor, nn

from .places import Located, class_of

Selector: TypeAlias = "str | re.Pattern[str] | type | nn.Module | Callable[[str, Tensor], bool]"
Setting: TypeAlias = "bool | float | Mapping[str, Any]"
Overrides: TypeAlias = "Mapping[Selector, Setting] | Sequence[tuple[Selector, Setting]]"

_RESERVED = frozenset({"params", "param_names"})
_NUMBERS = frozenset({"weight_decay", "weight_decay_scale", "lr_scale"})


class ParamGroupWarning(UserWarning):
    """Something about the parameter groups deserves a look."""


@dataclass(frozen=True)
class Override:
    """One override, checked and with its setting as options.

    Attributes:
        selector: What the user wrote.
        options: Option -> value; a bool for `weight_decay` means the default decay or none.
    """

    selector: Selector
    options: dict[str, Any]

    @cached_property
    def below(self) -> frozenset[int]:
        """Identities of the tensors below the module that is the selector, however deep it is shared."""
        modules = self.selector.modules() if isinstance(self.selector, nn.Module) else ()
        return frozenset(id(p) for module in modules for p in module._parameters.values() if p is not None)

    def matches(self, located: Located) -> bool:
        """Whether any place of the tensor is selected."""
        selector = self.selector
        if isinstance(selector, type):
            return any(isinstance(m, selector) for place in located.places for _, m in place.ancestors)
        if isinstance(selector, nn.Module):
            return id(located.param) in self.below
        names = [place.name for place in located.places]
        if isinstance(selector, str):
            return any(fnmatchcase(name, selector) for name in names)
        if isinstance(selector, re.Pattern):
            return any(selector.search(name) for name in names)
        return any(selector(name, located.param) for name in names)

    def __str__(self) -> str:
        if isinstance(self.selector, re.Pattern):
            return f"re:{self.selector.pattern}"
        if isinstance(self.selector, nn.Module):
            return f"this {class_of(self.selector).__name__}"
        return (
            self.selector
            if isinstance(self.selector, str)
            else getattr(self.selector, "__name__", repr(self.selector))
        )


def parse_overrides(overrides: Overrides | None, located: Iterable[Located]) -> list[Override]:
    """Check overrides against a model.

    Args:
        overrides: What the user passed.
        located: Every tensor of the model, frozen ones included.

    Returns:
        The overrides in the order given; later ones win where two set the same option.

    Raises:
        TypeError: If a selector or a setting has the wrong type.
        ValueError: If an override matches no parameter; the message suggests close names.
    """
    pairs = list(overrides.items() if isinstance(overrides, Mapping) else overrides or ())
    tensors = list(located)
    parsed = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(f"override {pair!r}: expected a pair (selector, setting)")
        selector, setting = pair
        if not (isinstance(selector, (str, re.Pattern, type)) or callable(selector)):
            raise TypeError(
                f"override {selector!r}: expected a glob, a compiled regular expression, a module type or "
                "instance, or a predicate (name, tensor) -> bool"
            )
        where = str(Override(selector, {})) if isinstance(selector, nn.Module) else selector
        override = Override(selector, parse_setting(setting, f"override {where!r}"))
        matched = [item for item in tensors if override.matches(item)]
        if not matched:
            raise ValueError(_no_match(override, tensors))
        if not any(item.param.requires_grad for item in matched):
            warnings.warn(
                f"override {str(override)!r} matches only frozen parameters, e.g. {matched[0].name!r}; it "
                "takes effect when they are unfrozen",
                ParamGroupWarning,
                stacklevel=2,
            )
        parsed.append(override)
    return parsed


def parse_setting(setting: Setting, where: str) -> dict[str, Any]:
    """Turn a setting into checked options.

    Args:
        setting: A bool, a number or a mapping of options.
        where: What it belongs to, for messages.

    Raises:
        TypeError: If the setting is none of these.
        ValueError: If a decay or scale is negative or not finite, or an option is reserved.
    """
    if not isinstance(setting, Mapping):
        if not _is_number(setting):
            raise TypeError(
                f"{where}: expected a bool, a weight decay or a mapping of options, got {setting!r}"
            )
        setting = {"weight_decay": setting}
    options = dict(setting)
    for option, value in setting.items():
        if option in _RESERVED:
            raise ValueError(f"{where}: {option!r} is written by the builder and cannot be set")
        if option in _NUMBERS:
            number = as_number(value, f"{where}: {option}")
            options[option] = bool(value) if _is_bool(value) else number
    return options


def as_number(value: Any, where: str) -> float:
    """Return a decay or scale as a float: a number of any kind, of NumPy or torch too.

    Args:
        value: The number.
        where: What it belongs to, for messages.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if not _is_number(value):
        raise TypeError(f"{where}: expected a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{where}: expected a finite number >= 0, got {value!r}")
    return number


def _is_number(value: Any) -> bool:
    if isinstance(value, numbers.Real):
        return True
    if not (hasattr(value, "dtype") and hasattr(value, "__float__")):
        return False
    sized = value.numel() if isinstance(value, Tensor) else getattr(value, "size", 1)  # NumPy's arrays
    return bool(sized == 1) and not str(value.dtype).removeprefix("torch.").startswith("complex")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _no_match(override: Override, tensors: Sequence[Located]) -> str:
    names = [place.name for item in tensors for place in item.places]
    message = f"override {str(override)!r} matches no parameter"
    if isinstance(override.selector, (str, re.Pattern)):
        wanted = str(override).removeprefix("re:")
        # Globs rarely look like a name as a whole, so the longest literal piece is compared too.
        literal = max(re.split(r"[*?\[\]^$\\()|+]", wanted), key=len).strip(".")
        close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
        close += [name for name in names if literal and literal.lower() in name.lower()]
        parts = sorted({part for name in names for part in name.split(".")})
        for part in literal.split("."):
            for near in difflib.get_close_matches(part, parts, n=1, cutoff=0.7):
                close += [name for name in names if near in name.split(".")]
        close = list(dict.fromkeys(close))[:3]
        if close:
            return f"{message}; did you mean {' or '.join(map(repr, close))}?"
    elif isinstance(override.selector, type):
        kinds = sorted({type(place.owner).__name__ for item in tensors for place in item.places})
        return f"{message}; the modules that own parameters are: {', '.join(kinds)}"
    return f"{message}; names look like {', '.join(map(repr, names[:3]))}"
