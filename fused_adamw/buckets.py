"""Buckets: parameters of one device that one backend steps together."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .memory import PLAIN, is_dense, same_layout
from .tables import (
    DTYPE_CODE,
    GRAD,
    HYPER_WORDS,
    DeviceTable,
    Entry,
    Hyper,
    StepInputs,
    chunk_table,
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

    @property
    def sum_of_squares(self) -> Callable[..., None]:
        """The operator `fused_adamw::sum_of_squares`."""

    @property
    def update(self) -> Callable[..., None]:
        """The operator `fused_adamw::update`."""


class ReferenceBackend(Protocol):
    """Plain PyTorch on lists of tensors."""

    def sum_of_squares(self, grads: Sequence[Tensor], out: Tensor) -> None:
        """Write the sum of squares of all gradients to `out`."""

    def update(
        self, entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
    ) -> None:
        """Step every entry."""


def why_not_tabular(entry: Entry, grad: Tensor | None, backend: KernelBackend) -> str | None:
    """None if kernels can step this parameter by address and flat index, else the reason."""
    tensors = {"parameter": entry.param, "exp_avg": entry.exp_avg, "exp_avg_sq": entry.exp_avg_sq}
    if entry.max_exp_avg_sq is not None:
        tensors["max_exp_avg_sq"] = entry.max_exp_avg_sq
    moment_dtypes = {t.dtype for name, t in tensors.items() if name != "parameter"}
    if grad is not None:
        tensors["gradient"] = grad
    for name, t in tensors.items():
        if type(t) not in PLAIN:
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
    if not backend.supports(entry.param.device, *dtypes):
        return "no kernel for parameter, gradient, moments of " + ", ".join(map(str, dtypes))
    return None


class TableBucket:
    """Parameters of one device and one set of dtypes, stepped by kernels in one launch."""

    def __init__(self, entries: list[Entry], n_hypers: int, backend: KernelBackend) -> None:
        first = entries[0]
        self.device = first.param.device
        self.slots = [entry.slot for entry in entries]
        self._slots = torch.tensor(self.slots, device="cpu")
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
        chunks = chunk_table(numels, self._chunk_size)
        self._chunks = DeviceTable(self.device).upload(chunks)
        self.domains = _domains(entries)
        self._chunks_of = [self._chunks]  # of each domain
        if len(self.domains) > 1:
            domain_of = torch.tensor([entry.domain for entry in entries], device="cpu")[chunks[:, 0]]
            parts = [chunks[domain_of == domain] for domain in self.domains]
            self._chunks_of = [DeviceTable(self.device).upload(part) for part in parts]
        self._workspace = torch.zeros(1 + len(self._chunks), dtype=torch.float64, device=self.device)
        self._hypers = torch.empty(0, device="cpu")
        self._lrs: list[Tensor] = []  # tensors that the table of hypers points to

    def set_grads(self, addresses: array[int]) -> None:
        """Write the gradient address of every row: `addresses` has one for each slot of the plan."""
        self._rows_host[:, GRAD] = torch.frombuffer(addresses, dtype=torch.int64)[self._slots]
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

    def sum_of_squares(self, grads: Sequence[Tensor | None], sums: Sequence[Tensor]) -> None:
        """Write the sum of squares of each domain's gradients to its tensor of one float64."""
        for chunks, out in zip(self._chunks_of, sums, strict=True):
            self._backend.sum_of_squares(
                self._rows, chunks, self._chunk_size, self._codes[1], self._workspace, out
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


class TensorBucket:
    """Parameters of one device that no kernel can step, left to the reference one by one.

    Even without parameters it computes and reports the gradient norm and skipped steps.
    """

    def __init__(self, entries: list[Entry], device: torch.device, backend: ReferenceBackend) -> None:
        self.device = device
        self.domains = _domains(entries)
        self.slots = [entry.slot for entry in entries]
        self._entries = entries
        # A parameter that is listed twice is stepped twice, as in torch, but has one gradient.
        self._once = list({id(entry.param): entry for entry in entries}.values())
        self._hypers: Sequence[Hyper] = ()
        self._backend = backend

    def set_grads(self, addresses: array[int]) -> None:
        """Nothing to note: gradients are taken as tensors."""

    def set_hypers(self, hypers: Sequence[Hyper]) -> None:
        """Note the hyper-parameters of every group."""
        self._hypers = hypers

    def sum_of_squares(self, grads: Sequence[Tensor | None], sums: Sequence[Tensor]) -> None:
        """Write the sum of squares of each domain's gradients to its tensor of one element."""
        for domain, out in zip(self.domains, sums, strict=True):
            mine = [e.slot for e in self._once if e.domain == domain]
            self._backend.sum_of_squares([g for slot in mine if (g := grads[slot]) is not None], out)

    def update(self, grads: Sequence[Tensor | None], inputs: StepInputs) -> None:
        """Step every parameter that has a gradient: mutates parameters, moments and step counts."""
        pairs = [(e, g) for e in self._entries if (g := grads[e.slot]) is not None]
        self._backend.update([e for e, _ in pairs], [g for _, g in pairs], self._hypers, inputs)


Bucket = TableBucket | TensorBucket


def _domains(entries: Iterable[Entry]) -> list[int]:
    """The domains of the norm that a bucket's gradients belong to."""
    return list(dict.fromkeys(entry.domain for entry in entries))
