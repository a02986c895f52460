"""Plan: one optimizer step as data.

Rows say where parameters live, chunks share out the work, hypers say how each group is stepped; csrc/tables.h
has the same layouts in C++.

A plan is built once and kept as long as it is valid: every step reads all addresses again and compares. New
addresses of gradients are written into the rows; any other change makes the plan stale, and the optimizer
builds another.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .distributed import NormGroup, Reduction, held, is_dtensor, is_flattened
from .memory import PLAIN, Gradients, Guard, State, is_dense, overlapping, same_layout
from .tables import (
    DTYPE_CODE,
    GRAD,
    HYPER_WORDS,
    KERNEL_DTYPES,
    DeviceTable,
    Entry,
    Hyper,
    StepInputs,
    chunk_table,
    scalar_dtype,
)


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


class ReferenceBackend(Protocol):
    """Plain PyTorch on lists of tensors."""

    def sum_of_squares(self, grads: Sequence[Tensor], out: Tensor) -> None:
        """Write the sum of squares of all gradients to `out`."""

    def update(
        self, entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
    ) -> None:
        """Step every entry."""


def why_not_tabular(entry: Entry, grad: Tensor | None) -> str | None:
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
    if dtypes not in KERNEL_DTYPES:
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
            mine = [e.slot for e in self._entries if e.domain == domain]
            self._backend.sum_of_squares([g for slot in mine if (g := grads[slot]) is not None], out)

    def update(self, grads: Sequence[Tensor | None], inputs: StepInputs) -> None:
        """Step every parameter that has a gradient: mutates parameters, moments and step counts."""
        pairs = [(e, g) for e in self._entries if (g := grads[e.slot]) is not None]
        self._backend.update([e for e, _ in pairs], [g for _, g in pairs], self._hypers, inputs)


Bucket = TableBucket | TensorBucket


class Launch(NamedTuple):
    """A bucket to run, and where it reports."""

    bucket: Bucket
    sums: list[Tensor]  # one element for each of the bucket's domains: its sum of squares
    status: Tensor  # float64 (2,): the gradient norm, steps skipped so far. All launches report the same


def _domains(entries: Iterable[Entry]) -> list[int]:
    """The domains of the norm that a bucket's gradients belong to."""
    return list(dict.fromkeys(entry.domain for entry in entries))


class Plan:
    """The buckets of one optimizer, and the means to tell whether they are still valid.

    Args:
        groups: The optimizer's `param_groups`.
        grads: The gradients of all parameters, `held_grads` of them.
        state: The optimizer's state; every parameter that has a gradient must have its own.
        kernels_for: The kernels that serve a device, None for the reference.
        reference: The reference backend.
        status: The status that the previous plan left for its first bucket.
        previous: The previous plan, which knows the layout of gradients that are absent now.

    Attributes:
        launches: What to run, at least one.
        stepped: After `prepare`, the parameters that have a gradient, and the local tensors of DTensors among
            them: autograd may have saved either.
        flattened: Slots of parameters that FSDP1 flattened.
        fallbacks: Slot to the reason why kernels that serve its device do not step it.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Tensor]],
        kernels_for: Callable[[torch.device], KernelBackend | None],
        reference: ReferenceBackend,
        status: Tensor | None,
        previous: Plan | None,
    ) -> None:
        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self.flattened = [slot for slot, p in enumerate(self._params) if is_flattened(p)]
        self._reduction = Reduction(self._params)
        self._structure = self._structure_of(groups)
        local_params: list[Tensor] = held(self._params)
        self._expected = [self._expected_grad(slot, grad, previous) for slot, grad in enumerate(grads)]
        self._grad_addresses: bytes | None = None
        self.stepped: list[Tensor] = []
        self._hyper_keys: list[tuple[object, ...]] | None = None
        self._hypers: list[Hyper] = []
        self.fallbacks: dict[int, str] = {}

        alike: dict[tuple[Any, ...], list[Entry]] = {}
        shared = overlapping(local_params)
        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        for slot, (p, group) in enumerate(zip(local_params, group_of, strict=True)):
            if "step" not in (s := state.get(self._params[slot], {})):
                continue  # no gradient so far
            grad = self._expected[slot] if grads[slot] is None else grads[slot]
            v_max = s["max_exp_avg_sq"] if groups[group]["amsgrad"] else None
            m, v, v_max = held((s["exp_avg"], s["exp_avg_sq"], v_max))
            grad_dtype = self._expected[slot].dtype
            domain = self._reduction.domain_of[slot]
            entry = Entry(slot, group, domain, p, m, v, v_max, s["step"], grad_dtype)
            key: tuple[Any, ...] = (p.device,)
            if kernels_for(p.device) is not None:
                reason = why_not_tabular(entry, grad)
                if reason is None and slot in shared:  # rows are stepped at the same time
                    reason = "parameter shares memory with another one"
                if reason is not None:
                    self.fallbacks[slot] = reason
                else:
                    key = (p.device, p.dtype, grad_dtype, entry.exp_avg.dtype)
            alike.setdefault(key, []).append(entry)
        if not alike:  # the norm and the steps skipped are to be known here, too
            home = local_params[0].device if local_params else torch.device("cpu")
            alike[(home,)] = []

        self.launches: list[Launch] = []
        self._sums: dict[torch.device, Tensor] = {}
        self._sums_of: list[list[Tensor]] = [[] for _ in range(self._reduction.n_domains)]
        for device in {key[0]: None for key in alike}:
            kernels = kernels_for(device)
            buckets: list[Bucket] = [
                TensorBucket(entries, device, reference)
                if kernels is None or len(key) == 1
                else TableBucket(entries, len(groups), kernels)
                for key, entries in alike.items()
                if key[0] == device
            ]
            # In the order of domains, so that the sums of each are neighbours.
            parts = sorted((domain, i) for i, bucket in enumerate(buckets) for domain in bucket.domains)
            sums = torch.zeros(len(parts), dtype=scalar_dtype(device), device=device)
            place = {part: sums[i : i + 1] for i, part in enumerate(parts)}
            for domain in {domain for domain, _ in parts}:
                mine = [i for i, part in enumerate(parts) if part[0] == domain]
                self._sums_of[domain].append(sums[mine[0] : mine[-1] + 1])
            self._sums[device] = sums
            for i, bucket in enumerate(buckets):
                places = [place[domain, i] for domain in bucket.domains]
                if status is None:
                    status = torch.zeros(2, dtype=sums.dtype, device=device)
                self.launches.append(Launch(bucket, places, status.to(device, sums.dtype, copy=True)))
        self._reads_tensors = any(isinstance(b, TensorBucket) and b.slots for b, _, _ in self.launches)
        stepped = {slot for launch in self.launches for slot in launch.bucket.slots}
        known = [
            None if slot not in stepped else self._expected[slot] if grad is None else grad
            for slot, grad in enumerate(grads)
        ]
        self._guard = Guard(self._params, known, state)

    def _expected_grad(self, slot: int, grad: Tensor | None, previous: Plan | None) -> Tensor:
        """The layout of a gradient: of the present one, else of the last one seen, else of the parameter."""
        p = self._params[slot]
        if grad is None:
            known = previous is not None and slot < len(previous._params) and previous._params[slot] is p
            return previous._expected[slot] if previous is not None and known else held([p.detach()])[0]
        return torch.empty_strided(grad.shape, grad.stride(), dtype=grad.dtype, device="meta")

    @staticmethod
    def _structure_of(groups: Sequence[Mapping[str, Any]]) -> list[object]:
        return [(len(group["params"]), bool(group["amsgrad"])) for group in groups]

    def check(self, groups: Sequence[Mapping[str, Any]], state: State) -> Gradients | None:
        """The gradients, if one call shows that the plan is current; None if it takes `is_current` to tell.

        Args:
            groups: The optimizer's `param_groups` now.
            state: The optimizer's state now.
        """
        if self._structure_of(groups) != self._structure:
            return None
        addresses = self._guard.check([group["params"] for group in groups], state)
        if addresses is None:
            return None
        if not self._reads_tensors:
            return Gradients(addresses, ())
        return Gradients(addresses, held(p.grad for group in groups for p in group["params"]))

    def is_current(
        self,
        groups: Sequence[Mapping[str, Any]],
        params: list[Tensor],
        grads: Sequence[Tensor | None],
        state: State,
    ) -> bool:
        """Whether the plan still describes the optimizer, up to gradient addresses and hyper-parameters.

        Args:
            groups: The optimizer's `param_groups` now.
            params: All parameters of all groups now, in order.
            grads: Their gradients now, `held_grads` of them.
            state: The optimizer's state now.
        """
        return self._structure_of(groups) == self._structure and self._guard.matches(params, grads, state)

    def prepare(self, groups: Sequence[Mapping[str, Any]], grads: Gradients) -> None:
        """Bring gradient addresses and hyper-parameters up to date, where they changed."""
        if grads.addresses != self._grad_addresses:
            addresses = array("q", grads.addresses)
            for bucket, _, _ in self.launches:
                bucket.set_grads(addresses)
            stepped = list(compress(self._params, addresses))
            self.stepped = stepped + held(filter(is_dtensor, stepped))
            self._grad_addresses = grads.addresses
        hypers = [Hyper.of(group) for group in groups]
        keys = [hyper.key() for hyper in hypers]
        if keys != self._hyper_keys or self._reads_lr_of_another_device(hypers):
            for bucket, _, _ in self.launches:
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

    def sum_of_squares(self, grads: Sequence[Tensor | None]) -> None:
        """Sum the squares of this process's gradients, one sum per bucket and domain, for `totals`."""
        for bucket, sums, _ in self.launches:
            bucket.sum_of_squares(grads, sums)

    def totals(
        self, is_summed: bool, found_inf: Tensor | None, norm_group: NormGroup | None
    ) -> tuple[dict[torch.device, Tensor], Tensor | None]:
        """Sum the squares and `found_inf` over devices and processes.

        Args:
            is_summed: Whether `sum_of_squares` has run.
            found_inf: One element on any device: what a GradScaler found in this process.
            norm_group: Sums over the processes that hold the other parameters.

        Returns:
            For each device of the plan, a float64 vector whose sum is the sum of squares of all gradients,
            empty without `is_summed`; and `found_inf`, one element. The host waits only where an
            accelerator's sum has to reach the CPU or the other way round.
        """
        here = self._reduction.is_local and norm_group is None
        if here and (not is_summed or len(self._sums) == 1):
            return (self._sums if is_summed else {}), found_inf
        if not is_summed and found_inf is None:
            return {}, None
        own = next(iter(self._sums.values()))
        flag = own.new_zeros(()) if found_inf is None else torch.as_tensor(found_inf).to(own)
        by_domain = [self._sum_of(domain) if is_summed else None for domain in range(len(self._sums_of))]
        total, flag = self._reduction(by_domain, flag.reshape(()), norm_group)
        devices = self._sums if is_summed else ()
        sums = {device: total.to(device, self._sums[device].dtype).reshape(1) for device in devices}
        return sums, found_inf if here else flag

    def _sum_of(self, domain: int) -> Tensor | None:
        """The sum over a domain in this process, on the plan's first device; None if it has no gradients."""
        own = next(iter(self._sums.values()))
        sums = [part.sum().to(own) for part in self._sums_of[domain]]
        return functools.reduce(torch.add, sums) if sums else None
