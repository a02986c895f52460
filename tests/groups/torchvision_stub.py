"""timm imports torchvision for data transforms and one frozen norm; no test here uses either.

torchvision has no build for every CPU-only torch, so the tests put empty modules in its place while timm is
imported, and take them away again.
"""

import importlib.machinery
import importlib.util
import sys
from contextlib import contextmanager
from enum import Enum
from types import ModuleType

from torch import nn

NAMES = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")


class _Empty(ModuleType):
    """A module in which every public name is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return Enum(name, "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
        return type(name, (nn.Module,), {})


@contextmanager
def torchvision_stub():
    """Lets `import timm` succeed without torchvision."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision"):
        yield
        return
    for suffix in NAMES:
        name = "torchvision" + suffix
        module = sys.modules[name] = _Empty(name)
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for suffix in NAMES:
            del sys.modules["torchvision" + suffix]
