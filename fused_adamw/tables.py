"""The tables that kernels walk: their columns, and what fills them.

csrc/tables.h has the same layouts in C++, with what each field means; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Columns of a row: int64 [n_rows, 8], struct Row.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, NUMEL, HYPER = range(8)
ROW_WORDS = 8
# Columns of a hyper row: float64 [n_groups, 7], struct Hyper; the last one holds the bits of an address.
HYPER_WORDS = 7
LR_ADDRESS = 6

# How a tensor is kept, as the kernels number it, enum DType.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Hyper(NamedTuple):
    """How one parameter group is stepped; numbers as Python has them."""

    lr: float | Tensor  # a float32 tensor where it lives on an accelerator: reading it would synchronise
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool

    @staticmethod
    def of(group: Mapping[str, Any]) -> Hyper:
        """Read a parameter group as it is now; schedulers change it between steps."""
        lr = group["lr"]
        lr = lr.to(torch.float32) if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
        beta1, beta2 = group["betas"]
        return Hyper(
            lr,
            float(beta1),
            float(beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            bool(group["maximize"]),
        )

    def key(self) -> tuple[object, ...]:
        """What the kernels' table depends on, comparable without reading a tensor."""
        lr = (self.lr.device, self.lr.data_ptr()) if isinstance(self.lr, Tensor) else self.lr
        return (lr, *self[1:])


@dataclass(slots=True)
class StepInputs:
    """What is known only when the step runs (struct StepInputs). Tensors are on the bucket's device.

    Attributes:
        sums: float64 (n,), parts of the sum of squares of all gradients as they are stored, before unscaling;
            None: no norm, no clipping.
        max_grad_norm: clip to this global norm; read where `sums` is given.
        grad_scale: float32, one element: the loss scale that the gradients still carry.
        found_inf: float32, one element: not 0 means skip the step.
        skip_nonfinite: skip the step where the norm is not finite.
        status: float64 (2,), written: the gradient norm, and 1 added if the step was skipped.
    """

    sums: Tensor | None
    max_grad_norm: float
    grad_scale: Tensor | None
    found_inf: Tensor | None
    skip_nonfinite: bool
    status: Tensor


@dataclass(slots=True)
class Entry:
    """One parameter with its state, as the plan found them: of DTensors, the local tensors."""

    slot: int  # position among all parameters of all groups
    group: int
    domain: int  # gradients of one domain are summed together
    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: Tensor
    grad_dtype: torch.dtype

    def addresses(self) -> list[int]:
        """This entry's Row, without a gradient."""
        v_max = self.max_exp_avg_sq
        return [
            self.param.data_ptr(),
            0,
            self.exp_avg.data_ptr(),
            self.exp_avg_sq.data_ptr(),
            0 if v_max is None else v_max.data_ptr() or 1,
            self.step.data_ptr(),
            self.param.numel(),
            self.group,
        ]


def chunk_table(numels: Sequence[int], chunk_size: int) -> Tensor:
    """Cut rows into chunks.

    Args:
        numels: Elements of each row.
        chunk_size: Elements of a chunk; the last one of a row may be shorter.

    Returns:
        int32 (n_chunks, 2): row, index of the chunk within the row. Rows without elements have none.
    """
    counts = (torch.tensor(numels, dtype=torch.int64, device="cpu") + (chunk_size - 1)) // chunk_size
    row = torch.repeat_interleave(counts)
    first = torch.cumsum(counts, 0) - counts
    index = torch.arange(row.numel(), device="cpu") - first[row]
    return torch.stack([row, index], dim=1).to(torch.int32)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the device is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DeviceTable:
    """Copies host tables to a device without waiting for it.

    The allocator of pinned memory keeps a staging buffer untouched until its copy is done. A captured graph
    repeats the copy at every replay, from the same staging buffer into the same table, so both are kept.
    Pinned memory cannot be allocated during a capture, so there is always a spare buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spare: Tensor | None = None
        self._kept: list[Tensor] = []

    def upload(self, table: Tensor) -> Tensor:
        """Return a copy of `table` on the device; on the CPU, the table itself."""
        if self.device.type == "cpu":
            return table
        if not is_capturing(self.device):
            if self._spare is None:
                self._spare = torch.empty_like(table, pin_memory=True)
            return table.pin_memory().to(self.device, non_blocking=True)
        if self._spare is None:
            raise RuntimeError("run a step of the optimizer without capture before each capture")
        staging, self._spare = self._spare.copy_(table), None
        uploaded = staging.to(self.device, non_blocking=True)
        self._kept += [staging, uploaded]
        return uploaded


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64
