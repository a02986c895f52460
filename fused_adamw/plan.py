"""Plan: one optimizer step as data.

Rows say where parameters live, chunks share out the work, hypers say how each group is stepped; csrc/tables.h
has the same layouts in C++. Buckets hold these tables, each for one launch.

A plan is built once and kept as long as it is valid: every step reads all addresses again and compares. New
addresses of gradients are written into the rows; any other change makes the plan stale, and the optimizer
builds another.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .buckets import (
    Bucket,
    KernelBackend,
    Member,
    ReferenceBackend,
    TableBucket,
    TensorBucket,
    why_not_tabular,
)
from .distributed import NormGroup, Reduction, is_flattened, local_tensors
from .memory import Gradients, Guard, State, Tensors, is_bound_to_inference, is_counted, overlapping
from .tables import DeviceTable, Entry, Hyper, is_capturing, scalar_dtype


class Launch(NamedTuple):
    """A bucket to run, and where it reports."""

    bucket: Bucket
    sums: list[Tensor]  # one element for each of the bucket's domains: its sum of squares
    status: Tensor  # float64 (2,): the gradient norm, steps skipped so far. All launches report the same


class Plan:
    """The buckets of one optimizer, and the means to tell whether they are still valid.

    It keeps no parameter and no state alive: what the optimizer lets go of is freed.

    Args:
        groups: The optimizer's `param_groups`.
        grads: The gradients of all parameters, `local_grads` of them.
        state: The optimizer's state; every parameter that has a gradient must have its own.
        kernels_for: The kernels that serve a device, None for the reference.
        reference: The reference backend.
        status: The status that the previous plan left for its first bucket.
        previous: The previous plan, which knows the layout of gradients that are absent now.

    Attributes:
        launches: What to run, at least one: the reference, which may raise, before kernels.
        flattened: Slots of parameters that FSDP1 flattened.
        fallbacks: Slot to the reason why kernels that serve its device do not step it.
        was_captured: Whether a graph holds a step of this plan, and reads its tables at each replay.
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
        params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._ids = list(map(id, params))
        self.flattened = [slot for slot, p in enumerate(params) if is_flattened(p)]
        self._reduction = Reduction(params)
        self._structure = self._structure_of(groups)
        self._grad_addresses: bytes | None = None
        self._hyper_keys: list[tuple[object, ...]] | None = None
        self._hypers: list[Hyper] = []
        self._tables_are_of_graph = False
        self.was_captured = False
        self.fallbacks: dict[int, str] = {}
        kernels_for = functools.cache(kernels_for)

        # The parameters to step: those that have had a gradient.
        stepped = {slot: p for slot, p in enumerate(params) if is_counted(state, p)}
        self._expected = {
            slot: self._expected_grad(slot, p, grads[slot], previous) for slot, p in stepped.items()
        }
        members = self._members(groups, stepped)
        tensors = Tensors(groups, state, grads)
        entries = [member.entry(tensors) for member in members]
        self._needs_inference_mode = any(
            is_bound_to_inference(t) for entry in entries for t in (entry.param, *entry.state().values())
        )
        self.launches: list[Launch] = []
        self._sums: dict[torch.device, Tensor] = {}
        self._grad_tables: dict[torch.device, DeviceTable] = {}
        self._sums_of: list[list[Tensor]] = [[] for _ in range(self._reduction.n_domains)]
        local_params = local_tensors(params)
        parts = self._parts(members, entries, local_params, grads, kernels_for)
        for device, buckets in self._buckets(parts, len(groups), kernels_for, reference).items():
            if status is None:
                status = torch.zeros(2, dtype=scalar_dtype(device), device=device)
            self._add_launches(device, buckets, status)
        known = [
            None if slot not in stepped else self._expected[slot] if grad is None else grad
            for slot, grad in enumerate(grads)
        ]
        self._guard = Guard(params, known, state)

    def _members(self, groups: Sequence[Mapping[str, Any]], stepped: Mapping[int, Tensor]) -> list[Member]:
        places = [(group, index) for group, g in enumerate(groups) for index in range(len(g["params"]))]
        return [
            Member(
                slot,
                *places[slot],
                self._reduction.domain_of[slot],
                bool(groups[places[slot][0]]["amsgrad"]),
                self._expected[slot].dtype,
            )
            for slot in stepped
        ]

    def _parts(
        self,
        members: Sequence[Member],
        entries: Sequence[Entry],
        local_params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        kernels_for: Callable[[torch.device], KernelBackend | None],
    ) -> _Parts:
        """Put together what one launch can step, on each device; notes `fallbacks`."""
        shared = _shared(entries, local_params)
        parts: _Parts = {}
        for member, entry in zip(members, entries, strict=True):
            slot, device = entry.slot, entry.param.device
            dtypes: tuple[torch.dtype, ...] = ()  # left to the reference
            if (backend := kernels_for(device)) is not None:
                grad = grads[slot]
                reason = why_not_tabular(entry, self._expected[slot] if grad is None else grad, backend)
                reason = reason or shared.get(slot)  # rows are stepped at the same time
                if reason is not None:
                    self.fallbacks[slot] = reason
                else:
                    dtypes = (entry.param.dtype, entry.grad_dtype, entry.exp_avg.dtype)
            parts.setdefault(device, {}).setdefault(dtypes, []).append((member, entry))
        if not parts:  # norm and skipped steps are reported even if there is nothing to step
            home = local_params[0].device if local_params else torch.device("cpu")
            parts[home] = {(): []}
        return parts

    @staticmethod
    def _buckets(
        parts: _Parts,
        n_groups: int,
        kernels_for: Callable[[torch.device], KernelBackend | None],
        reference: ReferenceBackend,
    ) -> dict[torch.device, list[Bucket]]:
        return {
            device: [
                TableBucket([entry for _, entry in pairs], n_groups, walker)
                if dtypes and (walker := kernels_for(device)) is not None
                else TensorBucket(pairs, device, reference)
                for dtypes, pairs in sorted(by_dtypes.items(), key=lambda item: item[0] != ())
            ]
            for device, by_dtypes in parts.items()
        }

    def _add_launches(self, device: torch.device, buckets: Sequence[Bucket], status: Tensor) -> None:
        """Give the buckets of a device their places in its vector of sums, and a status each."""
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
            self.launches.append(Launch(bucket, places, status.to(device, sums.dtype, copy=True)))
            if isinstance(bucket, TableBucket):
                self._grad_tables[device] = DeviceTable(device)

    @staticmethod
    def _expected_grad(slot: int, p: Tensor, grad: Tensor | None, previous: Plan | None) -> Tensor:
        """The layout of a gradient: of the present one, else of the last one seen, else of the parameter.

        A meta tensor: it has no memory to keep.
        """
        is_known = previous is not None and slot in previous._expected and previous._ids[slot] == id(p)
        if grad is None and previous is not None and is_known:
            return previous._expected[slot]
        like: Tensor = local_tensors([p])[0] if grad is None else grad
        with torch.inference_mode(False):
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")

    @staticmethod
    def _structure_of(groups: Sequence[Mapping[str, Any]]) -> list[object]:
        return [(len(group["params"]), bool(group["amsgrad"])) for group in groups]

    def check(self, groups: Sequence[Mapping[str, Any]], state: State) -> Gradients | None:
        """The gradients, if one call shows that the plan is current; None if it takes `is_current` to tell.

        Args:
            groups: The optimizer's `param_groups` now.
            state: The optimizer's state now.
        """
        if not self._is_for(groups):
            return None
        return self._guard.check([group["params"] for group in groups], state)

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
            grads: Their gradients now, `local_grads` of them.
            state: The optimizer's state now.
        """
        return self._is_for(groups) and self._guard.matches(params, grads, state)

    def _is_for(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether groups have the known structure, and tensors made in inference mode may be written to."""
        return self._structure_of(groups) == self._structure and (
            not self._needs_inference_mode or torch.is_inference_mode_enabled()
        )

    def prepare(self, hypers: list[Hyper], grads: Gradients) -> None:
        """Bring gradient addresses and hyper-parameters up to date, where they changed.

        The tables of a captured step are left to its graph, which may even be what fills them: the next step
        uploads its own.
        """
        if self._tables_are_of_graph:
            self._grad_addresses = self._hyper_keys = None
        if grads.addresses != self._grad_addresses:
            self._grad_addresses = None  # until all buckets have them
            addresses = array("q", grads.addresses)
            table = torch.frombuffer(addresses or array("q", [0]), dtype=torch.int64)
            on_device = {device: tables.upload(table) for device, tables in self._grad_tables.items()}
            for bucket, _, _ in self.launches:
                if isinstance(bucket, TableBucket):
                    bucket.set_grads(on_device[bucket.device])
            self._grad_addresses = grads.addresses
        keys = [hyper.key() for hyper in hypers]
        if keys != self._hyper_keys or self._reads_lr_of_another_device(hypers):
            self._hyper_keys = None
            for bucket, _, _ in self.launches:
                bucket.set_hypers(hypers)
            self._hyper_keys = keys
        self._hypers = hypers  # keeps the tensors that tables point to
        self._tables_are_of_graph = any(map(is_capturing, self._sums))
        if self._tables_are_of_graph:
            self.was_captured = True
            for bucket, _, _ in self.launches:
                bucket.keep_for_graph()

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


# On each device, by the dtypes of its tables (none for the reference): what one launch can step.
_Parts = dict[torch.device, dict[tuple[torch.dtype, ...], list[tuple[Member, Entry]]]]


def _shared(entries: Sequence[Entry], local_params: Sequence[Tensor]) -> dict[int, str]:
    """Slots of the entries that write to memory of another parameter or its state, and a reason for each."""
    owned = [(slot, "parameter", p) for slot, p in enumerate(local_params)]
    owned += [(entry.slot, name, t) for entry in entries for name, t in entry.state().items()]
    return {
        owned[i][0]: f"{owned[i][1]} shares memory with another one"
        for i in sorted(overlapping([t for _, _, t in owned]), reverse=True)
    }
