"""PyTorch's own entry for AdamW in its tests of optimizers: constructor inputs, errors, schedulers."""

import importlib.util
import sys
import types
import unittest

import torch


def _entry():
    # torch's test utilities import expecttest for a base class; nothing of it is used here.
    missing = importlib.util.find_spec("expecttest") is None
    if missing:
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase
    try:
        from torch.testing._internal.common_optimizers import optim_db
    finally:
        if missing:
            del sys.modules["expecttest"]
    (entry,) = [info for info in optim_db if info.name == "AdamW"]
    return entry


ADAMW = _entry()


def inputs():
    """Every input of AdamW: those that torch gives to the CPU, and those of GPUs without `capturable`."""
    found = {str(entry.kwargs): entry for entry in ADAMW.optim_inputs_func(device="cpu")}
    for entry in ADAMW.optim_inputs_func(device="cuda"):
        entry.kwargs.pop("capturable", None)
        found.setdefault(str(entry.kwargs), entry)
    return list(found.values())


INPUTS = inputs()
ERRORS = ADAMW.optim_error_inputs_func("cpu", torch.float32)


def kwargs_of(entry, dtype=None):
    """Arguments of its own for one optimizer, with tensors of `dtype`: they are filled in place."""

    def own(value):
        if isinstance(value, tuple):
            return tuple(map(own, value))
        return value.to(dtype, copy=True) if isinstance(value, torch.Tensor) else value

    return {key: own(value) for key, value in entry.kwargs.items()}
