"""The compiled extension `fused_adamw._C`, loaded when it is first needed."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def load_extension() -> ModuleType | str:
    """Load the extension, once, which registers `torch.ops.fused_adamw`; or why it does not load."""
    try:
        return importlib.import_module("._C", __package__)
    except ImportError as error:
        return f"the extension is not built or does not load ({error})"
