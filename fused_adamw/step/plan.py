"""Plan: one optimizer step as data.

Rows say where parameters live, chunks share out the work, hypers say how each group is stepped; csrc/tables.h
has the same layouts in C++. Buckets hold these tables, each for one launch.

A plan is built once and kept as long as it is valid: every step reads all addresses again and compares. New
addresses of gradients are a table of their own; where parameters or state have moved, their rows are written
anew; any other change makes the plan stale, and the optimizer builds another.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device import DeviceTable, is_capturing, is_gpu, scalar_dtype
from ..dtensors import is_flattened
from ..fields import AVERAGE, MAXIMUM, Rounding, State
from ..formats import Formats
from ..interrupts import InterruptsHeld
from ..layout import Spans
from ..tables import Hyper, StepInputs, status_words
from .copies import GradCopies
from .guard import Found, Guard
from .launch import Bucket, TableBucket, TensorBucket
from .members import Kind, Member, Tensors
from .norm import Reduction, Sums
from .protocols import KernelBackend, ReferenceBackend
from .request import Request
from .snapshot import Form, Snapshot
from .statistics import LastStep, ParamStats, param_stats


class Launch(NamedTuple):
    """A bucket to run, and where it reports."""

    bucket: Bucket
    sums: list[Tensor]  # one element for each of the bucket's sum groups: its sum of squares
    status: Tensor  # float64: struct Status, and the history of spikes. All launches report the same


class Plan:
    """The buckets of one optimizer, and the means to tell whether they are still valid.

    It keeps no parameter and no state alive: what the optimizer lets go of is freed.

    Args:
        groups: The optimizer's `param_groups`.
        grads: The gradients of all parameters, `local_grads` of them.
        state: The optimizer's state; every parameter that has a gradient must have its own.
        kernels_for: The kernels that serve a device, None for the reference.
        reference: The reference backend.
        rounding: What is rounded stochastically.
        has_averages: Whether a step reads the averages in the state.
        window: Of the history of spikes.
        status: The status that the previous plan left for its first bucket.
        previous: The previous plan, which knows the layout of gradients that are absent now.

    Attributes:
        launches: What to run, at least one: the reference, which may raise, before kernels.
        flattened: Slots of parameters that FSDP1 flattened.
        fallbacks: Slot to the reason why kernels that serve its device do not step it.
        copies: Of gradients that kernels cannot read where they are.
        was_captured: Whether a graph holds a step of this plan, and reads its tables at each replay.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Tensor]],
        kernels_for: Callable[[torch.device], KernelBackend | None],
        reference: ReferenceBackend,
        rounding: Rounding,
        has_averages: bool,
        window: int,
        status: Tensor | None,
        previous: Plan | None,
    ) -> None:
        params: list[Tensor] = [p for group in groups for p in group["params"]]
        snapshot = Snapshot(params, grads, state)
        self.flattened = [slot for slot, p in enumerate(params) if is_flattened(p)]
        self._reduction = Reduction(params)
        self._structure = self._structure_of(groups)
        self._grads_version: int | None = None  # of the table that the launches have
        self._grad_addresses: Tensor | None = None  # in it, where it is a copy
        self._grads_in_place: Tensor | None = None  # the table itself, where all launches read it on the host
        self._hyper_keys: list[tuple[object, ...]] | None = None
        self._hypers: list[Hyper] = []
        self._tables_are_of_graph = False
        self.was_captured = False
        self._has_run = False
        self._last: LastStep | None = None
        self._steady: tuple[Request, list[tuple[Bucket, StepInputs]]] | None = None  # of the last step
        self.fallbacks: dict[int, str] = {}
        self._snapshot = snapshot
        self._expected = self._expected_grads(previous)
        self._needs_inference_mode = any(form.is_inference for form in set(snapshot.forms))
        self._spans = Spans([form.span for form in snapshot.forms])
        addresses = torch.frombuffer(snapshot.addresses or array("q", [0]), dtype=torch.int64)
        self._shared = self._spans.overlapping(addresses)

        self.launches: list[Launch] = []
        self._sums = Sums(self._reduction)
        self._grad_tables: dict[torch.device, DeviceTable] = {}
        kernels_for = functools.cache(kernels_for)
        self._unread = {MAXIMUM} if has_averages else {MAXIMUM, AVERAGE}
        members = self._members(groups, rounding, kernels_for)
        for device, by_formats in self._parts(members).items():
            buckets = [
                TableBucket(part, device, formats, len(groups), walker, addresses)
                if formats is not None and (walker := kernels_for(device)) is not None
                else TensorBucket(part, device, reference)
                for formats, part in sorted(by_formats.items(), key=lambda item: item[0] is not None)
            ]
            if status is None:
                status = torch.zeros(status_words(window), dtype=scalar_dtype(device), device=device)
            self._add_launches(device, buckets, status)
        self.copies = GradCopies(member for member in members if member.slot not in self.fallbacks)
        self._gpus = list(filter(is_gpu, self._sums.by_device))
        self._guard = self._new_guard(params)
        snapshot.forget()

    def _new_guard(self, params: Sequence[Tensor]) -> Guard | None:
        """The check in C++, where there is one for these tensors."""
        try:
            by_objects = bool(self.copies.layouts) or any(
                isinstance(bucket, TensorBucket) and bucket.slots for bucket, _, _ in self.launches
            )
            return Guard(params, self._expected, self._snapshot, by_objects=by_objects)
        except RuntimeError:
            return None

    def _expected_grads(self, previous: Plan | None) -> list[Form | None]:
        """What gradients look like: as the present one, the last one seen, or the parameter.

        None where there must be none: the parameter has no state yet.
        """
        snapshot = self._snapshot
        seen = {} if previous is None else dict(zip(previous._snapshot.ids, previous._expected, strict=True))
        return [
            (grad or seen.get(id_) or snapshot.form(slot).of_grad())
            if "step" in snapshot.places(slot)[1]
            else None
            for slot, (grad, id_) in enumerate(zip(snapshot.grads, snapshot.ids, strict=True))
        ]

    def _members(
        self,
        groups: Sequence[Mapping[str, Any]],
        rounding: Rounding,
        kernels_for: Callable[[torch.device], KernelBackend | None],
    ) -> list[Member]:
        """The parameters to step: those that have had a gradient."""
        snapshot, slot, members = self._snapshot, -1, []
        n_state = len(snapshot.forms) - len(snapshot.ids)
        kinds: dict[object, Kind] = {}
        for group, options in enumerate(groups):
            amsgrad = bool(options["amsgrad"])
            for index in range(len(options["params"])):
                slot += 1
                if (grad := self._expected[slot]) is None:
                    continue
                p, (start, names) = snapshot.form(slot), snapshot.places(slot)
                of_state = snapshot.forms[start : start + len(names)]
                key = (p, grad, amsgrad, *names, *of_state)
                if key not in kinds:
                    unread = self._unread - ({MAXIMUM} if amsgrad else set())
                    read = [name for name in names if name not in unread]
                    forms = {name: of_state[names[name]] for name in read}
                    forms = {"parameter": p, "gradient": grad, **forms}
                    kind = Kind.of(forms, rounding, kernels_for(p.device))
                    if kind is None:
                        raise RuntimeError(_NO_WINDOW.format(index, group, p.key[-1].placements))
                    kinds[key] = kind
                members.append(
                    Member(
                        slot,
                        group,
                        index,
                        snapshot.ids[slot],
                        self._reduction.sum_group_of[slot],
                        kinds[key],
                        n_state + slot,
                        start,
                        names,
                    )
                )
        return members

    def _parts(self, members: Sequence[Member]) -> _Parts:
        """Put together what one launch can step, on each device; notes `fallbacks`."""
        snapshot = self._snapshot
        parts: _Parts = {}
        part_of: dict[tuple[int, bool], list[Member]] = {}
        for member in members:
            kind, reason = member.kind, member.kind.fallback
            if kind.in_rows is not None and self._shared:
                reason = self._shared_reason(member)
            formats = kind.in_rows if reason is None else None
            key = (id(kind), formats is not None)
            if key not in part_of:
                device = snapshot.forms[member.place].device
                part_of[key] = parts.setdefault(device, {}).setdefault(formats, [])
            part_of[key].append(member)
            if reason is not None:
                self.fallbacks[member.slot] = reason
        if not parts:  # norm and skipped steps are reported even if there is nothing to step
            parts[snapshot.forms[-1].device if snapshot.forms else torch.device("cpu")] = {None: []}
        return parts

    def _shared_reason(self, member: Member) -> str | None:
        """Why rows that are stepped at the same time would step on each other."""
        places = {"parameter": member.place}
        places |= {name: member.place_of_state + i for name, i in member.places_in_state.items()}
        shared = [name for name, place in places.items() if place in self._shared]
        return f"{shared[0]} shares memory with another one" if shared else None

    def _add_launches(self, device: torch.device, buckets: Sequence[Bucket], status: Tensor) -> None:
        """Give the buckets of a device their places for sums of squares, and a status each."""
        places = self._sums.add(device, [bucket.sum_groups for bucket in buckets])
        for bucket, of_bucket in zip(buckets, places, strict=True):
            own_status = status.to(device, scalar_dtype(device), copy=True)
            self.launches.append(Launch(bucket, of_bucket, own_status))
            if isinstance(bucket, TableBucket):
                self._grad_tables[device] = DeviceTable(device)

    @staticmethod
    def _structure_of(groups: Sequence[Mapping[str, Any]]) -> list[object]:
        return [(len(group["params"]), bool(group["amsgrad"])) for group in groups]

    def check(self, groups: Sequence[Mapping[str, Any]], state: State) -> Found | None:
        """What a step needs, if one call shows that the plan is current; None: `is_current` can tell.

        Args:
            groups: The optimizer's `param_groups` now.
            state: The optimizer's state now.
        """
        if self._guard is None or not self._is_for(groups):
            return None
        found = self._guard.check([group["params"] for group in groups], state)
        if found is None or (found.moved is not None and not self._move(found.moved)):
            return None
        return found

    def is_current(self, groups: Sequence[Mapping[str, Any]], snapshot: Snapshot) -> bool:
        """Whether the plan describes the optimizer, up to gradient addresses and hyper-parameters.

        Where all that has changed is where tensors are, the plan follows them.

        Args:
            groups: The optimizer's `param_groups` now.
            snapshot: Its parameters, state and gradients now.
        """
        if not self._is_for(groups) or not snapshot.matches(self._snapshot, self._expected):
            return False
        is_moved = snapshot.addresses != self._snapshot.addresses
        return not is_moved or self._move(snapshot.addresses.tobytes())

    def _move(self, addresses: bytes) -> bool:
        """Follow tensors to other addresses: an int64 each, as in `Snapshot.addresses`.

        False: it takes another plan, as they share memory where they did not, or the other way round, or as a
        graph is being captured, which would write the rows at each replay.
        """
        numbers = array("q", addresses)
        table = torch.frombuffer(numbers, dtype=torch.int64)
        if any(map(is_capturing, self._sums.by_device)) or self._spans.overlapping(table) != self._shared:
            return False
        for bucket, _, _ in self.launches:
            if isinstance(bucket, TableBucket):
                bucket.place(table)
        # Last: a move that was interrupted is seen again.
        self._snapshot.addresses = numbers
        if self._guard is not None:
            self._guard.move(addresses)
        return True

    def _is_for(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether groups have the known structure, and tensors made in inference mode may be written to."""
        return self._structure_of(groups) == self._structure and (
            not self._needs_inference_mode or torch.is_inference_mode_enabled()
        )

    def run(
        self,
        tensors: Tensors,
        found: Found,
        hypers: list[Hyper],
        request: Request,
        before_updates: Callable[[StepInputs], Callable[[], None]],
    ) -> None:
        """Step: mutates parameters, moments and step counts.

        What may fail comes before anything is written, as far as it can. A kernel launch that raises has not
        run; the reference steps one parameter after the other, and memory may run out between them.

        Args:
            tensors: What the optimizer holds.
            found: Where it is now.
            hypers: How each group is stepped.
            request: What else the step is asked for.
            before_updates: Called with the first launch's inputs when the norm is known and nothing has
                changed yet; may raise. What it returns undoes what it has done.
        """
        found = self.copies.within(found)
        self.prepare(hypers, found)
        if request.needs_norm:
            self.sum_of_squares(found.grads or ())
        sums, found_inf = self._sums.totals(request.needs_norm, request.found_inf, request.norm_group)
        runs = self._runs(request, sums, found_inf)
        self._last = LastStep(found.present, request.needs_norm, request.stats)
        for bucket, inputs in runs:
            bucket.prepare(inputs, request.stats)
        if not self._has_run:
            for bucket, inputs in runs:
                bucket.rehearse(tensors, inputs)
        # One launch of kernels that is all there is to do needs no protection: it has run, or it has not.
        (first, first_inputs), *others = runs
        is_whole = self._has_run and not others and isinstance(first, TableBucket)
        with nullcontext() if is_whole else InterruptsHeld():
            undo = before_updates(first_inputs)
            try:
                found.count_changes()
                self._has_run = True
                first.update(tensors, first_inputs)
            except Exception:
                if isinstance(first, TableBucket):
                    undo()
                raise
            for bucket, inputs in others:
                bucket.finish(tensors, inputs)

    def observe(self) -> dict[int, ParamStats] | None:
        """What the last step found, by the id of each parameter that had a gradient.

        The host waits for the devices; with DTensors it is a collective of each mesh.

        Returns:
            None: there was no step, or nothing was asked of it: it had no norm pass, and no stats.
        """
        if self._last is None or not (self._last.has_norm or self._last.has_stats):
            return None
        buckets = [bucket for bucket, _, _ in self.launches]
        return param_stats(self._snapshot.ids, buckets, self._reduction, self.status, self._last)

    def _runs(
        self, request: Request, sums: dict[torch.device, Tensor], found_inf: Tensor | None
    ) -> list[tuple[Bucket, StepInputs]]:
        """What to run, with what each launch needs to know: the same objects while nothing changes."""
        own_sums = not sums or sums is self._sums.by_device
        is_steady = own_sums and request.grad_scale is None and found_inf is None and request.loss is None
        if self._steady is not None and is_steady and request == self._steady[0]:
            return self._steady[1]
        runs = [
            (bucket, request.inputs(status, sums.get(bucket.device), found_inf))
            for bucket, _, status in self.launches
        ]
        self._steady = (request, runs) if is_steady else None
        return runs

    @property
    def status(self) -> Tensor:
        """float64: struct Status, and the history of spikes."""
        return self.launches[0].status

    def prepare(self, hypers: list[Hyper], found: Found) -> None:
        """Bring gradient addresses and hyper-parameters up to date, where they changed.

        The tables of a captured step are left to its graph, which may even be what fills them: the next step
        uploads its own.
        """
        if self._tables_are_of_graph:
            self._grads_version = self._grad_addresses = self._grads_in_place = self._hyper_keys = None
        is_current = found.version is not None and found.version == self._grads_version
        if not is_current and found.addresses is not self._grads_in_place:
            self._grads_version = None  # until all buckets have them
            self._set_grads(found.addresses)
            self._grads_version = found.version
        keys = [hyper.key() for hyper in hypers]
        if keys != self._hyper_keys or self._reads_lr_of_another_device(hypers):
            self._hyper_keys = None
            for bucket, _, _ in self.launches:
                bucket.set_hypers(hypers)
            self._hyper_keys = keys
        self._hypers = hypers  # keeps the tensors that tables point to
        self._tables_are_of_graph = any(map(is_capturing, self._gpus))
        if self._tables_are_of_graph:
            self.was_captured = True
            for bucket, _, _ in self.launches:
                bucket.keep_for_graph()

    def _set_grads(self, addresses: Tensor) -> None:
        """Give the buckets the addresses of gradients. A device that has the same ones keeps its table."""
        before, self._grad_addresses, self._grads_in_place = self._grad_addresses, None, None
        is_same = before is not None and torch.equal(before, addresses[: len(before)])
        for device, table in self._grad_tables.items():
            if is_same and device.type != "cpu":
                continue
            on_device = table.upload(addresses)
            for bucket, _, _ in self.launches:
                if isinstance(bucket, TableBucket) and bucket.device == device:
                    bucket.set_grads(on_device)
        if all(device.type == "cpu" for device in self._grad_tables):  # the guard writes it
            self._grads_in_place = addresses
        else:
            self._grad_addresses = addresses.clone()

    def sum_of_squares(self, grads: Sequence[Tensor | None]) -> None:
        """Sum the squares of this process's gradients, one sum for each launch and sum group."""
        for bucket, places, _ in self.launches:
            bucket.sum_of_squares(grads, places)

    def _reads_lr_of_another_device(self, hypers: Iterable[Hyper]) -> bool:
        return any(
            hyper.lr.device != device
            for hyper in hypers
            if isinstance(hyper.lr, Tensor)
            for device in self._sums.by_device
        )


# On each device, by how it is kept (None: left to the reference): what one launch can step.
_Parts = dict[torch.device, dict[Formats | None, list[Member]]]

_NO_WINDOW = (
    "parameter number {} of group {} is placed as {}: the elements that this process has cannot be numbered, "
    "which stochastic rounding takes. Shard it along one dimension, or pass stochastic_rounding=False."
)
