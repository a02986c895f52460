"""Faults that sanitizers must find: `python planted.py overflow`, under `run.py`."""

import ctypes
import gc
import sys

import torch
from kernels.backends import Native
from kernels.model import Model, Param

from fused_adamw import FusedHygieneAdamW
from fused_adamw.extension import load_extension
from fused_adamw.tables import StepInputs, set_column


def overflow():
    """A row that says to have one element more than its tensors."""
    model = Model(Native(), [Param(900)])
    set_column(model.tables.rows, "numel", [901])
    model.norm()


def undefined():
    """Chunks so large that where the second one starts is no number of 64 bits."""
    model = Model(Native(), [Param(1000)])
    model.tables.chunks = torch.tensor([[0, 4]], dtype=torch.int32)
    model.tables.chunk_size = 2**62
    model.norm()


def race():
    """Every chunk listed again: two threads step the same elements."""
    c = 1 << 12
    model = Model(Native(), [Param(64 * c)], chunk_size=c)
    once = model.tables.chunks.reshape(-1, 2, 2)  # a thread takes two at a time
    model.tables.chunks = torch.cat([once, once], dim=1).reshape(-1, 2)
    model.tables.workspace = torch.zeros(1 + 2 * 64, dtype=torch.float64)
    inputs = StepInputs(torch.zeros(64, dtype=torch.float64))  # the status, and room
    for _ in range(100):  # on a busy machine, one thread may have taken all chunks before another wakes up
        model.kernels.update(model.tables, inputs, 4)


def leak():
    """A guard that nobody gives back."""
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = FusedHygieneAdamW([p])
    p.grad = torch.ones(100)
    optimizer.step()
    optimizer.step()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(optimizer._plan._guard._recorded))
    del optimizer, p
    gc.collect()


if __name__ == "__main__":
    load_extension()
    torch.set_num_threads(4)
    {"overflow": overflow, "undefined": undefined, "race": race, "leak": leak}[sys.argv[1]]()
