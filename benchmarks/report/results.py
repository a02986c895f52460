"""Results: what a race comes to, as numbers and as a table on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cases import Race
from ..peers import bytes_moved
from ..timing import Bandwidth, Turn, block_medians


@dataclass(frozen=True)
class Result:
    """Ours against one peer in one race; the fields are the columns of a session's file.

    Attributes:
        race: The race.
        case: Its parameters.
        backend: "ours", or the backend of ours where several take part.
        peer: The other optimizer.
        threads: CPU threads; None on a GPU.
        clip: Clip + step, or the step alone.
        gradients: Where a step finds them, as in `Race`.
        rounds: Turns of the peer.
        bytes: Bytes that a step of ours moves.
        peer_bytes: Bytes that a step of the peer moves; None where nobody counted.
        ours_ms: Wall time of a step of ours.
        peer_ms: Wall time of a step of the peer.
        device_ms: Time of a step of ours between two events on the device.
        ours_first_ms: Wall time of a first step of ours, which finds nothing in the caches.
        peer_first_ms: The same of the peer.
        ratios: Peer's time over ours in each third of the rounds.
        ours_ms_by_run: Wall time of a step of ours in each of them.
        target_ratio: The ratio to reach; None: none is set, here as below.
        target_copy_fraction: The share of copy bandwidth to reach.
        target_ms: The time to stay below.
        copy_gbps: Bandwidth of a copy, measured in the same run.
        stream_gbps: Bandwidth of four reads and three writes, measured in the same run; None: it was not.
        target_stream_fraction: The share of that bandwidth to reach.
    """

    race: str
    case: str
    backend: str
    peer: str
    threads: int | None
    clip: bool
    gradients: str
    rounds: int
    bytes: int
    peer_bytes: int | None
    ours_ms: float
    peer_ms: float
    device_ms: float
    ours_first_ms: float | None
    peer_first_ms: float | None
    ratios: tuple[float, ...]
    ours_ms_by_run: tuple[float, ...]
    target_ratio: float | None
    target_copy_fraction: float | None
    target_ms: float | None
    copy_gbps: float
    stream_gbps: float | None
    target_stream_fraction: float | None = None  # files of before do not have it

    @property
    def name(self) -> str:
        """The race and the peer."""
        return f"{self.race}/vs-{self.peer}" if self.backend == "ours" else f"{self.entry}/vs-{self.peer}"

    @property
    def entry(self) -> str:
        """The race and, where several take part, the backend."""
        return self.race if self.backend == "ours" else f"{self.race}/{self.backend}"

    @property
    def ratio(self) -> float:
        """Peer's time over ours."""
        return self.peer_ms / self.ours_ms

    @property
    def first_ratio(self) -> float | None:
        """The same of first steps, where both were timed."""
        return self.peer_first_ms and self.ours_first_ms and self.peer_first_ms / self.ours_first_ms

    @property
    def gbps(self) -> float:
        """Bytes moved per time on the device, in GB/s."""
        return self.bytes * 1e-6 / self.device_ms

    @property
    def copy_fraction(self) -> float:
        """Share of the bandwidth of a copy."""
        return self.gbps / self.copy_gbps

    @property
    def stream_fraction(self) -> float | None:
        """Share of the bandwidth of four reads and three writes."""
        return None if self.stream_gbps is None else self.gbps / self.stream_gbps

    @property
    def reached(self) -> bool | None:
        """Whether all targets were reached; None: there are none."""
        verdicts = []
        if self.target_ratio is not None:
            verdicts.append(self.ratio >= self.target_ratio)
        if self.target_copy_fraction is not None:
            verdicts.append(self.copy_fraction >= self.target_copy_fraction)
        if self.target_stream_fraction is not None and self.stream_fraction is not None:
            verdicts.append(self.stream_fraction >= self.target_stream_fraction)
        if self.target_ms is not None:
            verdicts.append(self.ours_ms <= self.target_ms)
        return all(verdicts) if verdicts else None


def evaluate(
    race: Race,
    turns: Mapping[str, Sequence[Turn]],
    bandwidth: Bandwidth,
    *,
    ours: str = "ours",
    best: bool,
) -> list[Result]:
    """Compare ours with every peer of a race.

    The rounds are cut into three runs. Reported is the run with the best ratio (`best`, for a machine that is
    shared and noisy) or the one between the other two; `ratios` has all of them.

    Args:
        race: What was run.
        turns: The turns of ours and of every peer.
        bandwidth: Of the memory, measured in the same run.
        ours: Which of them is ours; other backends of ours are peers.
        best: Which of the three runs to report.
    """
    results = []
    mine = block_medians(turns[ours])
    moved = bytes_moved(race.case, "ours", race.clip)
    assert moved is not None
    for peer, peer_turns in turns.items():
        if peer == ours:
            continue
        theirs = block_medians(peer_turns)
        ratios = tuple(b.wall / a.wall for a, b in zip(mine, theirs, strict=True))
        order = sorted(range(len(ratios)), key=ratios.__getitem__)
        run = order[-1 if best else len(order) // 2]
        a, b = mine[run], theirs[run]
        results.append(
            Result(
                race=race.name,
                case=race.case.name,
                backend=ours,
                peer=peer,
                threads=race.threads,
                clip=race.clip,
                gradients=race.gradients,
                rounds=len(peer_turns),
                bytes=moved,
                peer_bytes=bytes_moved(race.case, peer, race.clip),
                ours_ms=a.wall * 1e3,
                peer_ms=b.wall * 1e3,
                device_ms=a.device * 1e3,
                ours_first_ms=a.first and a.first * 1e3,
                peer_first_ms=b.first and b.first * 1e3,
                ratios=ratios,
                ours_ms_by_run=tuple(turn.wall * 1e3 for turn in mine),
                target_ratio=race.target_ratios.get(peer),
                target_copy_fraction=race.target_copy_fraction,
                target_ms=race.target_ms,
                copy_gbps=bandwidth.copy / 1e9,
                stream_gbps=bandwidth.stream and bandwidth.stream / 1e9,
                target_stream_fraction=race.target_stream_fraction,
            )
        )
    return results


def by_entry(results: Sequence[Result]) -> dict[str, dict[str, Result]]:
    """The results of each race and backend, by peer."""
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        found.setdefault(result.entry, {})[result.peer] = result
    return found


def _verdict(value: float, target: float | None, spec: str, unit: str = "") -> Text:
    """A number; in green or red beside its target."""
    text = Text(f"{value:{spec}}{unit}")
    if target is not None:
        text.append(f" ≥{target:g}{unit}")
        text.stylize("green" if value >= target else "bold red")
    return text


def _share(value: float | None, target: float | None) -> Text:
    """A share of bandwidth, if it is known, as a percentage."""
    if value is None:
        return Text("")
    return _verdict(100 * value, None if target is None else 100 * target, ".0f", "%")


def _ratio(result: Result) -> Text:
    """The ratio beside its target; in brackets that of the first steps, where it is known."""
    first = result.first_ratio
    brackets = Text("" if first is None else f" ({first:.2f})", style="dim")
    return Text.assemble(_verdict(result.ratio, result.target_ratio, ".2f"), brackets)


def print_table(results: Sequence[Result], title: str) -> None:
    """Print one line per race, with a column of ratios per peer."""
    peers = list(dict.fromkeys(result.peer for result in results))
    table = Table(
        title=title,
        caption="ratio: peer's time / ours (of first steps); of copy, of stream: share of bandwidth",
    )
    table.add_column("race", no_wrap=True)
    for name in ("ours ms", "GB/s", "of copy", "of stream", *peers):
        table.add_column(name, justify="right", no_wrap=True)
    for entry, by_peer in by_entry(results).items():
        one = by_peer.get("fused") or next(iter(by_peer.values()))
        ms = Text(f"{one.ours_ms:.3f}")
        if one.target_ms is not None:
            ms.append(f" ≤{one.target_ms:g}")
            ms.stylize("green" if one.ours_ms <= one.target_ms else "bold red")
        table.add_row(
            entry,
            ms,
            f"{one.gbps:.1f}",
            _share(one.copy_fraction, one.target_copy_fraction),
            _share(one.stream_fraction, one.target_stream_fraction),
            *(_ratio(by_peer[peer]) if peer in by_peer else "" for peer in peers),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
