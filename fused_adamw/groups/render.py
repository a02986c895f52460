"""Tables for people: repeated layers folded into one line, readable in 100 columns."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .decide import Decision

if TYPE_CHECKING:
    from .report import ParamGroupReport, PolicyDiff


def report_table(report: ParamGroupReport) -> Group:
    """Draw a report: a line per parameter or fold of parameters, totals, remarks."""
    scaled = any(d.lr_scale != 1 for d in report.decisions)
    table = Table(
        title=f"{report.model_name}, policy {report.policy.name}", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("decay", justify="right")
    if scaled:
        table.add_column("lr scale", justify="right")
    table.add_column("role")
    table.add_column("decided by", overflow="fold")
    for rows in fold(
        report.decisions, lambda d: (d.decays, d.role, d.rule, _because(d), d.options["weight_decay"])
    ):
        first = rows[0]
        cells: list[str | Text] = [_name(rows), _shape(rows), _decay(first)]
        if scaled:
            cells.append(_range([d.lr_scale for d in rows]))
        table.add_row(*cells, str(first.role), _because(first) + _doubt(first))
    remarks = [
        Text(f"{r.level}: {r}", style="yellow" if r.level == "warning" else "dim") for r in report.lints
    ]
    return Group(table, *(Text(line) for line in _totals(report)), *remarks)


def diff_table(diff: PolicyDiff) -> Group:
    """Draw where two policies disagree."""
    ours, theirs = diff.report.policy.name, diff.policy.name
    total = len(diff.report.decisions)
    title = f"{diff.report.model_name}: {ours} and {theirs} disagree on {len(diff)} of {total} tensors"
    if not diff.pairs:
        return Group(Text(title))
    other = {mine.name: their for mine, their in diff.pairs}
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column(ours, overflow="fold")
    table.add_column(theirs, overflow="fold")

    def key(d: Decision) -> tuple[Any, ...]:
        return d.decays, d.role, d.rule, _because(d), other[d.name].evidence

    for rows in fold([mine for mine, _ in diff.pairs], key):
        mine, their = rows[0], other[rows[0].name]
        table.add_row(
            _name(rows),
            _shape(rows),
            Text.assemble(_verdict(mine), f": {mine.role}, {_because(mine)}"),
            Text.assemble(_verdict(their), f": {their.evidence.partition(': ')[2] or their.evidence}"),
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


def _name(rows: Sequence[Decision]) -> Text:
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


def _shape(rows: Sequence[Decision]) -> str:
    """The common shape; a size that varies is a dot."""
    sizes = zip(*(row.located.shape for row in rows), strict=True)
    return "×".join(str(column[0]) if len(set(column)) == 1 else "·" for column in sizes) or "scalar"


def _decay(decision: Decision) -> Text:
    if not decision.decays:
        return Text("–", style="dim")
    return Text(f"{decision.options['weight_decay']:g}", style="green")


def _verdict(decision: Decision) -> Text:
    return Text("decays", style="green") if decision.decays else Text("no decay", style="cyan")


def _because(decision: Decision) -> str:
    """The evidence in a few words; the same for all layers that repeat."""
    place = decision.located.places[0]
    if decision.rule in ("type", "structure"):
        return decision.owner
    if decision.rule in ("name", "shape", "default"):
        return f"{decision.rule} {place.local}"
    if decision.rule == "adapter":
        return f"adapter {place.name.removeprefix(place.owner_name).strip('.') or place.local}"
    if decision.rule == "mark":
        what, _, rest = decision.evidence.partition(" lists ")
        return what.partition(" of ")[0] + (" lists it" if rest else "")
    return decision.evidence


def _doubt(decision: Decision) -> str:
    return " (low confidence)" if decision.confidence == "low" else ""


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.2g}–{high:.2g}"


def _totals(report: ParamGroupReport) -> list[str]:
    lines = []
    for label, decays in (("decay", True), ("no_decay", False)):
        chosen = [d.param.numel() for d in report.decisions if d.decays is decays]
        lines.append(f"{label}: {len(chosen)} params, {sum(chosen):,} values")
    groups = len(report.groups)
    return [f"{'; '.join(lines)}; {groups} group{'' if groups == 1 else 's'}"]
