"""Tables for people: repeated layers folded into one line, readable in 100 columns."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .decide import Decision
from .lint import Lint


def report_table(title: str, decisions: Sequence[Decision], groups: int, remarks: Iterable[Lint]) -> Group:
    """Draw a report: a line per parameter or fold of parameters, totals, remarks.

    Args:
        title: What is above the table.
        decisions: One per tensor.
        groups: How many parameter groups there are.
        remarks: What is below the table.
    """
    scaled = any(d.lr_scale != 1 for d in decisions)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("decay", justify="right")
    if scaled:
        table.add_column("lr scale", justify="right")
    table.add_column("role")
    table.add_column("decided by", overflow="fold")
    for rows in fold(decisions, lambda d: (d.decays, d.role, d.rule, d.because, d.options["weight_decay"])):
        first = rows[0]
        cells: list[str | Text] = [name_of(rows), shape_of(rows), _decay(first)]
        if scaled:
            cells.append(_range([d.lr_scale for d in rows]))
        table.add_row(*cells, str(first.role), first.because + _doubt(first))
    styles = {"warning": "yellow", "note": "dim"}
    lines = [Text(f"{remark.level}: {remark}", style=styles[remark.level]) for remark in remarks]
    return Group(table, Text(_totals(decisions, groups)), *lines)


def diff_table(title: str, ours: str, theirs: str, pairs: Sequence[tuple[Decision, Decision]]) -> Group:
    """Draw where two policies disagree.

    Args:
        title: What is above the table.
        ours: Name of the first policy.
        theirs: Name of the second policy.
        pairs: (first decision, second decision) for each tensor on which they disagree.
    """
    if not pairs:
        return Group(Text(title))
    other = {mine.name: their for mine, their in pairs}
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column(ours, overflow="fold")
    table.add_column(theirs, overflow="fold")

    def key(d: Decision) -> tuple[Any, ...]:
        return d.decays, d.role, d.rule, d.because, other[d.name].because

    for rows in fold([mine for mine, _ in pairs], key):
        mine, their = rows[0], other[rows[0].name]
        table.add_row(
            name_of(rows),
            shape_of(rows),
            Text.assemble(_verdict(mine), f": {mine.role}, {mine.because}"),
            Text.assemble(_verdict(their), f": {their.because}"),
        )
    return Group(table)


def plain(renderable: Any) -> str:
    """Render without colour, as wide as the terminal or 110 columns."""
    width = max(shutil.get_terminal_size((110, 24)).columns, 80)
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    return str(console.file.getvalue()).rstrip("\n")  # type: ignore[attr-defined]


def fold(decisions: Iterable[Decision], key: Callable[[Decision], Any]) -> list[list[Decision]]:
    """Gather parameters whose names differ only in layer numbers and that agree on `key`.

    Args:
        decisions: In display order.
        key: What must be equal within a fold, besides the name without its numbers and the rank.

    Returns:
        Folds in order of their first member.
    """
    folds: dict[Any, list[Decision]] = {}
    for decision in decisions:
        name = tuple("#" if part.isdigit() else part for part in decision.name.split("."))
        folds.setdefault((name, len(decision.located.shape), key(decision)), []).append(decision)
    return list(folds.values())


def name_of(rows: Sequence[Decision]) -> Text:
    """`h.[0-11].ln_1.weight ×12`: the numbers that vary become ranges."""
    columns = zip(*(row.name.split(".") for row in rows), strict=True)
    parts = [column[0] if len(set(column)) == 1 else f"[{_numbers(column)}]" for column in columns]
    text = Text(".".join(parts))
    if len(rows) > 1:
        text.append(f" ×{len(rows)}", style="dim")
    if rows[0].aliases:
        text.append(
            f" = {', '.join(rows[0].aliases[:2])}{'…' if len(rows[0].aliases) > 2 else ''}", style="dim"
        )
    return text


def _numbers(column: Iterable[str]) -> str:
    """`0-2,5`: runs of consecutive numbers; many runs become `0…46`."""
    runs: list[list[int]] = []
    for number in sorted({int(part) for part in column}):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) > 3:
        return f"{runs[0][0]}…{runs[-1][1]}"
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def shape_of(rows: Sequence[Decision]) -> str:
    """The common shape; a size that varies is a dot."""
    sizes = zip(*(row.located.shape for row in rows), strict=True)
    return "×".join(str(column[0]) if len(set(column)) == 1 else "·" for column in sizes) or "scalar"


def _decay(decision: Decision) -> Text:
    if not decision.decays:
        return Text("–", style="dim")
    return Text(f"{decision.options['weight_decay']:g}", style="green")


def _verdict(decision: Decision) -> Text:
    return Text("decays", style="green") if decision.decays else Text("no decay", style="cyan")


def _doubt(decision: Decision) -> str:
    return " (low confidence)" if decision.confidence == "low" else ""


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.2g}–{high:.2g}"


def _totals(decisions: Sequence[Decision], groups: int) -> str:
    lines = []
    for label, decays in (("decay", True), ("no_decay", False)):
        chosen = [d.param.numel() for d in decisions if d.decays is decays]
        lines.append(f"{label}: {len(chosen)} params, {sum(chosen):,} values")
    return f"{'; '.join(lines)}; {groups} group{'' if groups == 1 else 's'}"
