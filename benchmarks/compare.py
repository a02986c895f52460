"""Compare two results: `python -m benchmarks.compare A.json B.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .results import Result, console, from_json


def noise(result: Result) -> float:
    """How far the three runs of one race spread: (slowest - fastest) / fastest."""
    runs = result.detail["ours_ms_by_run"]
    return float(max(runs) / min(runs) - 1)


def compare(a: Sequence[Result], b: Sequence[Result]) -> list[tuple[Result, Result, float, bool]]:
    """Pair the results of the same name.

    Returns:
        A's, B's, time of ours in A over that in B (above 1: B is faster), and whether that is more than the
        noise of both.
    """
    by_name = {result.name: result for result in b}
    rows = []
    for old in a:
        if (new := by_name.get(old.name)) is not None:
            speedup = old.ours_ms / new.ours_ms
            beyond = max(speedup, 1 / speedup) - 1 > noise(old) + noise(new)
            rows.append((old, new, speedup, beyond))
    return rows


def _describe(payload: dict[str, Any]) -> str:
    commit = (payload["commit"] or "unknown")[:10] + ("+" if payload["dirty"] else "")
    return f"{payload['device']}, torch {payload['torch']}, commit {commit}, {payload['date']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    args = parser.parse_args(argv)
    old, new = (json.loads(path.read_text()) for path in (args.a, args.b))
    table = Table(caption="A/B: above 1, B is faster; bold: more than the spread of the runs of both")
    for name in ("race", "ours ms A", "ours ms B", "A/B", "noise A", "noise B", "ratio A", "ratio B"):
        table.add_column(name, justify="left" if name == "race" else "right", no_wrap=True)
    rows = compare(from_json(old), from_json(new))
    for a, b, speedup, beyond in rows:
        style = ("bold green" if speedup > 1 else "bold red") if beyond else "dim"
        table.add_row(
            a.name,
            f"{a.ours_ms:.3f}",
            f"{b.ours_ms:.3f}",
            f"[{style}]{speedup:.2f}[/]",
            f"{noise(a):.0%}",
            f"{noise(b):.0%}",
            f"{a.ratio:.2f}",
            f"{b.ratio:.2f}",
        )
    out = console()
    out.print(f"A: {_describe(old)}\nB: {_describe(new)}", highlight=False)
    if old["device"] != new["device"]:
        out.print("[bold red]These are different devices.[/]")
    out.print(table)
    unmatched = {r.name for r in from_json(old)} ^ {r.name for r in from_json(new)}
    if unmatched:
        out.print(f"In one file only: {', '.join(sorted(unmatched))}")
    return 0 if rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
