"""The tables of README.md and docs/performance.md, made from the sessions under benchmarks/results."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..gpu.races import GPU_RACES, GpuRace, Targets
from ..provenance import ROOT
from .marked import table
from .results import Result
from .sessions import Session, read, read_csv

RESULTS = ROOT / "benchmarks" / "results"
DASH = "–"


class Row(NamedTuple):
    """A line of the CPU tables.

    Attributes:
        label: What is stepped.
        case: The part of a race's name before the clip.
        moved: Whether gradients move.
        why: What the race shows, by the number of threads.
    """

    label: str
    case: str
    why: dict[int, str]
    moved: bool = False

    def race(self, threads: int) -> str:
        """The race's name."""
        return f"{self.case}/clip+step/{threads}t" + "/moved-grads" * self.moved


ROWS = (
    Row("GPT-2 124M, 148 tensors", "gpt2-124m", {2: "the same in a real model"}),
    Row("ResNet-50, 161 tensors", "resnet50", {2: "between the two limits"}),
    Row("ViT-B, 152 tensors in 50 groups", "vit-b-50-groups", {2: "between the two limits"}),
    Row(
        "500 tensors of 20,000 values",
        "500x20k",
        {1: "prefetching, fewer passes", 2: "threads share the work across tensors, not within each"},
    ),
    Row("500 tensors of 1,000 values", "500x1k", {1: "host work per tensor", 2: "the same"}),
    Row(
        "the same, gradients moved",
        "500x1k",
        {1: "new addresses at every step", 2: "the same"},
        moved=True,
    ),
    Row("the same in 64 groups", "500x1k-64-groups", {2: "host work per group: none"}),
    Row("500 tensors of one value", "500x1", {2: "host work alone"}),
    Row(
        "100M values in one tensor",
        "100m-fp32",
        {1: "1.25 is bytes, the rest prefetching", 2: "and a norm that uses all threads"},
    ),
    Row("50M bfloat16 values", "50m-bf16", {1: "conversions", 2: "the same"}),
)
TRAINING_ROWS = (
    ("500 small tensors, in 250 linear layers", "train-500-small"),
    ("ResNet-like, 161 tensors", "train-resnet-like"),
    ("GPT-like, 75 tensors", "train-gpt-like"),
)


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def pictured(session: Session) -> tuple[Session, dict[str, str]]:
    """What pictures show of a session, and what they call its races: those of the rows, or all."""
    labels = {
        f"{case}/clip+step/{n}t": f"training: {label.partition(',')[0]}, {_threads(n)}"
        for label, case in TRAINING_ROWS
        for n in (1, 2)
    }
    labels |= {row.race(n): f"{row.label}, {_threads(n)}" for row in ROWS for n in row.why}
    chosen = [r for r in session.results if r.race in labels]
    return (replace(session, results=chosen), labels) if chosen else (session, {})


@cache
def _all_sessions() -> list[tuple[Path, Session]]:
    return [(path, read(path)) for path in sorted(RESULTS.glob("cpu-*.csv"))]


def latest(is_wanted: Callable[[Result], bool]) -> list[tuple[Path, Session]]:
    """Of the sessions that have a wanted result, those of the last day."""
    found = [(path, session) for path, session in _all_sessions() if any(map(is_wanted, session.results))]
    days = [session.provenance["date"][:10] for _, session in found]
    return [item for item, day in zip(found, days, strict=True) if day == max(days)]


def warm() -> list[tuple[Path, Session]]:
    """The sessions of batches of steps, whose gradients stay."""
    return latest(lambda result: result.gradients == "kept")


def training() -> list[tuple[Path, Session]]:
    """The sessions of training loops, whose gradients are new at every step."""
    return latest(lambda result: result.gradients == "new")


def _results(found: Iterable[tuple[Path, Session]], race: str, peer: str = "fused") -> list[Result]:
    return [r for _, session in found for r in session.results if (r.race, r.peer) == (race, peer)]


def _span(values: Sequence[float | None]) -> str:
    """The range of values; nothing if fewer than half are known."""
    known = [value for value in values if value is not None]
    if not known or 2 * len(known) < len(values):
        return ""
    least, most = (f"{value:.{2 if value < 10 else 1}f}" for value in (min(known), max(known)))
    return f"{least}×" if least == most else f"{least} to {most}×"


def origin(runs: str, command: str, whence: Mapping[str, Any], first: Path, last: Path | None = None) -> str:
    """Where figures come from, as a line below a table."""
    files = f"`{first.relative_to(ROOT)}`" + (f" to `{last.name}`" if last else "")
    return (
        f"{runs} of `{command}` on {whence['device']} ({whence['cores']} cores), torch {whence['torch']}, "
        f"{whence['date'][:10]}, commit {whence['commit'][:10]}: {files}."
    )


def source(found: Sequence[tuple[Path, Session]]) -> str:
    """The origin of sessions."""
    (first, session), (last, _) = found[0], found[-1]
    number = {1: "One run", 2: "Two runs", 3: "Three runs", 6: "Six runs"}
    runs = number.get(len(found), f"{len(found)} runs")
    return origin(runs, "make bench", session.provenance, first, last if len(found) > 1 else None)


def cpu_summary() -> str:
    """Ranges over the sessions: for the README."""
    found = warm()
    rows = [
        [
            row.label,
            _span([r.ratio for r in _results(found, row.race(1))]),
            _span([r.ratio for r in _results(found, row.race(2))]),
            _span([r.first_ratio for r in _results(found, row.race(2))]),
        ]
        for row in ROWS
        if not row.moved
    ]
    head = ["back to back", "1 thread", "2 threads", "2 threads, first step"]
    return f"{table(head, rows)}\n\n{source(found)}"


def cpu_training() -> str:
    """Ratios of training loops: for the README."""
    found = training()
    counts = sorted({r.threads for _, session in found for r in session.results if r.threads is not None})
    rows = [
        [
            label,
            *(_span([r.ratio for r in _results(found, f"{case}/clip+step/{n}t")]) for n in counts),
        ]
        for label, case in TRAINING_ROWS
    ]
    head = ["new gradients at every step", *map(_threads, counts)]
    return f"{table(head, rows)}\n\n{source(found)}"


def cpu_headline() -> str:
    """The gain in training, and the most that a step back to back gains, as one point of a list."""
    loops = [
        (label.partition(",")[0], _span([r.ratio for r in _results(training(), f"{case}/clip+step/1t")]))
        for label, case in reversed(TRAINING_ROWS)
    ]
    best = max(r.ratio for _, session in warm() for r in session.results if r.peer == "fused" and r.clip)
    spans = ", ".join(f"{span} ({label})" for label, span in loops)
    point = (
        f"- **Gradients are clipped inside the update.** In training loops on one CPU thread, the "
        f"step is {spans} as fast as `clip_grad_norm_` and torch's fused AdamW; "
        f"back to back, up to {best:.1f}×."
    )
    return textwrap.fill(point, 120, subsequent_indent="  ", break_on_hyphens=False)


def host_parts() -> str:
    """Where the host's time goes, in microseconds: for docs/performance.md."""
    path = max(RESULTS.glob("host-*.csv"))
    whence, lines = read_csv(path)
    columns = [name for name in lines[0] if name != "part"]
    rows = [[line["part"], *(f"{float(line[name]):,.0f}" for name in columns)] for line in lines]
    lines_below = origin("One run", "python -m benchmarks.host", whence, path)
    return f"{table(['500 tensors, one thread, µs', *columns], rows)}\n\n{lines_below}"


OFFLOAD_ROWS = (
    ("100M float32 values", "100m-fp32"),
    ("50M float32 values, bfloat16 gradients", "50m-fp32-bf16-grads"),
)


def offload() -> str:
    """Steps without a clip of optimizers that live on the CPU: for docs/offload.md."""
    found = [(path, read(path)) for path in sorted(RESULTS.glob("offload-cpu-*.csv"))]
    rows = []
    for label, case in OFFLOAD_ROWS:
        for threads in (1, 2):
            mine, theirs = (
                _results(found, f"{case}/step/{threads}t", peer) for peer in ("fused", "deepspeed")
            )
            stream = [100 * r.stream_fraction for r in mine if r.stream_fraction is not None]
            target = f"≥ {theirs[-1].target_ratio:g}×"
            rows.append(
                [
                    label,
                    str(threads),
                    f"{min(r.ours_ms for r in mine):.1f}",
                    f"{min(stream):.0f} to {max(stream):.0f} %",
                    _span([r.ratio for r in mine]),
                    _span([r.ratio for r in theirs]),
                    target,
                ]
            )
    head = ["step without a clip", "threads", "ms, best run", "of stream"]
    head += ["over torch's fused", "over DeepSpeed's CPUAdam", "target"]
    return f"{table(head, rows)}\n\n{source(found)}"


# Of each case the peer that computes the same: the fused step after a copy, or foreach.
LAYOUT_ROWS = (
    ("ResNet-50 in channels-last, contiguous gradients", "resnet50-channels-last", "fused"),
    ("contiguous ResNet-50, gradients in channels-last", "resnet50-channels-last-grads", "fused"),
    ("500 tensors of 1,000 values, expanded gradients", "500x1k-expanded-grads", "fused"),
    ("500 tensors of 1,000 complex values", "500x1k-complex", "foreach"),
    ("10M complex values in one tensor", "10m-complex", "foreach"),
)


def layouts() -> str:
    """Gradients of another layout than parameters, and complex numbers: for docs/performance.md."""
    cases = {case for _, case, _ in LAYOUT_ROWS}
    found = latest(lambda result: result.case in cases)
    rows = []
    for label, case, peer in LAYOUT_ROWS:
        for threads in (1, 2):
            race = f"{case}/clip+step/{threads}t"
            right, wrong = (_results(found, race, name) for name in (peer, "fused-wrong"))
            rows.append(
                [
                    label,
                    str(threads),
                    f"{min(r.ours_ms for r in right):.2f}",
                    _span([r.ratio for r in right]),
                    f"≥ {right[-1].target_ratio:g}×",
                    _span([r.ratio for r in wrong]),
                    f"≥ {wrong[-1].target_ratio:g}×" if wrong else "",
                ]
            )
    head = [
        "clip + step",
        "threads",
        "ms, best run",
        "over torch",
        "target",
        "over torch, misreading",
        "target",
    ]
    return f"{table(head, rows)}\n\n{source(found)}"


LOW_PRECISION_ROWS = (
    ("split, float32 moments", "50m-split-fp32"),
    ("split, bfloat16 moments", "50m-split-bf16"),
    ("split, 8-bit moments", "50m-split-8bit"),
    ("stochastic, bfloat16 moments", "50m-stochastic-bf16"),
    ("stochastic, 8-bit moments", "50m-stochastic-8bit"),
)


def low_precision() -> str:
    """Steps in formats that torch does not have: for docs/precision.md."""
    cases = {case for _, case in LOW_PRECISION_ROWS}
    found = latest(lambda result: result.case in cases)
    rows = []
    for label, case in LOW_PRECISION_ROWS:
        over = [_results(found, f"{case}/clip+step/2t", peer) for peer in ("fused", "float32+copy")]
        times = [r.ours_ms for r in over[0]]
        rows.append([label, f"{min(times):.1f}", *(_span([r.ratio for r in results]) for results in over)])
    head = ["50M values, two threads", "ms, best run"]
    head += ["over fused AdamW on bfloat16", "over fused AdamW in float32 and a copy"]
    return f"{table(head, rows)}\n\n{source(found)}"


def _cell(results: list[Result]) -> str:
    if not results:
        return ""
    (one,) = results
    return f"{one.ratio:.2f}" + ("" if one.first_ratio is None else f" ({one.first_ratio:.2f})")


def ratios(found: Sequence[tuple[Path, Session]]) -> str:
    """Every race against torch's fused step, a column per session."""
    races = list(dict.fromkeys(r.race for _, session in found for r in session.results))
    each = [[item] for item in found]
    rows = []
    for race in races:
        targets = [r.target_ratio for r in _results(found, race)]
        target = f"{targets[-1]:g}" if targets and targets[-1] is not None else DASH
        rows.append([race, target, *(_cell(_results(one, race)) for one in each)])
    return table(["race", "target", *(path.stem for path, _ in found)], rows)


def cpu_runs() -> str:
    """Targets, and what each session measured: for docs/performance.md."""
    found = warm()
    each = [[item] for item in found]
    rows = []
    for row in ROWS:
        for threads, why in row.why.items():
            race = row.race(threads)
            target = _results(found, race)[-1].target_ratio
            cells = [_cell(_results(one, race)) for one in each]
            rows.append([row.label, why, str(threads), DASH if target is None else f"{target:g}", *cells])
    for label, why, is_wanted in (
        ("step alone", "never slower than torch where no bytes are saved", lambda r: not r.clip),
        ("against ours on one thread", "what a second thread adds", lambda r: r.peer == "one-thread"),
    ):
        chosen = [[r for r in session.results if is_wanted(r)] for _, session in found]
        cells = [_span([r.ratio for r in results]).rstrip("×") for results in chosen]
        rows.append([f"all cases, {label}", why, "2", f"{chosen[-1][0].target_ratio:.1f}", *cells])
    judged = [[r for r in session.results if r.target_ratio is not None] for _, session in found]
    reached = [sum(r.ratio >= (r.target_ratio or 0) for r in results) for results in judged]
    counts = [f"{n} of {len(results)}" for n, results in zip(reached, judged, strict=True)]
    rows.append(["targets reached", "", "", "", *counts])
    head = ["case", "what it shows", "threads", "target", *(f"run {i + 1}" for i in range(len(found)))]
    return f"{table(head, rows, words=2)}\n\n{source(found)}"


def _targets(targets: Targets) -> str:
    words = [f"≥ {ratio:g}× {peer}" for peer, ratio in targets.ratios.items()]
    if targets.copy_fraction is not None:
        words.append(f"≥ {100 * targets.copy_fraction:.0f} % of copy")
    return ", ".join(words) or DASH


def _measured(sessions: Iterable[Session], kind: str, gpu_race: GpuRace) -> str:
    for session in sessions:
        if kind in session.provenance["device"].split():
            for r in session.results:
                if (r.race, r.backend, r.peer) == (gpu_race.race.name, "native", "fused"):
                    stream = (
                        "" if r.stream_fraction is None else f", {100 * r.stream_fraction:.0f} % of stream"
                    )
                    return f"{r.ratio:.2f}×; {100 * r.copy_fraction:.0f} % of copy{stream}"
    return ""


def gpu_targets() -> str:
    """Targets on each kind of GPU, why, and what was measured."""
    sessions = [read(path) for path in sorted(RESULTS.glob("gpu-*.json"))]
    rows = [
        [
            gpu_race.race.name,
            gpu_race.why,
            _targets(gpu_race.h100),
            _measured(sessions, "H100", gpu_race),
            _targets(gpu_race.h200),
            _measured(sessions, "H200", gpu_race),
        ]
        for gpu_race in GPU_RACES
    ]
    head = ["race", "what bounds it", "H100", "measured", "H200", "measured"]
    return table(head, rows, words=2)


#: By the name that marks a table's place in a page.
TABLES: dict[str, Callable[[], str]] = {
    "cpu-headline": cpu_headline,
    "cpu-summary": cpu_summary,
    "cpu-training": cpu_training,
    "cpu-runs": cpu_runs,
    "host-parts": host_parts,
    "offload": offload,
    "layouts": layouts,
    "low-precision": low_precision,
    "gpu-targets": gpu_targets,
}
