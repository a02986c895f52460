"""Plan: one optimizer step as data.

Rows say where parameters live, chunks share out the work, hypers say how each group is stepped; csrc/tables.h
has the same layouts in C++.

A plan is built once and kept while it is true: every step reads the addresses afresh and compares. New
addresses of gradients are written into the rows; anything else that moved makes the plan stale, and the
optimizer builds another.
"""

from __future__ import annotations

import operator
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Columns of a row: int64 [n_rows, 8], struct Row.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, NUMEL, HYPER = range(8)
ROW_WORDS = 8
# Columns of a hyper row: float64 [n_groups, 7], struct Hyper; the last one holds the bits of an address.
HYPER_WORDS = 7
LR_ADDRESS = 6

# Storage types as the kernels number them, enum DType.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# (parameter, gradient, moments) that the kernels are built for, FUSED_ADAMW_FOR_EACH_DTYPES.
_F32, _BF16, _F16, _F64 = DTYPE_CODE
KERNEL_DTYPES = frozenset(
    {
        (_F32, _F32, _F32),
        (_F32, _F32, _BF16),
        (_F32, _BF16, _F32),
        (_BF16, _BF16, _BF16),
        (_BF16, _BF16, _F32),
        (_BF16, _F32, _BF16),
        (_BF16, _F32, _F32),
        (_F16, _F16, _F16),
        (_F16, _F16, _F32),
        (_F16, _F16, _BF16),
        (_F64, _F64, _F64),
    }
)


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
    """What is known only when the step runs (struct StepInputs). Tensors are on the device of the bucket.

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


class KernelBackend(Protocol):
    """Kernels that walk the tables: `native` and `triton`."""

    def chunk_size(self, device: torch.device, numel: int) -> int:
        """Elements per chunk that suit the device and the number of elements in all."""

    def max_host_hypers(self, device: torch.device) -> int:
        """Up to how many hyper rows may stay in host memory."""

    @property
    def sum_of_squares(self) -> Callable[..., None]:
        """The operator `fused_adamw::sum_of_squares`."""

    @property
    def update(self) -> Callable[..., None]:
        """The operator `fused_adamw::update`."""


@dataclass(slots=True)
class Entry:
    """One parameter with its state, as the plan found them."""

    slot: int  # position among all parameters of all groups
    group: int
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
    """Host tables on their way to a device, without the host waiting.

    The allocator of pinned memory keeps a staging buffer untouched until its copy is done. A captured graph
    copies again at every replay, from the staging buffer into the table of its capture: both are kept, and as
    pinned memory cannot be allocated during a capture, one buffer is always at hand.
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


class TableBucket:
    """Parameters of one device and one set of dtypes, stepped by kernels in one launch."""

    def __init__(self, entries: list[Entry], n_hypers: int, backend: KernelBackend) -> None:
        first = entries[0]
        self.device = first.param.device
        self.slots = [entry.slot for entry in entries]
        self.dtypes = (first.param.dtype, first.grad_dtype, first.exp_avg.dtype)
        self._codes = tuple(DTYPE_CODE[dtype] for dtype in self.dtypes)
        self._backend = backend
        numels = [entry.param.numel() for entry in entries]
        self._chunk_size = backend.chunk_size(self.device, sum(numels))
        self._hypers_on_host = n_hypers <= backend.max_host_hypers(self.device)
        self._rows_host = torch.tensor(
            [entry.addresses() for entry in entries], dtype=torch.int64, device="cpu"
        )
        self._rows = self._rows_host
        self._rows_table, self._hypers_table = DeviceTable(self.device), DeviceTable(self.device)
        self._chunks = DeviceTable(self.device).upload(chunk_table(numels, self._chunk_size))
        self._workspace = torch.zeros(1 + len(self._chunks), dtype=torch.float64, device=self.device)
        self._hypers = torch.empty(0, device="cpu")
        self._lrs: list[Tensor] = []  # tensors that the table of hypers points to

    def set_grads(self, addresses: Sequence[int]) -> None:
        """Write the gradient address of every row: `addresses` has one for each slot of the plan."""
        column = array("q", [addresses[slot] for slot in self.slots])
        self._rows_host[:, GRAD] = torch.frombuffer(column, dtype=torch.int64)
        self._rows = self._rows_table.upload(self._rows_host)

    def set_hypers(self, hypers: Sequence[Hyper]) -> None:
        """Write the table of hyper-parameters, one row per group."""
        on_device = self.device.type != "cpu"
        flat = array("d")
        self._lrs = []
        for hyper in hypers:
            lr, address = hyper.lr, 0
            if isinstance(lr, Tensor):
                if on_device:
                    self._lrs.append(lr.to(self.device))
                    lr, address = 0.0, self._lrs[-1].data_ptr()
                else:
                    lr = float(lr)
            sign = -1.0 if hyper.maximize else 1.0
            flat.extend((lr, *hyper[1:5], sign))
            flat.frombytes(address.to_bytes(8, sys.byteorder))
        table = torch.frombuffer(flat, dtype=torch.float64).view(len(hypers), HYPER_WORDS)
        self._hypers = table if self._hypers_on_host else self._hypers_table.upload(table)

    def sum_of_squares(self, grads: Sequence[Tensor | None], out: Tensor) -> None:
        """Write the sum of squares of the bucket's gradients to `out`, float64, one element."""
        self._backend.sum_of_squares(
            self._rows, self._chunks, self._chunk_size, self._codes[1], self._workspace, out
        )

    def update(self, grads: Sequence[Tensor | None], inputs: StepInputs) -> None:
        """Step every row that has a gradient: mutates parameters, moments and step counts."""
        self._backend.update(
            self._rows,
            self._chunks,
            self._chunk_size,
            self._hypers,
            *self._codes,
            inputs.sums,
            inputs.max_grad_norm,
            inputs.skip_nonfinite,
            inputs.grad_scale,
            inputs.found_inf,
            inputs.status,
            self._workspace,
        )


class ReferenceBackend(Protocol):
    """Plain PyTorch on lists of tensors."""

    def sum_of_squares(self, grads: Sequence[Tensor], out: Tensor) -> None:
        """Write the sum of squares of all gradients to `out`."""

    def update(
        self, entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
    ) -> None:
        """Step every entry."""


class TensorBucket:
    """Parameters of one device that no kernel takes, stepped one by one by the reference."""

    def __init__(self, entries: list[Entry], backend: ReferenceBackend) -> None:
        self.device = entries[0].param.device
        self.slots = [entry.slot for entry in entries]
        self._entries = entries
        self._hypers: Sequence[Hyper] = ()
        self._backend = backend

    def set_grads(self, addresses: Sequence[int]) -> None:
        """Nothing to note: gradients are taken as tensors."""

    def set_hypers(self, hypers: Sequence[Hyper]) -> None:
        """Note the hyper-parameters of every group."""
        self._hypers = hypers

    def sum_of_squares(self, grads: Sequence[Tensor | None], out: Tensor) -> None:
        """Write the sum of squares of the bucket's gradients to `out`, one element."""
        self._backend.sum_of_squares([g for slot in self.slots if (g := grads[slot]) is not None], out)

    def update(self, grads: Sequence[Tensor | None], inputs: StepInputs) -> None:
        """Step every parameter that has a gradient: mutates parameters, moments and step counts."""
        pairs = [(e, g) for e in self._entries if (g := grads[e.slot]) is not None]
        self._backend.update([e for e, _ in pairs], [g for _, g in pairs], self._hypers, inputs)


Bucket = TableBucket | TensorBucket


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether one flat index names the same element in both, whatever the strides of size-1 dimensions."""
    return a.shape == b.shape and all(
        x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1
    )


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory without holes or overlap, in whatever order of dimensions."""
    if t.numel() == 0 or t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def why_not_tabular(entry: Entry, grad: Tensor | None) -> str | None:
    """None if kernels can step this parameter by address and flat index, else the reason."""
    tensors = {"parameter": entry.param, "exp_avg": entry.exp_avg, "exp_avg_sq": entry.exp_avg_sq}
    if entry.max_exp_avg_sq is not None:
        tensors["max_exp_avg_sq"] = entry.max_exp_avg_sq
    moment_dtypes = {t.dtype for name, t in tensors.items() if name != "parameter"}
    if grad is not None:
        tensors["gradient"] = grad
    for name, t in tensors.items():
        if type(t) not in (Tensor, torch.nn.Parameter):
            return f"{name} is a {type(t).__name__}"
        if t.layout is not torch.strided or t.is_neg() or t.is_conj():
            return f"{name} is not plain strided memory"
        if not is_dense(t):
            return f"{name} is not dense: strides {t.stride()} for shape {tuple(t.shape)}"
        if not same_layout(t, entry.param):
            return f"{name} has strides {t.stride()}, the parameter {entry.param.stride()}"
    if len(moment_dtypes) > 1:
        return "moments of different dtypes"
    dtypes = (entry.param.dtype, entry.grad_dtype, entry.exp_avg.dtype)
    if dtypes not in KERNEL_DTYPES:
        return "no kernel for parameter, gradient, moments of " + ", ".join(map(str, dtypes))
    return None


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _address(t: Tensor) -> int:
    """Where a tensor's memory starts; an identity for what has no memory of its own."""
    try:
        return t.data_ptr()
    except RuntimeError:
        return id(t)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:
        return list(map(_address, tensors))


def _state_tensors(state: Mapping[Tensor, dict[str, Any]]) -> list[Tensor]:
    """Every tensor of the state, in a fixed order."""
    return [t for s in state.values() for t in s.values() if isinstance(t, Tensor)]


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


class _Metadata:
    """What kernels take for granted of tensors, beside their addresses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.columns: list[Sequence[object]] = [
            [t.dtype for t in tensors],
            [t.layout for t in tensors],
            [t.shape for t in tensors],
            list(map(Tensor.stride, tensors)),
        ]

    def where(self, selected: Sequence[bool]) -> _Metadata:
        """Of some of the tensors."""
        part = _Metadata([])
        part.columns = [list(compress(column, selected)) for column in self.columns]
        return part


def _grad_addresses(grads: Sequence[Tensor | None]) -> list[int]:
    """Addresses of gradients: 0 where there is none, never 0 where there is one, if only an empty one."""
    try:
        return [0 if g is None else g.data_ptr() or 1 for g in grads]
    except RuntimeError:
        return [0 if g is None else _address(g) for g in grads]


class Plan:
    """The buckets of one optimizer, and the means to tell whether they are still true.

    Args:
        groups: The optimizer's `param_groups`.
        state: The optimizer's state; every parameter that has a gradient must have its own.
        kernels_for: The kernels that serve a device, None for the reference.
        reference: The reference backend.
        status: What the plan before this one left in the status of its first bucket.
        previous: The plan before this one: it knows what gradients that are absent now looked like.

    Attributes:
        buckets: What to run, each with a place for its sum of squares and one for its status (float64: the
            gradient norm, steps skipped so far). All buckets report the same.
        fallbacks: Slot to the reason why kernels that serve its device do not step it.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Tensor]],
        kernels_for: Callable[[torch.device], KernelBackend | None],
        reference: ReferenceBackend,
        status: Tensor | None,
        previous: Plan | None,
    ) -> None:
        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._structure = self._structure_of(groups)
        self._state_tensors = _state_tensors(state)
        self._addresses = _addresses([*self._params, *self._state_tensors])
        self._metadata = _Metadata(self._params)
        grads = [p.grad for p in self._params]
        self._expected = [self._expected_grad(slot, previous) for slot in range(len(grads))]
        self._grad_metadata = _Metadata(self._expected)
        self._grad_addresses: list[int] | None = None
        self._hyper_keys: list[tuple[object, ...]] | None = None
        self._hypers: list[Hyper] = []
        self.fallbacks: dict[int, str] = {}

        alike: dict[tuple[object, ...], list[Entry]] = {}
        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        for slot, (p, group) in enumerate(zip(self._params, group_of, strict=True)):
            if not (s := state.get(p)):
                continue  # no gradient so far
            grad = self._expected[slot] if grads[slot] is None else grads[slot]
            v_max = s["max_exp_avg_sq"] if groups[group]["amsgrad"] else None
            grad_dtype = self._expected[slot].dtype
            entry = Entry(slot, group, p, s["exp_avg"], s["exp_avg_sq"], v_max, s["step"], grad_dtype)
            key: tuple[object, ...] = (p.device,)
            if kernels_for(p.device) is not None:
                if reason := why_not_tabular(entry, grad):
                    self.fallbacks[slot] = reason
                else:
                    key = (p.device, p.dtype, grad_dtype, entry.exp_avg.dtype)
            alike.setdefault(key, []).append(entry)

        self.buckets: list[tuple[Bucket, Tensor, Tensor]] = []
        self._sums: dict[torch.device, Tensor] = {}
        for device in {entries[0].param.device: None for entries in alike.values()}:
            kernels = kernels_for(device)
            mine = [(key, entries) for key, entries in alike.items() if key[0] == device]
            sums = torch.zeros(len(mine), dtype=scalar_dtype(device), device=device)
            self._sums[device] = sums
            for i, (key, entries) in enumerate(mine):
                bucket: Bucket
                if kernels is None or len(key) == 1:
                    bucket = TensorBucket(entries, reference)
                else:
                    bucket = TableBucket(entries, len(groups), kernels)
                if status is None:
                    status = torch.zeros(2, dtype=sums.dtype, device=device)
                self.buckets.append((bucket, sums[i : i + 1], status.to(device, sums.dtype, copy=True)))
        stepped = {slot for bucket, _, _ in self.buckets for slot in bucket.slots}
        self._without_state = [slot for slot in range(len(self._params)) if slot not in stepped]

    def _expected_grad(self, slot: int, previous: Plan | None) -> Tensor:
        """What a parameter's gradient looks like, as it is, was, or as the parameter; not its memory."""
        p = self._params[slot]
        if (grad := p.grad) is None:
            known = previous is not None and slot < len(previous._params) and previous._params[slot] is p
            return previous._expected[slot] if previous is not None and known else p
        return torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device="meta")

    @staticmethod
    def _structure_of(groups: Sequence[Mapping[str, Any]]) -> list[object]:
        return [(len(group["params"]), bool(group["amsgrad"])) for group in groups]

    def is_current(
        self,
        groups: Sequence[Mapping[str, Any]],
        params: list[Tensor],
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> bool:
        """Whether the plan still describes the optimizer, up to gradient addresses and hyper-parameters.

        Args:
            groups: The optimizer's `param_groups` now.
            params: All parameters of all groups now, in order.
            grads: Their gradients now.
            state: The optimizer's state now.
        """
        state_tensors = _state_tensors(state)
        if not (
            self._structure_of(groups) == self._structure
            and _same(params, self._params)
            and _same(state_tensors, self._state_tensors)
            and _addresses([*params, *state_tensors]) == self._addresses
            and _Metadata(params).columns == self._metadata.columns
        ):
            return False
        present = [g for g in grads if g is not None]
        expected = self._grad_metadata
        if len(present) < len(grads):
            expected = expected.where([g is not None for g in grads])
        return (
            not any(grads[slot] is not None for slot in self._without_state)
            and _Metadata(present).columns == expected.columns
        )

    def prepare(self, groups: Sequence[Mapping[str, Any]], grads: Sequence[Tensor | None]) -> None:
        """Bring gradient addresses and hyper-parameters up to date, where they changed."""
        addresses = _grad_addresses(grads)
        if addresses != self._grad_addresses:
            for bucket, _, _ in self.buckets:
                bucket.set_grads(addresses)
            self._grad_addresses = addresses
        hypers = [Hyper.of(group) for group in groups]
        keys = [hyper.key() for hyper in hypers]
        if keys != self._hyper_keys or self._reads_lr_of_another_device(hypers):
            for bucket, _, _ in self.buckets:
                bucket.set_hypers(hypers)
            self._hyper_keys = keys
        self._hypers = hypers  # keeps the tensors that tables point to

    def _reads_lr_of_another_device(self, hypers: Iterable[Hyper]) -> bool:
        return any(
            hyper.lr.device != device
            for hyper in hypers
            if isinstance(hyper.lr, Tensor)
            for device in self._sums
        )

    def sum_of_squares(self, grads: Sequence[Tensor | None]) -> dict[torch.device, Tensor]:
        """Sum the squares of all gradients.

        Returns:
            For each device of the plan, a float64 vector whose sum is the total over all devices. The host
            waits only where an accelerator's sum has to reach the CPU or the other way round.
        """
        for bucket, out, _ in self.buckets:
            bucket.sum_of_squares(grads, out)
        if len(self._sums) <= 1:
            return self._sums
        home, *others = self._sums
        total = self._sums[home].sum()
        for device in others:
            total = total + self._sums[device].sum().to(home, total.dtype)
        return {device: total.to(device, sums.dtype).reshape(1) for device, sums in self._sums.items()}
