"""Results: what a race comes to, as numbers, as a table and as JSON with its provenance."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cases import Race
from .measure import Bandwidth, Turn, block_medians
from .peers import PASSES


@dataclass(frozen=True)
class Result:
    """Ours against one peer in one race.

    Attributes:
        name: The race and the peer.
        ratio: Peer's time over ours.
        wanted_ratio: What is wanted of it, if anything.
        copy_fraction: Bytes moved per second, as a share of the bandwidth of a copy.
        wanted_copy_fraction: What is wanted of it, if anything.
        ours_ms: A step of ours.
        peer_ms: A step of the peer.
        bytes: What a step of ours moves.
        detail: What else is known.
    """

    name: str
    ratio: float
    wanted_ratio: float | None
    copy_fraction: float
    wanted_copy_fraction: float | None
    ours_ms: float
    peer_ms: float
    bytes: int
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether all that is wanted was reached; None: nothing is."""
        wanted_ms = self.detail.get("wanted_ms")
        verdicts = []
        if self.wanted_ratio is not None:
            verdicts.append(self.ratio >= self.wanted_ratio)
        if self.wanted_copy_fraction is not None:
            verdicts.append(self.copy_fraction >= self.wanted_copy_fraction)
        if wanted_ms is not None:
            verdicts.append(self.ours_ms <= wanted_ms)
        return all(verdicts) if verdicts else None


CASE_KEYS = tuple(f.name for f in fields(Result) if f.name != "detail")


def evaluate(
    race: Race,
    turns: Mapping[str, Sequence[Turn]],
    bandwidth: Bandwidth,
    *,
    ours: str = "ours",
    best: bool,
    detail: Mapping[str, Any] | None = None,
) -> list[Result]:
    """What a race comes to, against every peer.

    The rounds are cut into three runs. Reported is the run with the best ratio (`best`, for a machine that is
    shared and noisy) or the one between the other two; `detail["ratios"]` has all of them.

    Args:
        race: What was run.
        turns: What the turns of every contestant took.
        bandwidth: Of the memory, measured in the same run.
        ours: Which contestant is ours; other backends of ours are peers.
        best: Which of the three runs to report.
        detail: What else to note.
    """
    results = []
    nbytes = race.case.bytes_moved(PASSES["ours"][not race.clip])
    mine = block_medians(turns[ours])
    for peer, peer_turns in turns.items():
        if peer == ours:
            continue
        theirs = block_medians(peer_turns)
        ratios = [b.wall / a.wall for a, b in zip(mine, theirs, strict=True)]
        order = sorted(range(len(ratios)), key=ratios.__getitem__)
        run = order[-1 if best else len(order) // 2]
        a, b = mine[run], theirs[run]
        speed = nbytes / a.device
        passes = PASSES.get(peer)
        peer_bytes = None if passes is None else race.case.bytes_moved(passes[not race.clip])
        results.append(
            Result(
                name=f"{race.name}/vs-{peer}" if ours == "ours" else f"{race.name}/{ours}/vs-{peer}",
                ratio=ratios[run],
                wanted_ratio=race.wanted.get(peer),
                copy_fraction=speed / bandwidth.copy,
                wanted_copy_fraction=race.wanted_copy_fraction,
                ours_ms=a.wall * 1e3,
                peer_ms=b.wall * 1e3,
                bytes=nbytes,
                detail={
                    "race": race.name,
                    "case": race.case.name,
                    "backend": ours,
                    "peer": peer,
                    "threads": race.threads,
                    "clip": race.clip,
                    "gradients": "moved at every step" if race.moved_grads else "at the same addresses",
                    "tensors": len(race.case.shapes),
                    "groups": len(race.case.groups),
                    "values": race.case.numel,
                    "rounds": len(peer_turns),
                    "ratios": ratios,
                    "ours_ms_by_run": [t.wall * 1e3 for t in mine],
                    "ours_first_ms": a.first and a.first * 1e3,
                    "peer_first_ms": b.first and b.first * 1e3,
                    "first_ratio": a.first and b.first and b.first / a.first,
                    "device_ms": a.device * 1e3,
                    "wanted_ms": race.wanted_ms,
                    "gbps": speed / 1e9,
                    "peer_bytes": peer_bytes,
                    "copy_gbps": bandwidth.copy / 1e9,
                    "stream_gbps": bandwidth.stream / 1e9,
                    "stream_fraction": speed / bandwidth.stream,
                    **(detail or {}),
                },
            )
        )
    return results


def to_json(results: Sequence[Result], provenance: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Provenance, `cases` with the keys of `CASE_KEYS`, and `details` of each case by name."""
    return {
        **provenance,
        **more,
        "cases": [{key: getattr(result, key) for key in CASE_KEYS} for result in results],
        "details": {result.name: result.detail for result in results},
    }


def from_json(payload: Mapping[str, Any]) -> list[Result]:
    """The results of a file that `to_json` made."""
    return [Result(**case, detail=payload["details"].get(case["name"], {})) for case in payload["cases"]]


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write it, making folders as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=1) + "\n")


def _verdict(value: float, wanted: float | None, spec: str, unit: str = "") -> Text:
    """A number; in green or red beside what is wanted of it."""
    text = Text(f"{value:{spec}}{unit}")
    if wanted is not None:
        text.append(f" ≥{wanted:g}{unit}")
        text.stylize("green" if value >= wanted else "bold red")
    return text


def ratio_text(result: Result, wanted: float | None) -> Text:
    """The ratio, beside what is wanted of it; in brackets that of the first steps, where it is known."""
    first = result.detail.get("first_ratio")
    brackets = Text("" if first is None else f" ({first:.2f})", style="dim")
    return Text.assemble(_verdict(result.ratio, wanted, ".2f"), brackets)


def console() -> Console:
    """Where tables go; wide enough for them in a log."""
    return Console(width=None if sys.stdout.isatty() else 160)


def print_table(results: Sequence[Result], title: str) -> None:
    """One line per race, one column of ratios per peer."""
    peers = list(dict.fromkeys(result.detail["peer"] for result in results))
    table = Table(
        title=title,
        caption="ratio: peer's time / ours (of first steps); of copy, of stream: share of bandwidth",
    )
    table.add_column("race", no_wrap=True)
    for name in ("ours ms", "GB/s", "of copy", "of stream", *peers):
        table.add_column(name, justify="right", no_wrap=True)
    races: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        key = (result.detail["race"], result.detail["backend"])
        races.setdefault(key, {})[result.detail["peer"]] = result
    for (race, backend), by_peer in races.items():
        one = by_peer.get("fused") or next(iter(by_peer.values()))
        ms = Text(f"{one.ours_ms:.3f}")
        if (wanted_ms := one.detail.get("wanted_ms")) is not None:
            ms.append(f" ≤{wanted_ms:g}")
            ms.stylize("green" if one.ours_ms <= wanted_ms else "bold red")
        wanted = one.wanted_copy_fraction
        table.add_row(
            race if backend == "ours" else f"{race}/{backend}",
            ms,
            f"{one.detail['gbps']:.1f}",
            _verdict(100 * one.copy_fraction, None if wanted is None else 100 * wanted, ".0f", "%"),
            f"{100 * one.detail['stream_fraction']:.0f}%",
            *(
                ratio_text(by_peer[peer], by_peer[peer].wanted_ratio) if peer in by_peer else ""
                for peer in peers
            ),
        )
    console().print(table)
