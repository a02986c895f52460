"""The tables that kernels walk: what their rows hold, and what fills them.

csrc/tables.h has the same structs in C++, with what each field means; a test holds the two together. Fields
are read and written by name only, so that a struct can grow.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .formats import Field, Formats, Window

_Address, _Int64, _Double = ctypes.c_uint64, ctypes.c_int64, ctypes.c_double


class FieldStruct(ctypes.Structure):
    """Where one tensor is kept."""

    _fields_ = (("values", _Address), ("side", _Address))


class RowStruct(ctypes.Structure):
    """Where one parameter lives."""

    _fields_ = (
        ("param", FieldStruct),
        ("exp_avg", FieldStruct),
        ("exp_avg_sq", FieldStruct),
        ("max_exp_avg_sq", FieldStruct),
        ("average", FieldStruct),
        ("step", _Address),
        ("numel", _Int64),
        ("hyper", ctypes.c_int32),
        ("slot", ctypes.c_int32),
        ("ordinal", _Int64),
        ("offset", _Int64),
        ("local_columns", ctypes.c_uint32),
        ("columns", ctypes.c_uint32),
    )


class ChunkStruct(ctypes.Structure):
    """The unit of work."""

    _fields_ = (("row", ctypes.c_int32), ("index", ctypes.c_int32))


class HyperStruct(ctypes.Structure):
    """How one parameter group is stepped."""

    _fields_ = (
        ("lr", _Double),
        ("beta1", _Double),
        ("beta2", _Double),
        ("eps", _Double),
        ("weight_decay", _Double),
        ("decay_power", ctypes.c_int32),
        ("cautious", ctypes.c_int32),
        ("nesterov", ctypes.c_int32),
        ("grad_sign", ctypes.c_int32),
        ("lr_address", _Address),
    )


class AveragingStruct(ctypes.Structure):
    """How the average of the parameters follows them."""

    _fields_ = (("decay", _Double), ("warmup", _Int64), ("start_step", _Int64), ("every", _Int64))


class SpikeOptionsStruct(ctypes.Structure):
    """When a gradient norm, or a loss, is a spike."""

    _fields_ = (("sigmas", _Double), ("window", _Int64), ("warmup", _Int64), ("clips", _Int64))


# How the kernels number what becomes of a step, enum Outcome.
OUTCOMES = ("stepped", "clipped_spike", "overflow", "nonfinite", "spike", "loss_spike")
FIRST_SKIPPED = OUTCOMES.index("overflow")  # this and the next ones skip the step


class StatusStruct(ctypes.Structure):
    """What a step leaves to be read."""

    _fields_ = (
        ("grad_norm", _Double),
        ("loss_scale", _Double),
        ("outcome", _Double),
        ("counts", _Double * len(OUTCOMES)),
    )


class SpikeHistoryStruct(ctypes.Structure):
    """What follows the status where spikes are looked for."""

    _fields_ = (("streak", _Double), ("refused", _Double * 8))


class SeriesStruct(ctypes.Structure):
    """What follows the history, for norms and for losses; with as many values as the window has."""

    _fields_ = (("limit", _Double), ("accepted", _Double), ("values", _Double * 1))


class ChunkStatsStruct(ctypes.Structure):
    """What the update finds out about a chunk."""

    _fields_ = (
        ("grad_squares", _Double),
        ("grad_max", _Double),
        ("update_squares", _Double),
        ("param_squares", _Double),
        ("lost_updates", _Double),
    )


class StepInputsStruct(ctypes.Structure):
    """What is known only when the step runs."""

    _fields_ = (
        ("sums", _Address),
        ("n_sums", _Int64),
        ("max_grad_norm", _Double),
        ("grad_scale", _Address),
        ("found_inf", _Address),
        ("skip_nonfinite", _Int64),
        ("seed", ctypes.c_uint64),
        ("status", _Address),
        ("loss", _Address),
        ("spikes", SpikeOptionsStruct),
        ("averaging", AveragingStruct),
    )


def words(struct: type[ctypes.Structure]) -> int:
    """How many words of eight bytes a struct takes."""
    return ctypes.sizeof(struct) // 8


def word_of(struct: type[ctypes.Structure], field: str) -> int:
    """At which word of a struct a field starts."""
    offset: int = getattr(struct, field).offset
    return offset // 8


# How the kernels number `FORMATS`, enum FormatCode.
FORMAT_CODE = {
    "float32": 0,
    "bfloat16": 1,
    "float16": 2,
    "float64": 3,
    "bfloat16_stochastic": 4,
    "bfloat16_split": 5,
    "root_signed": 6,
    "root_unsigned": 7,
}
NO_FORMAT = -1  # of a tensor that is nowhere


def format_codes(formats: Formats) -> list[int]:
    """How the kernels number the formats of a parameter and what belongs to it."""
    return [NO_FORMAT if format is None else FORMAT_CODE[format.name] for format in formats]


def as_number(value: Any) -> float:
    """The value as a float, as `float` does it; but a string is no number, as it is none to torch.

    Raises:
        TypeError: It is a string, or nothing like a number.
    """
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"expected a number, got the string {value!r}")
    return float(value)


class Hyper(NamedTuple):
    """How one parameter group is stepped; numbers as Python has them."""

    lr: float | Tensor  # a float32 tensor where it lives on an accelerator: reading it would synchronise
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # parameters shrink by weight_decay * lr**decay_power
    maximize: bool
    decay_power: int = 1
    cautious: bool = False  # they do so only where the update shrinks them too
    nesterov: bool = False  # the momentum looks one step ahead, as NAdam's does

    @staticmethod
    def of(group: Mapping[str, Any]) -> Hyper:
        """Read a parameter group as it is now; schedulers change it between steps."""
        lr = group["lr"]
        lr = lr.to(torch.float32) if isinstance(lr, Tensor) and lr.device.type != "cpu" else as_number(lr)
        beta1, beta2 = group["betas"]
        return Hyper(
            lr,
            as_number(beta1),
            as_number(beta2),
            as_number(group["eps"]),
            as_number(group["weight_decay"]),
            bool(group["maximize"]),
        )

    def key(self) -> tuple[object, ...]:
        """What the kernels' table depends on, comparable without reading a tensor."""
        lr = (self.lr.device, self.lr.data_ptr()) if isinstance(self.lr, Tensor) else self.lr
        return (lr, *self[1:])


class Averaging(NamedTuple):
    """How the average of the parameters follows them (struct Averaging, csrc/average.h).

    Attributes:
        decay: What is kept of the average when it moves.
        warmup: How decay is reached, enum Warmup: a position in `WARMUPS`.
        start_step: The average is the parameter itself until so many updates have been made.
        every: It then moves at every so many updates.
    """

    decay: float
    warmup: int = 0
    start_step: int = 0
    every: int = 1


WARMUPS = (None, "timm", "diffusers")
NO_AVERAGING = Averaging(0.0)


class SpikeOptions(NamedTuple):
    """When a gradient norm, or a loss, is a spike (struct SpikeOptions, csrc/outcome.h).

    Attributes:
        sigmas: Above the mean by more than so many deviations ...
        window: ... of so many accepted ones; 0: nothing is a spike.
        warmup: Of which so many have to be known before any is.
        clips: Clip gradients to the limit, instead of skipping the step.
    """

    sigmas: float = 0.0
    window: int = 0
    warmup: int = 0
    clips: bool = False


NO_SPIKES = SpikeOptions()


# Where the parts of a status are, in words: what of it all statuses have, and the history of spikes.
STATUS_WORDS = words(StatusStruct)
HISTORY_WORDS = words(SpikeHistoryStruct)


def status_words(window: int) -> int:
    """How many float64 a status takes, with the history of spikes that follows it."""
    series = words(SeriesStruct) - 1 + window
    return STATUS_WORDS + (HISTORY_WORDS + 2 * series if window else 0)


@dataclass(eq=False)
class StepInputs:
    """What is known only when the step runs (struct StepInputs). Tensors are on the bucket's device.

    Attributes:
        status: float64 (at least `status_words(spikes.window)`,), written: struct Status, and the history.
        sums: float64 (n,), parts of the sum of squares of all gradients as they are stored, before unscaling;
            None: no norm, no clipping.
        max_grad_norm: clip to this global norm; read where `sums` is given.
        grad_scale: float32, one element: the loss scale that the gradients still carry.
        found_inf: float32, one element: not 0 means skip the step.
        skip_nonfinite: skip the step where the norm is not finite.
        seed: of the noise of stochastic formats.
        loss: float64, one element: tested as the norm is, where spikes are looked for.
        spikes: what a spike is.
        averaging: how the averages of rows that have one follow their parameters.
    """

    status: Tensor
    sums: Tensor | None = None
    max_grad_norm: float = math.inf
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    skip_nonfinite: bool = False
    seed: int = 0
    loss: Tensor | None = None
    spikes: SpikeOptions = NO_SPIKES
    averaging: Averaging = NO_AVERAGING

    @functools.cached_property
    def record(self) -> Tensor:
        """The words of struct StepInputs, on the host. They hold addresses: keep this object while in use.

        Raises:
            ValueError: A tensor has another dtype or device than the kernels expect, or too few elements.
        """

        def address(name: str, dtype: torch.dtype, numel: int = 1) -> int:
            t: Tensor | None = getattr(self, name)
            if t is None:
                return 0
            device = self.status.device
            if t.dtype != dtype or t.numel() < numel or not t.is_contiguous() or t.device != device:
                raise ValueError(
                    f"{name} must be contiguous, of {dtype}, with at least {numel} elements on "
                    f"{device}, got {tuple(t.shape)} of {t.dtype} on {t.device}"
                )
            return t.data_ptr()

        struct = StepInputsStruct(
            sums=address("sums", torch.float64),
            n_sums=0 if self.sums is None else self.sums.numel(),
            max_grad_norm=self.max_grad_norm,
            grad_scale=address("grad_scale", torch.float32),
            found_inf=address("found_inf", torch.float32),
            skip_nonfinite=self.skip_nonfinite,
            seed=self.seed,
            status=address("status", torch.float64, status_words(self.spikes.window)),
            loss=address("loss", torch.float64),
            spikes=SpikeOptionsStruct(*self.spikes),
            averaging=AveragingStruct(*self.averaging),
        )
        return torch.frombuffer(struct, dtype=torch.int64)


@dataclass(slots=True)
class Entry:
    """One parameter with its state, as found when it was looked up: of DTensors, the local tensors."""

    ordinal: int  # position among all parameters of all groups
    group: int
    window: Window  # where its elements lie in the whole tensor
    param: Field
    exp_avg: Field
    exp_avg_sq: Field
    max_exp_avg_sq: Field | None
    step: Tensor
    average: Field | None = None


@dataclass(slots=True)
class Tables:
    """What the kernels of one launch walk; all on its device, except that `hypers` may be on the host.

    Attributes:
        rows: int64 (n_rows, words), struct Row.
        grads: int64 (n_slots,): the address of each slot's gradient; 0: none in this step.
        chunks: int32 (n_chunks, 2), struct Chunk.
        chunk_size: Elements of a chunk.
        hypers: float64 (n_hypers, words), struct Hyper.
        formats: `FORMAT_CODE` of the parameters, the gradients, exp_avg, exp_avg_sq and the average.
        workspace: float64 (1 + n_chunks,); the first four bytes are 0 before and after every call.
        stats: float64 (n_chunks, words), struct ChunkStats, written by an update; no rows: not asked for.
    """

    rows: Tensor
    grads: Tensor
    chunks: Tensor
    chunk_size: int
    hypers: Tensor
    formats: tuple[int, ...]
    workspace: Tensor
    stats: Tensor


def row_table(n: int, **columns: Sequence[int] | Tensor) -> Tensor:
    """Lay out rows.

    Args:
        n: The number of rows.
        columns: Fields of struct Row by name, a number for each row, as in `set_column`. Those that are left
            out are 0, and shards are taken for whole tensors.

    Returns:
        int64 (n, words), on the host.
    """
    rows = torch.zeros(n, words(RowStruct), dtype=torch.int64, device="cpu")
    for name, numbers in {"local_columns": [1] * n, "columns": [1] * n, **columns}.items():
        set_column(rows, name, numbers)
    return rows


def set_column(rows: Tensor, name: str, numbers: Sequence[int] | Tensor) -> None:
    """Write one field of all rows: mutates `rows`.

    Args:
        rows: As `row_table` lays them out.
        name: Of a field of struct Row. Of a Field, "name" is the address of its values, "name.side" that of
            its side.
        numbers: One for each row.
    """
    name, _, part = name.partition(".")
    field = getattr(RowStruct, name)
    dtype = torch.int32 if field.size == 4 else torch.int64
    offset = field.offset + (getattr(FieldStruct, part).offset if part else 0)
    column = rows.view(dtype)[:, offset // dtype.itemsize]
    column.copy_(torch.as_tensor(numbers, dtype=torch.int64, device="cpu"))


def hyper_table(rows: Sequence[Mapping[str, float | int]]) -> Tensor:
    """Lay out the rows of struct Hyper, float64 (n, words) on the host, from their fields by name."""
    table = (HyperStruct * max(1, len(rows)))(*(HyperStruct(**row) for row in rows))
    return torch.frombuffer(table, dtype=torch.float64).view(-1, words(HyperStruct))[: len(rows)]


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
