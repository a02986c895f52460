"""Buckets: parameters of one device that one backend steps together."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..device import DeviceTable, scalar_dtype
from ..fields import MAXIMUM
from ..formats import Formats
from ..tables import (
    ChunkStatsStruct,
    Entry,
    Hyper,
    StepInputs,
    Tables,
    chunk_table,
    format_codes,
    hyper_table,
    row_table,
    set_column,
    word_of,
    words,
)
from .members import Member, Tensors
from .protocols import KernelBackend, ReferenceBackend


class TableBucket:
    """Parameters of one device that are kept in the same formats, stepped by kernels in one launch.

    Args:
        members: The parameters.
        device: Where they are.
        formats: How kernels see the parameters, their gradients and moments.
        n_hypers: The number of groups.
        backend: The kernels.
        addresses: Where the tensors of the plan's snapshot are.
    """

    def __init__(
        self,
        members: Sequence[Member],
        device: torch.device,
        formats: Formats,
        n_hypers: int,
        backend: KernelBackend,
        addresses: Tensor,
    ) -> None:
        self.device = device
        self.slots = [member.slot for member in members]
        self.formats = formats
        self._backend = backend
        numels = [member.kind.numel for member in members]
        chunk_size = backend.chunk_size(device, sum(numels))
        self._hypers_on_host = n_hypers <= backend.max_host_hypers(device)
        self._rows_table, self._hypers_table = DeviceTable(device), DeviceTable(device)
        chunks = chunk_table(numels, chunk_size)
        self._rows = row_table(
            len(members),
            numel=numels,
            hyper=[member.group for member in members],
            slot=self.slots,
            ordinal=self.slots,
            offset=[member.kind.window.offset for member in members],
            local_columns=[member.kind.window.columns for member in members],
            columns=[member.kind.window.whole_columns for member in members],
        )
        self._places = {"step": _places([member.place_of("step") for member in members])}
        for name, format in formats.present.items():
            if name == "grad":
                continue
            self._places[name] = _places(
                [member.place_of(member.kind.keys[name].values) for member in members]
            )
            if format.side_dtype is not None:
                sides = [member.place_of(str(member.kind.keys[name].side)) for member in members]
                self._places[f"{name}.side"] = _places(sides)
        maxima = {i: member for i, member in enumerate(members) if MAXIMUM in member.kind.keys}
        self._maxima = _places(list(maxima))
        self._places_of_maxima = _places([member.place_of(MAXIMUM) for member in maxima.values()])
        self._tables = Tables(
            rows=self._rows,
            grads=torch.empty(0, dtype=torch.int64, device=device),
            chunks=DeviceTable(device).upload(chunks),
            chunk_size=chunk_size,
            hypers=torch.empty(0, device="cpu"),
            formats=tuple(format_codes(formats)),
            workspace=torch.zeros(1 + len(chunks), dtype=torch.float64, device=device),
            stats=new_stats(0, device),
        )
        self._no_stats = self._tables.stats
        self._stats: Tensor | None = None  # of the chunks, since they were first asked for
        self.sum_groups = _sum_groups(members)
        # Of each sum group its chunks, and where their sums of squares are left; which rows these are of.
        self._parts = [(self._tables.chunks, self._tables.workspace)]
        self._rows_of = [chunks[:, 0].long()]
        if len(self.sum_groups) > 1:
            sum_group_of = torch.tensor([member.sum_group for member in members], device="cpu")[chunks[:, 0]]
            parts = [chunks[sum_group_of == sum_group] for sum_group in self.sum_groups]
            self._parts = [
                (
                    DeviceTable(device).upload(part),
                    torch.zeros(1 + len(part), dtype=torch.float64, device=device),
                )
                for part in parts
            ]
            self._rows_of = [part[:, 0].long() for part in parts]
        self._lrs: list[Tensor] = []  # tensors that the table of hypers points to
        self._captured: list[object] = []  # what graphs read at each replay
        self.place(addresses)

    def place(self, addresses: Tensor) -> None:
        """Write where the tensors are: int64 on the host, as in the plan's snapshot."""
        for name, places in self._places.items():
            set_column(self._rows, name, addresses[places])
        if len(self._maxima):  # under amsgrad never nowhere, even if it is empty
            maxima = torch.zeros(len(self._rows), dtype=torch.int64, device="cpu")
            maxima[self._maxima] = addresses[self._places_of_maxima].clamp(min=1)
            set_column(self._rows, "max_exp_avg_sq", maxima)
        self._tables.rows = self._rows_table.upload(self._rows)

    def set_grads(self, addresses: Tensor) -> None:
        """Note the table of gradients, int64 on the device: an address for each slot of the plan."""
        self._tables.grads = addresses

    def keep_for_graph(self) -> None:
        """Keep the present tables for as long as this bucket lives: a captured graph reads them."""
        self._captured.append((self._tables.rows, self._tables.grads, self._tables.hypers, self._lrs))

    def set_hypers(self, hypers: Sequence[Hyper]) -> None:
        """Write the table of hyper-parameters, one row per group."""
        self._lrs = []
        table = hyper_table([self._hyper_row(hyper) for hyper in hypers])
        self._tables.hypers = table if self._hypers_on_host else self._hypers_table.upload(table)

    def _hyper_row(self, hyper: Hyper) -> dict[str, float | int]:
        """The fields of struct Hyper; keeps what they point to."""
        row = hyper._asdict()
        row["grad_sign"] = -1 if row.pop("maximize") else 1
        if isinstance(hyper.lr, Tensor):
            if self.device.type == "cpu":
                row["lr"] = float(hyper.lr)
            else:
                self._lrs.append(hyper.lr.to(self.device))
                row["lr"], row["lr_address"] = 0.0, self._lrs[-1].data_ptr()
        return row

    def sum_of_squares(self, grads: Sequence[Tensor | None], sums: Sequence[Tensor]) -> None:
        """Write the sum of squares of each sum group's gradients to its tensor of one float64."""
        tables = self._tables
        for (chunks, workspace), out in zip(self._parts, sums, strict=True):
            if workspace is not tables.workspace:
                tables = replace(tables, workspace=workspace)
            self._backend.sum_of_squares(tables, chunks, out)

    def squares(self) -> Tensor:
        """The sum of squares of the gradient in each of `slots`, as the last norm pass found it.

        The host waits for the device.

        Returns:
            float64 (len(slots),), on the host; 0 where there was no gradient.
        """
        total = torch.zeros(len(self.slots), dtype=torch.float64, device="cpu")
        for (_, workspace), rows in zip(self._parts, self._rows_of, strict=True):
            total.index_add_(0, rows, workspace[1:].cpu())
        return total

    def prepare(self, inputs: StepInputs, has_stats: bool) -> None:
        """Do what may fail of an update with these inputs.

        Args:
            inputs: Of the update.
            has_stats: Whether it leaves what `stats` reads.
        """
        if has_stats and self._stats is None:
            self._stats = new_stats(len(self._tables.chunks), self.device)
        self._tables.stats = self._no_stats if self._stats is None or not has_stats else self._stats
        inputs.record  # noqa: B018 - made when it is first read

    def stats(self) -> Tensor:
        """What the last update found out about each of `slots`, if it stepped them.

        The host waits for the device.

        Returns:
            float64 (len(slots), words of struct ChunkStats), on the host.
        """
        of_chunks, rows = self._tables.stats.cpu(), self._tables.chunks[:, 0].long().cpu()
        total = new_stats(len(self.slots), of_chunks.device).index_add_(0, rows, of_chunks)
        largest = word_of(ChunkStatsStruct, "grad_max")
        total[:, largest] = 0.0
        total[:, largest].scatter_reduce_(0, rows, of_chunks[:, largest], "amax")
        return total

    def rehearse(self, tensors: Tensors, inputs: StepInputs) -> None:
        """Nothing to try: kernels are launched or not."""

    def update(self, tensors: Tensors, inputs: StepInputs) -> None:
        """Step every row that has a gradient: mutates parameters, moments, averages and step counts."""
        self._backend.update(self._tables, inputs)

    def finish(self, tensors: Tensors, inputs: StepInputs) -> None:
        """As `update`, once a part of the step has run: a launch that fails is tried again."""
        try:
            self.update(tensors, inputs)
        except (MemoryError, RuntimeError):  # it has not run
            gc.collect()
            self.update(tensors, inputs)


class TensorBucket:
    """Parameters of one device that no kernel can step, left to the reference one by one.

    Even without parameters it computes and reports the gradient norm and skipped steps.
    """

    def __init__(self, members: Sequence[Member], device: torch.device, backend: ReferenceBackend) -> None:
        self.device = device
        self.sum_groups = _sum_groups(members)
        self._members = members
        self.slots = [member.slot for member in members]
        # A parameter that is listed twice is stepped twice, as in torch, but has one gradient.
        once = {member.id: member for member in members}.values()
        self._slots_of = [[m.slot for m in once if m.sum_group == sum_group] for sum_group in self.sum_groups]
        self._hypers: Sequence[Hyper] = ()
        self._backend = backend
        self._squares: dict[int, Tensor] = {}  # of the last norm pass, by slot
        self._stats: Tensor | None = None  # of the last update, for each member

    def set_hypers(self, hypers: Sequence[Hyper]) -> None:
        """Note the hyper-parameters of every group."""
        self._hypers = hypers

    def keep_for_graph(self) -> None:
        """Nothing to keep: a graph keeps the memory that torch's operators allocate in it."""

    def sum_of_squares(self, grads: Sequence[Tensor | None], sums: Sequence[Tensor]) -> None:
        """Write the sum of squares of each sum group's gradients to its tensor of one element."""
        for mine, out in zip(self._slots_of, sums, strict=True):
            present = [slot for slot in mine if grads[slot] is not None]
            squares = self._backend.sum_of_squares(
                [g for slot in present if (g := grads[slot]) is not None], out
            )
            self._squares |= dict(zip(present, squares, strict=True))

    def squares(self) -> Tensor:
        """As `TableBucket.squares`."""
        found = [self._squares[slot].double().cpu() if slot in self._squares else 0.0 for slot in self.slots]
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def rehearse(self, tensors: Tensors, inputs: StepInputs) -> None:
        """Raise what `update` would raise: a tensor subclass may lack an operator, memory may be short."""
        self._backend.rehearse(*self._present(tensors), self._hypers, inputs)

    def prepare(self, inputs: StepInputs, has_stats: bool) -> None:
        """As `TableBucket.prepare`; the update itself still takes memory for one parameter at a time."""
        if not has_stats:
            self._stats = None
        elif self._stats is None:
            self._stats = new_stats(len(self.slots), self.device)

    def stats(self) -> Tensor:
        """As `TableBucket.stats`."""
        assert self._stats is not None
        return self._stats.cpu().double()

    def update(self, tensors: Tensors, inputs: StepInputs) -> None:
        """Step every parameter that has a gradient: mutates it, its moments, its average and step count."""
        entries, grads = self._present(tensors)
        if self._stats is None:
            self._backend.update(entries, grads, self._hypers, inputs)
            return
        pairs = zip(self._members, self._stats, strict=True)
        stats = [found for m, found in pairs if tensors.grads[m.slot] is not None]
        self._backend.update(entries, grads, self._hypers, inputs, stats)

    finish = update  # it may have stepped some: no second try

    def _present(self, tensors: Tensors) -> tuple[list[Entry], list[Tensor]]:
        pairs = [(m.entry(tensors), g) for m in self._members if (g := tensors.grads[m.slot]) is not None]
        return [entry for entry, _ in pairs], [grad for _, grad in pairs]


Bucket = TableBucket | TensorBucket


def new_stats(n: int, device: torch.device) -> Tensor:
    """Room for what an update finds out: the words of n struct ChunkStats."""
    return torch.zeros(n, words(ChunkStatsStruct), dtype=scalar_dtype(device), device=device)


def _places(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _sum_groups(members: Iterable[Member]) -> list[int]:
    """The sum groups that a bucket's gradients belong to."""
    return list(dict.fromkeys(member.sum_group for member in members))
