"""The file of a measuring session: where it comes from, and one line per race and peer.

A CSV file whose first lines, `# key: value`, are the provenance; values are JSON. An acceptance run on a GPU
leaves JSON, which has the same fields.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .results import Result

_KINDS = {field.name: str(field.type) for field in fields(Result)}


@dataclass(frozen=True)
class Session:
    """What one run measured.

    Attributes:
        provenance: Hardware, versions, source, date.
        results: One per race and peer.
    """

    provenance: dict[str, Any]
    results: list[Result]


def to_result(values: Mapping[str, Any]) -> Result:
    """A result from its fields; lists become tuples."""
    return Result(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _to_cell(value: object) -> str:
    """Seven digits of a number: more than can be measured."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " ".join(map(_to_cell, value))
    if isinstance(value, float):
        return f"{value:.7g}"
    return str(value)


def _from_cell(kind: str, cell: str) -> object:
    if kind.startswith("tuple"):
        return tuple(map(float, cell.split()))
    if cell == "" and kind.endswith("| None"):
        return None
    if kind.startswith("bool"):
        return cell == "True"
    return int(cell) if kind.startswith("int") else float(cell) if kind.startswith("float") else cell


def write_csv(path: Path, provenance: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns below their provenance, making folders as needed."""
    text = io.StringIO()
    for key, value in provenance.items():
        text.write(f"# {key}: {json.dumps(value)}\n")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(rows[0])
    lines.writerows([_to_cell(value) for value in row.values()] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue())


def read_csv(path: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Provenance and rows of a file that `write_csv` wrote."""
    lines = path.read_text().splitlines()
    head = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    return {key: json.loads(value) for key, _, value in head}, list(csv.DictReader(lines[len(head) :]))


def write(path: Path, session: Session) -> None:
    """Write a session as CSV."""
    write_csv(path, session.provenance, [vars(result) for result in session.results])


def read(path: Path) -> Session:
    """Read a session: CSV, or the JSON of an acceptance run."""
    if path.suffix == ".json":
        payload = json.loads(path.read_text())
        return Session(payload, [to_result(values) for values in payload["details"].values()])
    provenance, rows = read_csv(path)
    return Session(
        provenance,
        [to_result({name: _from_cell(_KINDS[name], cell) for name, cell in row.items()}) for row in rows],
    )


def describe(session: Session) -> str:
    """Where it comes from, in one line."""
    whence: Mapping[str, Any] = session.provenance
    commit = (whence["commit"] or "unknown")[:10] + (" + changes" if whence["dirty"] else "")
    return f"{whence['device']} · torch {whence['torch']} · commit {commit} · {whence['date'][:10]}"
