"""Buckets: parameters of one device that one backend steps together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .distributed import local_tensors
from .memory import PLAIN, Tensors, is_dense, same_layout
from .tables import (
    DTYPE_CODE,
    DeviceTable,
    Entry,
    Hyper,
    StepInputs,
    Tables,
    chunk_table,
    hyper_table,
    row_table,
)


class KernelBackend(Protocol):
    """Kernels that walk the tables: `native` and `triton`."""

    def supports(
        self, device: torch.device, param: torch.dtype, grad: torch.dtype, state: torch.dtype
    ) -> bool:
        """Whether kernels can step a parameter of a dtype, its gradient and its moments of theirs."""

    def chunk_size(self, device: torch.device, numel: int) -> int:
        """Elements per chunk that suit the device and the number of elements in all."""

    def max_host_hypers(self, device: torch.device) -> int:
        """Up to how many hyper rows may stay in host memory."""

    def sum_of_squares(self, tables: Tables, chunks: Tensor, out: Tensor) -> None:
        """Write the sum of squares of the gradients in these chunks of the tables to `out`."""

    def update(self, tables: Tables, inputs: StepInputs) -> None:
        """Step every row that has a gradient."""


class ReferenceBackend(Protocol):
    """Plain PyTorch on lists of tensors."""

    def sum_of_squares(self, grads: Sequence[Tensor], out: Tensor) -> None:
        """Write the sum of squares of all gradients to `out`."""

    def update(
        self, entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
    ) -> None:
        """Step every entry."""

    def rehearse(
        self, entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
    ) -> None:
        """Raise what `update` would raise; change nothing."""


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter of a plan, and how to find its tensors. It keeps none of them alive."""

    slot: int  # position among all parameters of all groups
    group: int
    index: int  # position in the group
    domain: int  # gradients of one domain are summed together
    amsgrad: bool
    grad_dtype: torch.dtype

    def entry(self, tensors: Tensors) -> Entry:
        """Look up the parameter and its state, as they are now."""
        p = tensors.groups[self.group]["params"][self.index]
        state = tensors.state[p]
        v_max = state["max_exp_avg_sq"] if self.amsgrad else None
        p, m, v, v_max, step = local_tensors((p, state["exp_avg"], state["exp_avg_sq"], v_max, state["step"]))
        step = step.view(()) if step.dim() else step  # others may count with it
        return Entry(self.slot, self.group, self.domain, p, m, v, v_max, step, self.grad_dtype)


def why_not_tabular(entry: Entry, grad: Tensor | None, backend: KernelBackend) -> str | None:
    """None if kernels can step this parameter by address and flat index, else the reason."""
    tensors = {"parameter": entry.param, "exp_avg": entry.exp_avg, "exp_avg_sq": entry.exp_avg_sq}
    if entry.max_exp_avg_sq is not None:
        tensors["max_exp_avg_sq"] = entry.max_exp_avg_sq
    moment_dtypes = {t.dtype for name, t in tensors.items() if name != "parameter"}
    if grad is not None:
        tensors["gradient"] = grad
    for name, t in {**tensors, "step": entry.step}.items():
        if type(t) not in PLAIN:
            return f"{name} is a {type(t).__name__}"
        if t.layout is not torch.strided or t.is_nested or t.is_neg() or t.is_conj() or t._is_zerotensor():
            return f"{name} is not plain strided memory"
    if entry.step.dtype is not torch.float32:
        return f"step is counted in {entry.step.dtype}"
    for name, t in tensors.items():
        if not is_dense(t):
            return f"{name} is not dense: strides {t.stride()} for shape {tuple(t.shape)}"
        if not same_layout(t, entry.param):
            return f"{name} has strides {t.stride()}, the parameter {entry.param.stride()}"
    if len(moment_dtypes) > 1:
        return "moments of different dtypes"
    dtypes = (entry.param.dtype, entry.grad_dtype, entry.exp_avg.dtype)
    if not backend.supports(entry.param.device, *dtypes):
        return "no kernel for parameter, gradient, moments of " + ", ".join(map(str, dtypes))
    return None


class TableBucket:
    """Parameters of one device and one set of dtypes, stepped by kernels in one launch."""

    def __init__(self, entries: list[Entry], n_hypers: int, backend: KernelBackend) -> None:
        first = entries[0]
        self.device = first.param.device
        self.slots = [entry.slot for entry in entries]
        self.dtypes = (first.param.dtype, first.grad_dtype, first.exp_avg.dtype)
        self._backend = backend
        numels = [entry.param.numel() for entry in entries]
        chunk_size = backend.chunk_size(self.device, sum(numels))
        self._hypers_on_host = n_hypers <= backend.max_host_hypers(self.device)
        self._hypers_table = DeviceTable(self.device)
        chunks = chunk_table(numels, chunk_size)
        self._tables = Tables(
            rows=DeviceTable(self.device).upload(_rows(entries)),
            grads=torch.empty(0, dtype=torch.int64, device=self.device),
            chunks=DeviceTable(self.device).upload(chunks),
            chunk_size=chunk_size,
            hypers=torch.empty(0, device="cpu"),
            dtypes=tuple(DTYPE_CODE[dtype] for dtype in self.dtypes),
            workspace=torch.zeros(1 + len(chunks), dtype=torch.float64, device=self.device),
        )
        self.domains = _domains(entries)
        self._chunks_of = [self._tables.chunks]  # of each domain
        if len(self.domains) > 1:
            domain_of = torch.tensor([entry.domain for entry in entries], device="cpu")[chunks[:, 0]]
            parts = [chunks[domain_of == domain] for domain in self.domains]
            self._chunks_of = [DeviceTable(self.device).upload(part) for part in parts]
        self._lrs: list[Tensor] = []  # tensors that the table of hypers points to
        self._captured: list[object] = []  # what graphs read at each replay

    def set_grads(self, addresses: Tensor) -> None:
        """Note the table of gradients, int64 on the device: an address for each slot of the plan."""
        self._tables.grads = addresses

    def set_hypers(self, hypers: Sequence[Hyper]) -> None:
        """Write the table of hyper-parameters, one row per group."""
        self._lrs = []
        table = hyper_table([self._hyper_row(hyper) for hyper in hypers])
        self._tables.hypers = table if self._hypers_on_host else self._hypers_table.upload(table)

    def _hyper_row(self, hyper: Hyper) -> dict[str, float | int]:
        """The fields of struct Hyper; keeps what they point to."""
        row = hyper._asdict()
        row["grad_sign"] = -1.0 if row.pop("maximize") else 1.0
        if isinstance(hyper.lr, Tensor):
            if self.device.type == "cpu":
                row["lr"] = float(hyper.lr)
            else:
                self._lrs.append(hyper.lr.to(self.device))
                row["lr"], row["lr_address"] = 0.0, self._lrs[-1].data_ptr()
        return row

    def keep_for_graph(self) -> None:
        """Keep the present tables for as long as this bucket lives: a captured graph reads them."""
        self._captured.append((self._tables.grads, self._tables.hypers, self._lrs))

    def sum_of_squares(self, grads: Sequence[Tensor | None], sums: Sequence[Tensor]) -> None:
        """Write the sum of squares of each domain's gradients to its tensor of one float64."""
        for chunks, out in zip(self._chunks_of, sums, strict=True):
            self._backend.sum_of_squares(self._tables, chunks, out)

    def rehearse(self, tensors: Tensors, inputs: StepInputs) -> None:
        """Nothing to try: kernels are launched or not."""

    def update(self, tensors: Tensors, inputs: StepInputs) -> None:
        """Step every row that has a gradient: mutates parameters, moments and step counts."""
        self._backend.update(self._tables, inputs)


class TensorBucket:
    """Parameters of one device that no kernel can step, left to the reference one by one.

    Even without parameters it computes and reports the gradient norm and skipped steps.
    """

    def __init__(
        self, parts: Sequence[tuple[Member, Entry]], device: torch.device, backend: ReferenceBackend
    ) -> None:
        self.device = device
        entries = [entry for _, entry in parts]
        self.domains = _domains(entries)
        self._members = [member for member, _ in parts]
        self.slots = [member.slot for member in self._members]
        # A parameter that is listed twice is stepped twice, as in torch, but has one gradient.
        once = {id(entry.param): entry for entry in entries}.values()
        self._slots_of = [[e.slot for e in once if e.domain == domain] for domain in self.domains]
        self._hypers: Sequence[Hyper] = ()
        self._backend = backend

    def set_hypers(self, hypers: Sequence[Hyper]) -> None:
        """Note the hyper-parameters of every group."""
        self._hypers = hypers

    def keep_for_graph(self) -> None:
        """Nothing to keep: a graph keeps the memory that torch's operators allocate in it."""

    def sum_of_squares(self, grads: Sequence[Tensor | None], sums: Sequence[Tensor]) -> None:
        """Write the sum of squares of each domain's gradients to its tensor of one element."""
        for mine, out in zip(self._slots_of, sums, strict=True):
            self._backend.sum_of_squares([g for slot in mine if (g := grads[slot]) is not None], out)

    def rehearse(self, tensors: Tensors, inputs: StepInputs) -> None:
        """Raise what `update` would raise: a tensor subclass may lack an operator, memory may be short."""
        self._backend.rehearse(*self._present(tensors), self._hypers, inputs)

    def update(self, tensors: Tensors, inputs: StepInputs) -> None:
        """Step every parameter that has a gradient: mutates parameters, moments and step counts."""
        self._backend.update(*self._present(tensors), self._hypers, inputs)

    def _present(self, tensors: Tensors) -> tuple[list[Entry], list[Tensor]]:
        pairs = [(m.entry(tensors), g) for m in self._members if (g := tensors.grads[m.slot]) is not None]
        return [entry for entry, _ in pairs], [grad for _, grad in pairs]


Bucket = TableBucket | TensorBucket


def _rows(entries: Sequence[Entry]) -> Tensor:
    """The rows of the entries, on the host."""
    maxima = [entry.max_exp_avg_sq for entry in entries]
    slots = [entry.slot for entry in entries]
    return row_table(
        len(entries),
        param=[entry.param.data_ptr() for entry in entries],
        exp_avg=[entry.exp_avg.data_ptr() for entry in entries],
        exp_avg_sq=[entry.exp_avg_sq.data_ptr() for entry in entries],
        # Never nowhere under amsgrad, even if it is empty.
        max_exp_avg_sq=[0 if v_max is None else v_max.data_ptr() or 1 for v_max in maxima],
        step=[entry.step.data_ptr() for entry in entries],
        numel=[entry.param.numel() for entry in entries],
        hyper=[entry.group for entry in entries],
        slot=slots,
        ordinal=slots,
    )


def _domains(entries: Iterable[Entry]) -> list[int]:
    """The domains of the norm that a bucket's gradients belong to."""
    return list(dict.fromkeys(entry.domain for entry in entries))
