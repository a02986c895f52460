"""Bytes, messages and time of one optimizer step on many GPUs, on paper: the tables of scaling.md.

Nothing is timed here: the inputs are published figures and one measured time of the host; the page has the
formulas and sources. `python -m benchmarks.report` writes the tables into the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.provenance import ROOT
from benchmarks.report import sessions
from benchmarks.report.marked import table

RANKS = (8, 64, 512, 4096, 16384)
GPUS_PER_NODE = 8
PAYLOAD = 16  # bytes of the norm's all-reduce: a sum of squares and the non-finite flag, float64
NETWORK = 50e9  # bytes per second and GPU in each direction: NDR InfiniBand, 400 Gb/s
BANDWIDTH = 4.8e12  # bytes per second: HBM3e of an H200
MEMORY = 141e9  # bytes of an H200
FLOPS = 400e12  # per second and GPU in training, of 989e12: Llama 3 405B on 16,384 H100
HOST_RACE = "500x1/clip+step/2t"  # 500 tensors of one value: the host's work and nothing else
HOST_SESSION = ROOT / "benchmarks" / "results" / "cpu-2026-11-26-run1.csv"


@dataclass(frozen=True)
class Model:
    """A model, by what an optimizer sees of it."""

    name: str
    parameters: float
    tensors: int


#: Llama has 9 tensors per layer and 3 others (2 where the head is tied), Megatron's GPT 12 and 4.
MODELS = (
    Model("1B", 1.24e9, 9 * 16 + 2),
    Model("8B", 8.03e9, 9 * 32 + 3),
    Model("70B", 70.6e9, 9 * 80 + 3),
    Model("405B", 405e9, 9 * 126 + 3),
    Model("1T", 1008e9, 12 * 128 + 4),
)


@dataclass(frozen=True)
class Storage:
    """Bytes of one value of each kind of tensor."""

    name: str
    parameter: int
    gradient: int
    moment: int

    @property
    def held(self) -> int:
        """Bytes that stay in memory per parameter: parameter, gradient, two moments."""
        return self.parameter + self.gradient + 2 * self.moment

    def moved(self, clip: bool) -> int:
        """Bytes through memory per parameter: four tensors read, three written; for the norm, one read."""
        return self.held + self.parameter + 2 * self.moment + (self.gradient if clip else 0)


FP32 = Storage("all float32", 4, 4, 4)
BF16 = Storage("all bfloat16", 2, 2, 2)
STORAGES = (
    FP32,
    Storage("float32, `state_dtype=torch.bfloat16`", 4, 4, 2),
    Storage("bfloat16, `state_dtype=torch.float32`", 2, 2, 4),
    BF16,
)


def memory_seconds(parameters: float, ranks: int, storage: Storage = FP32) -> float:
    """Time of norm and update when memory bounds them and every rank has an equal shard."""
    return storage.moved(clip=True) * parameters / ranks / BANDWIDTH


def all_reduce_seconds(ranks: int) -> float:
    """Time of an all-reduce of a few bytes: NCCL 2.20's estimate for its tree with the LL protocol.

    A base, then up and down: a chain over the NVLinks of a node, and a binary tree over nodes.
    """
    if ranks == 1:
        return 0.0
    nodes = max(1, ranks // GPUS_PER_NODE)
    return (6.8 + 2 * ((ranks / nodes - 1) * 0.6 + math.floor(math.log2(nodes)) * 5.0)) * 1e-6


def crossover_parameters(ranks: int, storage: Storage) -> float:
    """Size of the model whose memory time equals the latency of its norm's all-reduce."""
    return ranks * all_reduce_seconds(ranks) * BANDWIDTH / storage.moved(clip=True)


def host_target_seconds(tensors: int) -> float:
    """Time of the host that docs/performance.md wants at most."""
    return 40e-6 + 0.4e-6 * tensors


@cache
def host_seconds_per_tensor() -> float:
    """Time of the host per tensor as measured on a CPU, in a first step; includes the update of one value."""
    result = next(r for r in sessions.read(HOST_SESSION).results if r.race == HOST_RACE)
    assert result.ours_first_ms is not None
    return result.ours_first_ms * 1e-3 / 500


def host_crossover_ranks(model: Model, host: float) -> float:
    """Ranks beyond which a float32 step's memory time is less than the host's."""
    return memory_seconds(model.parameters, 1) / host


def share_of_training(tokens: float) -> float:
    """Memory time of a fully sharded step over the time of forward and backward of `tokens` in all.

    Those take 6 FLOP per parameter and token (arXiv:2001.08361). Parameters and ranks cancel.
    """
    return FP32.moved(clip=True) / BANDWIDTH * FLOPS / (6 * tokens)


def duration(seconds: float) -> str:
    """Write a duration with two digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def digits(value: float) -> str:
    """Write a number with two digits, or all before the point."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def size(bytes_: float) -> str:
    """Write a number of bytes with two digits."""
    unit, factor = ("GB", 1e9) if bytes_ >= 1e9 else ("MB", 1e6)
    return f"{digits(bytes_ / factor)} {unit}"


def count(value: float) -> str:
    """Write a large number with its unit."""
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{digits(value / size)}{letter}"
    return f"{value:,.0f}"


def by_ranks(corner: str, rows: Iterable[tuple[str, Callable[[int], str]]]) -> str:
    """Lay out a table with a column for each number of GPUs."""
    head = [corner, *(f"{ranks:,}" for ranks in RANKS)]
    return table(head, ([name, *(cell(ranks) for ranks in RANKS)] for name, cell in rows))


def inputs() -> str:
    """Every figure that comes from elsewhere."""
    rows = [
        (
            "memory bandwidth of an H200; its memory",
            f"{BANDWIDTH / 1e12:g} TB/s; {MEMORY / 1e9:.0f} GB",
            "[1]",
        ),
        ("network, per GPU and direction", f"400 Gb/s = {NETWORK / 1e9:.0f} GB/s", "[2]"),
        ("GPUs in a node, joined by NVLink", f"{GPUS_PER_NODE}", "[2]"),
        ("all-reduce of a few bytes: base, hop on NVLink, hop between nodes", "6.8, 0.6, 5.0 µs", "[3]"),
        ("FLOP/s per GPU in training", f"{FLOPS / 1e12:.0f} T", "[4]"),
        ("host, as wanted", "40 µs + 0.4 µs per tensor", "[5]"),
        (
            "host, measured on a CPU, nothing in its caches",
            f"{host_seconds_per_tensor() * 1e6:.1f} µs per tensor",
            "[5]",
        ),
    ]
    return table(["input", "value", "source"], rows)


def storages() -> str:
    """What a parameter costs, by how it is stored."""
    rows = (
        (
            s.name,
            f"{s.parameter} + {s.gradient} + {2 * s.moment} = {s.held}",
            f"{s.moved(False)}",
            f"{s.moved(True)}",
        )
        for s in STORAGES
    )
    head = [
        "bytes per parameter",
        "held: parameter + gradient + moments",
        "moved by the step",
        "with the clip",
    ]
    return table(head, rows)


def shards() -> str:
    """What a rank holds."""

    def cell(model: Model, ranks: int) -> str:
        held = FP32.held * model.parameters / ranks
        return size(held) if held < MEMORY else "–"

    return by_ranks("held by a rank, fp32", ((m.name, lambda n, m=m: cell(m, n)) for m in MODELS))


def times() -> str:
    """How long memory and the norm's message take."""

    def cell(model: Model, ranks: int) -> str:
        if FP32.held * model.parameters / ranks >= MEMORY:
            return "–"
        time = memory_seconds(model.parameters, ranks)
        return f"*{duration(time)}*" if time < all_reduce_seconds(ranks) else duration(time)

    return by_ranks(
        "norm + update, fp32",
        [
            *((m.name, lambda n, m=m: cell(m, n)) for m in MODELS),
            ("all-reduce of the norm", lambda n: duration(all_reduce_seconds(n))),
        ],
    )


def crossovers() -> str:
    """How large a model has to be for memory to bound the step."""
    return by_ranks(
        "memory and message take equally long at",
        ((s.name, lambda n, s=s: count(crossover_parameters(n, s))) for s in (FP32, BF16)),
    )


def hosts() -> str:
    """How many ranks a model can have until the host bounds the step."""

    def row(model: Model) -> list[str]:
        times = (host_target_seconds(model.tensors), host_seconds_per_tensor() * model.tensors)
        cells = [f"{duration(time)}, {digits(host_crossover_ranks(model, time))} GPUs" for time in times]
        return [model.name, f"{model.tensors:,}", *cells]

    return table(
        ["model", "tensors", "as wanted", "as measured on a CPU, nothing in its caches"], map(row, MODELS)
    )


def traffic() -> str:
    """What else crosses the network in a training step."""
    ranks, model = 64, MODELS[1]
    part = (ranks - 1) / ranks * model.parameters

    def row(name: str, messages: str, bytes_per_parameter: int) -> list[str]:
        sent = bytes_per_parameter * part
        return [name, messages, size(sent), duration(sent / NETWORK)]

    rows = [
        row("FSDP2, parameters gathered in bf16", "2 all-gathers, 1 reduce-scatter per block", 2 + 2 + 4),
        row("FSDP2, all fp32", "the same", 4 + 4 + 4),
        row("DDP, all fp32", "1 all-reduce per bucket", 2 * 4),
        ["the optimizer's norm", "1 all-reduce", f"{PAYLOAD} B", duration(all_reduce_seconds(ranks))],
    ]
    return table([f"{model.name} on {ranks} GPUs, per step", "messages", "payload of a rank", "time"], rows)


def shares() -> str:
    """What part of a training step the optimizer takes."""
    batches = [2**exponent for exponent in (18, 20, 22, 24)]

    def row(name: str, repeated: int) -> list[str]:
        return [name, *(f"{100 * repeated * share_of_training(tokens):.2g} %" for tokens in batches)]

    rows = [row("sharded: any model, any number of GPUs", 1), row("DDP on 8 GPUs: 8 times the work", 8)]
    return table(["tokens per step", *(f"{tokens:,}" for tokens in batches)], rows)


def hybrids() -> str:
    """What sharding within groups costs where all groups are replicas of each other."""
    ranks, model = 4096, MODELS[1]

    def cell(shard: int) -> list[str]:
        return [
            f"{shard:,} × {ranks // shard:,}",
            size(FP32.held * model.parameters / shard),
            duration(memory_seconds(model.parameters, shard)),
            duration(all_reduce_seconds(ranks)),
        ]

    head = [
        f"{model.name} on {ranks:,} GPUs, shards × replicas",
        "held by a rank",
        "norm + update",
        "all-reduce",
    ]
    return table(head, map(cell, (8, 64, 512, 4096)))


#: By the name that marks its place in the page.
TABLES: dict[str, Callable[[], str]] = {
    f"scaling-{make.__name__}": make
    for make in (inputs, storages, shards, times, crossovers, hosts, shares, traffic, hybrids)
}


def draw(path: Path) -> None:
    """Draw memory time and latency against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.report.pictures import GRID, INK, OURS, TARGET

    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    ranks = [2**i for i in range(3, 15)]
    for model in MODELS:
        fits = [n for n in ranks if FP32.held * model.parameters / n < MEMORY]
        axes.plot(fits, [memory_seconds(model.parameters, n) for n in fits], color=OURS, linewidth=1.6)
        axes.annotate(
            f" {model.name}",
            (fits[0], memory_seconds(model.parameters, fits[0])),
            xytext=(-4, 6),
            textcoords="offset points",
            color=OURS,
            ha="right" if fits[0] > ranks[0] else "left",
        )
    axes.plot(ranks, [all_reduce_seconds(n) for n in ranks], color=TARGET, linewidth=2.2)
    axes.annotate(
        "all-reduce of the norm",
        (ranks[0], all_reduce_seconds(ranks[0])),
        xytext=(0, -9),
        textcoords="offset points",
        color=TARGET,
        va="top",
    )
    axes.set(xscale="log", yscale="log", xlabel="GPUs, fully sharded", ylabel="seconds per step")
    axes.set_xticks(ranks, [f"{n:,}" for n in ranks])
    axes.minorticks_off()
    axes.set_title(
        "Computed, not measured: norm + update at 4.8 TB/s, fp32", loc="left", color=INK, fontsize=11
    )
    axes.grid(color=GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
