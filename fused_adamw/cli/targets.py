"""Models named on a command line: a factory of yours, or a library's model built from its configuration.

Nothing is downloaded and no memory is spent on values: library models are built on the meta device.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import torch
from torch import nn


def load_target(target: str) -> nn.Module:
    """Build the model that a target names.

    Args:
        target: `package.module:factory` (a module, or a callable without arguments that returns one),
            `timm:resnet50`, `transformers:gpt2` (a model type) or `diffusers:FluxTransformer2DModel` (a
            class).

    Returns:
        The model.

    Raises:
        ValueError: If the target is malformed or names nothing; the message says what was expected.
        Exception: Whatever the module or the factory raises.
    """
    source, colon, name = target.partition(":")
    if not (colon and source and name):
        raise ValueError(
            f"target {target!r}: expected package.module:factory, timm:NAME, transformers:TYPE or "
            "diffusers:CLASS"
        )
    build = _LIBRARIES.get(source)
    return _from_factory(source, name) if build is None else build(name)


def _from_factory(source: str, name: str) -> nn.Module:
    target = f"{source}:{name}"
    found = find(target)
    model = _call(found, target) if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(model, nn.Module):
        raise ValueError(f"target {target!r}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def find(target: str) -> Any:
    """Return what `package.module:name` names, a module or a factory.

    Raises:
        ValueError: If the target is malformed or names nothing.
        Exception: Whatever the module raises.
    """
    source, colon, name = target.partition(":")
    if not (colon and source and name):
        raise ValueError(f"target {target!r}: expected package.module:factory")
    _refuse_paths(source, name)
    # As `python -m` does, unless `-P` or PYTHONSAFEPATH says not to.
    if os.getcwd() not in sys.path and not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.getcwd())
    found: Any = _import(source, target)
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ValueError(f"target {target!r}: {error}") from error
    return found


def _refuse_paths(source: str, name: str) -> None:
    """Explain that a target names a module, where a path was given."""
    if not (source.endswith(".py") or "/" in source or source.startswith(".")):
        return
    path = PurePath(source.removesuffix(".py"))
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    hint = f"; try {'.'.join(parts)}:{name}" if parts else ""
    where = " in the folder that holds it" if ".." in path.parts or path.anchor else ""
    raise ValueError(f"target '{source}:{name}': expected a module, not a file{hint}{where}")


def _import(source: str, target: str) -> Any:
    """Import a module. An error that its own code raises passes through, with its traceback."""
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"target {target!r}: {error}") from error
    except SystemExit as error:
        raise ValueError(f"target {target!r}: importing it calls sys.exit({error.code!r})") from error


def _call(factory: Callable[[], Any], target: str) -> Any:
    """Call a factory. An error that its own code raises passes through, with its traceback."""
    try:
        return factory()
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        raise ValueError(f"target {target!r}: {error}") from error  # it wants arguments
    except SystemExit as error:
        raise ValueError(f"target {target!r}: it calls sys.exit({error.code!r})") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"target '{name}:...' needs {name}, which cannot be imported: {error}") from error


def _timm(name: str) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"target 'timm:{name}': timm has no such model{hint}")
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, pretrained=False)
    return model


# The head that trains a model comes first, so that tied heads and their biases are seen.
_HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING",
    "MODEL_MAPPING",
)


def _transformers(name: str) -> nn.Module:
    transformers = _library("transformers")
    try:
        config = transformers.AutoConfig.for_model(name)
    except ValueError as error:
        raise ValueError(
            f"target 'transformers:{name}': transformers has no such model type "
            "(a type such as gpt2, not the name of a checkpoint)"
        ) from error
    for head in _HEADS:
        mapping = getattr(transformers, head, {})
        if type(config) in mapping:
            found = mapping[type(config)]
            cls = found[0] if isinstance(found, tuple) else found
            with torch.device("meta"):
                model: nn.Module = cls(config)
            return model
    raise ValueError(f"target 'transformers:{name}': transformers has no model for {type(config).__name__}")


def _diffusers(name: str) -> nn.Module:
    cls = getattr(_library("diffusers"), name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"target 'diffusers:{name}': diffusers has no such model class")
    with torch.device("meta"):
        return cls()


_LIBRARIES: dict[str, Callable[[str], nn.Module]] = {
    "timm": _timm,
    "transformers": _transformers,
    "diffusers": _diffusers,
}
