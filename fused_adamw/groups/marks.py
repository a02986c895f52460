"""What the author of a model already said: marks on tensors and hooks of modules.

* `param._no_weight_decay = True` (Mamba, S4, flash-attention): no decay.
* `param._optim = {...}` (S4): group options for this tensor; `weight_decay: 0.0` means no decay.
* `module.no_weight_decay()` (timm, Swin): names or globs, relative to that module.
* `module.no_weight_decay_patterns()` (open_clip): globs, relative to that module.
* `module.no_weight_decay_keywords()` (Swin): whole path components below that module.

The hooks may also be properties or plain collections. timm and DeiT call the hooks of the outermost module
only. Here a hook counts at any depth, and speaks only for the parameters below the module that declares it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .places import Located, Place, canonical, class_of

HOOKS = ("no_weight_decay", "no_weight_decay_patterns", "no_weight_decay_keywords")


@dataclass(frozen=True)
class Mark:
    """What a mark or a hook asks for.

    Attributes:
        options: Group options; `weight_decay: 0.0` for a plain "no decay".
        evidence: Where it was found, for the report.
        because: The same in a few words.
    """

    options: dict[str, Any]
    evidence: str
    because: str


class Marks:
    """Reads the marks and hooks of a model; hooks are called once per module."""

    def __init__(self) -> None:
        self._hooks: dict[int, list[tuple[str, Collection[str]]]] = {}

    def find(self, located: Located) -> Mark | None:
        """Return what the model's author asked for `located`, or None."""
        mark = mark_of_tensor(located.param)
        if mark is not None:
            return mark
        for place in located.places:
            mark = self._mark_of_hooks(place)
            if mark is not None:
                return mark
        return None

    def _mark_of_hooks(self, place: Place) -> Mark | None:
        components = [component for component, _ in place.ancestors[1:]]
        for depth, (_, module) in enumerate(place.ancestors):
            for hook, entries in self._hooks_of(module, ".".join(components[:depth])):
                relative = place.name.split(".")[depth:]
                matches = _has_keyword if hook == "no_weight_decay_keywords" else _has_name
                entry = next((entry for entry in entries if matches(relative, entry)), None)
                if entry is not None:
                    where = ".".join(components[:depth]) or "the model"
                    said = f"{class_of(module).__name__}.{hook}()"
                    source = f"{said} of {where} lists {entry!r}"
                    return Mark({"weight_decay": 0.0}, source, f"{said} lists it")
        return None

    def _hooks_of(self, module: nn.Module, name: str) -> list[tuple[str, Collection[str]]]:
        if id(module) not in self._hooks:
            self._hooks[id(module)] = [
                (hook, entries) for hook in HOOKS if (entries := call_hook(module, hook, name)) is not None
            ]
        return self._hooks[id(module)]


def mark_of_tensor(param: Tensor) -> Mark | None:
    """Read `_optim` and `_no_weight_decay` of one tensor."""
    options = getattr(param, "_optim", None)
    if isinstance(options, dict) and options:
        said = f"the tensor carries _optim={options!r}"
        return Mark(dict(options), said, said)
    if getattr(param, "_no_weight_decay", False):
        said = "the tensor carries _no_weight_decay"
        return Mark({"weight_decay": 0.0}, said, said)
    return None


def call_hook(module: nn.Module, hook: str, name: str = "") -> Collection[str] | None:
    """Ask a hook of `module`, a method, a property or a plain collection, if it declares one.

    Args:
        module: The module.
        hook: One of `HOOKS`.
        name: The module's name, for messages.

    Returns:
        The names it lists, or None without such a hook.

    Raises:
        ValueError: If the hook raises or returns something other than names.
    """
    # Not plain getattr: a wrapper that forwards attributes would answer for the module inside it.
    declared = vars(module).get(hook, getattr(type(module), hook, None))
    if declared is None:
        return None
    where = f"{hook} of {class_of(module).__name__} ({name or 'the model'})"
    try:
        entries = getattr(module, hook)
        entries = entries() if callable(entries) else entries
    except Exception as error:
        raise ValueError(
            f"{where} raised {type(error).__name__}: {error}; expected it to list names"
        ) from error
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise ValueError(f"{where} returned {entries!r}; expected a collection of parameter names")
    return [canonical(str(entry)) for entry in entries]


def _has_name(relative: list[str], entry: str) -> bool:
    return fnmatchcase(".".join(relative), entry)


def _has_keyword(relative: list[str], entry: str) -> bool:
    wanted = entry.strip(".").split(".")
    return any(relative[i : i + len(wanted)] == wanted for i in range(len(relative)))
