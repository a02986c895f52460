"""Compare results: `python -m benchmarks.compare A.json B.json ...`.

Two tables: the times of ours beside those of the first file, with their noise; and the ratios, with the best.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich.table import Table

from .results import Result, console, from_json, ratio_text


def noise(result: Result) -> float:
    """How far the three runs of one race spread: (slowest - fastest) / fastest."""
    runs = result.detail["ours_ms_by_run"]
    return float(max(runs) / min(runs) - 1)


def speedup(old: Result, new: Result) -> tuple[float, bool]:
    """Time of ours in the old over that in the new; and whether that is more than the noise of both."""
    times = old.ours_ms / new.ours_ms
    return times, max(times, 1 / times) - 1 > noise(old) + noise(new)


def matched(files: Sequence[Sequence[Result]]) -> list[tuple[Result, ...]]:
    """The results of each race that is in all files."""
    by_name = [{result.name: result for result in results} for results in files]
    return [
        tuple(results[name] for results in by_name)
        for name in by_name[0]
        if all(name in results for results in by_name)
    ]


def best(race: Sequence[Result]) -> tuple[Result, bool | None]:
    """The result with the best ratio, and whether it reached what the last file wants; None: nothing."""
    wanted = race[-1].wanted_ratio
    result = max(race, key=lambda result: result.ratio)
    return result, None if wanted is None else result.ratio >= wanted


def _times_table(letters: str, races: Sequence[Sequence[Result]]) -> Table:
    table = Table(
        title="Times of ours",
        caption="ms ± noise: spread of its three runs; A/B: above 1, B is faster; bold: beyond both's noise",
    )
    table.add_column("race", no_wrap=True)
    for name in (*letters, *(f"A/{letter}" for letter in letters[1:])):
        table.add_column(name, justify="right", no_wrap=True)
    for race in races:
        speedups = []
        for result in race[1:]:
            times, beyond = speedup(race[0], result)
            style = ("bold green" if times > 1 else "bold red") if beyond else "dim"
            speedups.append(f"[{style}]{times:.2f}[/]")
        table.add_row(race[0].name, *(f"{r.ours_ms:.3f} ±{noise(r):.0%}" for r in race), *speedups)
    return table


def _ratios_table(letters: str, races: Sequence[Sequence[Result]]) -> Table:
    table = Table(title="Ratios", caption="peer's time / ours (of first steps)")
    table.add_column("race", no_wrap=True)
    for name in (*letters, "best", "reached"):
        table.add_column(name, justify="right", no_wrap=True)
    marks = {True: "[green]yes[/]", False: "[bold red]no[/]", None: ""}
    for race in races:
        winner, reached = best(race)
        table.add_row(
            winner.name,
            *(ratio_text(result, None) for result in race),
            ratio_text(winner, race[-1].wanted_ratio),
            marks[reached],
        )
    return table


def _describe(payload: dict[str, Any]) -> str:
    commit = (payload["commit"] or "unknown")[:10] + ("+" if payload["dirty"] else "")
    return f"{payload['device']}, torch {payload['torch']}, commit {commit}, {payload['date']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    args = parser.parse_args(argv)
    payloads = [json.loads(path.read_text()) for path in (args.first, *args.others)]
    letters = ascii_uppercase[: len(payloads)]
    files = [from_json(payload) for payload in payloads]
    races = matched(files)
    out = console()
    for letter, payload in zip(letters, payloads, strict=True):
        out.print(f"{letter}: {_describe(payload)}", highlight=False)
    if len({payload["device"] for payload in payloads}) > 1:
        out.print("[bold red]These are different devices.[/]")
    out.print(_times_table(letters, races))
    out.print(_ratios_table(letters, races))
    unmatched = {result.name for results in files for result in results} - {race[0].name for race in races}
    if unmatched:
        out.print(f"Not in all files: {', '.join(sorted(unmatched))}")
    verdicts = [reached for _, reached in map(best, races) if reached is not None]
    out.print(f"Reached by the best of {len(files)}: {sum(verdicts)} of {len(verdicts)}", highlight=False)
    return 0 if races else 1


if __name__ == "__main__":
    raise SystemExit(main())
