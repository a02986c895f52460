"""Results, their files and their tables: what is written in the pages is what the files say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import provenance
from benchmarks.cases import Case, Race
from benchmarks.report import __main__ as command
from benchmarks.report import marked, sessions, tables
from benchmarks.report.pictures import plot_ratios, plot_roofline
from benchmarks.report.results import Result, evaluate, print_table
from benchmarks.report.sessions import Session
from benchmarks.timing import Bandwidth, Turn

FEW = Case("few", ((3, 5), (7,), (4, 2, 3), (1,)), group_of=(0, 1, 0, 1))


def _evaluated(ours: list[float], **more: object) -> list[Result]:
    race = Race(FEW, 1, target_ratios={"fused": 2.0}, **more)  # type: ignore[arg-type]
    turns = {
        "ours": list(map(Turn, (4.0, 5.0, 6.0), ours, ours)),
        "fused": list(map(Turn, (8.0, 7.0, 9.0), (2.0, 3.0, 4.0), (2.0, 3.0, 4.0))),
        "for-loop": [Turn(None, 5.0, 5.0)] * 3,
    }
    return evaluate(race, turns, Bandwidth(copy=4000.0, stream=8000.0), best=True)


def test_the_best_of_three_runs_is_reported() -> None:
    fused, loop = _evaluated([1.0, 1.0, 1.0])
    assert fused.name == "few/clip+step/1t/vs-fused"
    assert (fused.ratio, fused.ours_ms, fused.peer_ms) == (4.0, 1000.0, 4000.0)
    assert fused.ratios == (2.0, 3.0, 4.0)
    assert fused.bytes == 32 * FEW.numel
    assert fused.copy_fraction == fused.bytes / 4000.0
    assert fused.reached is True
    assert (loop.ratio, loop.reached) == (5.0, None)


def test_first_steps_are_those_of_the_run_reported() -> None:
    keys = ("ours_first_ms", "peer_first_ms", "first_ratio")
    fused, loop = _evaluated([1.0, 1.0, 1.0])
    assert [getattr(fused, key) for key in keys] == [6000.0, 9000.0, 1.5]
    fused, _ = _evaluated([1.0, 0.5, 1.0])
    assert [getattr(fused, key) for key in keys] == [5000.0, 7000.0, 1.4]
    assert [getattr(loop, key) for key in keys] == [6000.0, None, None]  # the peer's step is a long one


def test_the_table_shows_first_steps_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(_evaluated([1.0, 1.0, 1.0]), "title")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "few/" in line)
    assert [cell.strip() for cell in row.split("│")[-3:-1]] == ["4.00 ≥2 (1.50)", "5.00"]


@pytest.mark.parametrize(
    ("more", "reached"),
    [
        ({"target_copy_fraction": 0.1}, True),
        ({"target_copy_fraction": 0.99}, False),
        ({"target_stream_fraction": 0.05}, True),
        ({"target_stream_fraction": 0.99}, False),
        ({"target_ms": 999.0}, False),
    ],
    ids=str,
)
def test_all_targets_count(more: dict[str, object], reached: bool) -> None:
    assert _evaluated([1.0, 1.0, 1.0], **more)[0].reached is reached


@pytest.fixture
def session() -> Session:
    """Two results, one without first steps."""
    return Session(provenance.provenance(torch.device("cpu")), _evaluated([1.0, 0.5, 1.0]))


def test_a_session_is_read_as_it_was_written(session: Session, tmp_path: Path) -> None:
    sessions.write(tmp_path / "deep" / "a.csv", session)
    assert sessions.read(tmp_path / "deep" / "a.csv") == session


def test_numbers_keep_seven_digits(session: Session, tmp_path: Path) -> None:
    (one, _) = session.results
    sessions.write(tmp_path / "a.csv", replace(session, results=[replace(one, ours_ms=1.23456789)]))
    assert sessions.read(tmp_path / "a.csv").results[0].ours_ms == 1.234568


def test_an_acceptance_run_is_read_from_its_json(session: Session, tmp_path: Path) -> None:
    details = {result.name: asdict(result) for result in session.results}
    (tmp_path / "gpu.json").write_text(json.dumps({**session.provenance, "details": details}))
    assert sessions.read(tmp_path / "gpu.json").results == session.results


def test_pictures_are_drawn_with_and_without_first_steps(session: Session, tmp_path: Path) -> None:
    without = [replace(r, ours_first_ms=None, stream_gbps=None) for r in session.results]
    for results in (session.results, without):
        for plot in (plot_ratios, plot_roofline):
            plot(replace(session, results=results), tmp_path / "picture.png")
            assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
            (tmp_path / "picture.png").unlink()


def test_pictures_show_the_rows_of_the_tables_or_all_races(session: Session) -> None:
    (one, two) = session.results
    training = replace(one, race="train-gpt-like/clip+step/2t")
    shown, labels = tables.pictured(replace(session, results=[training, two]))
    assert [labels[r.race] for r in shown.results] == ["training: GPT-like, 2 threads"]
    assert tables.pictured(session) == (session, {})


def test_the_command_prints_sessions_side_by_side(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = [replace(r, ours_ms=2 * r.ours_ms) for r in session.results]
    sessions.write(tmp_path / "a.csv", session)
    sessions.write(tmp_path / "b.csv", replace(session, results=slower))
    command.main([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    *whence, head, _, row = capsys.readouterr().out.strip().splitlines()
    assert [line.partition(":")[0] for line in whence] == ["a", "b"]
    assert head == "| race | target | a | b |"
    assert row == "| few/clip+step/1t | 2 | 6.00 (1.40) | 3.00 (1.40) |"


def test_a_table_is_filled_in_between_its_marks() -> None:
    page = "before\n<!-- table: a -->\nold\n<!-- /table -->\nafter\n<!-- table: b -->\n<!-- /table -->"
    filled = marked.fill(page, {"a": lambda: "new", "b": lambda: "| x |"})
    assert filled == (
        "before\n<!-- table: a -->\nnew\n<!-- /table -->\nafter\n<!-- table: b -->\n| x |\n<!-- /table -->"
    )
    assert marked.names(filled) == ["a", "b"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table: a -->\nno end", "mark"),
        ("no beginning <!-- /table -->", "mark"),
        ("<!-- table: c -->\n<!-- /table -->", "no table 'c'"),
    ],
)
def test_a_mark_that_is_wrong_is_an_error(page: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        marked.fill(page, {"a": lambda: ""})


@pytest.mark.parametrize("name", command.PAGES)
def test_the_tables_of_a_page_are_in_step_with_the_files(name: str) -> None:
    """Otherwise: python -m benchmarks.report."""
    page = (provenance.ROOT / name).read_text()
    assert marked.fill(page, command.all_tables()) == page


def test_every_table_is_in_a_page() -> None:
    pages = [(provenance.ROOT / name).read_text() for name in command.PAGES]
    found = [name for page in pages for name in marked.names(page)]
    assert set(found) == set(command.all_tables())


def test_pages_are_written_where_they_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "PAGES", ("a.md", "b.md"))
    monkeypatch.setattr(command, "all_tables", lambda: {"t": lambda: "new"})
    for name, body in (("a.md", "new"), ("b.md", "old")):
        (tmp_path / name).write_text(f"<!-- table: t -->\n{body}\n<!-- /table -->\n")
    assert command.write_pages() == ["b.md"]
    assert (tmp_path / "b.md").read_text() == (tmp_path / "a.md").read_text()


def test_every_committed_session_says_where_it_comes_from() -> None:
    files = [*tables.RESULTS.glob("*.csv"), *tables.RESULTS.glob("*.json")]
    assert files
    for path in files:
        whence = (sessions.read_csv(path) if path.suffix == ".csv" else [json.loads(path.read_text())])[0]
        assert whence["commit"]
        assert not whence["dirty"]
        assert {"device", "cpu", "cores", "torch", "date", "sources", "source_sha256"} <= set(whence)


def test_the_tables_are_of_the_latest_day(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def on(day: str, gradients: str) -> tuple[Path, Session]:
        results = [replace(result, gradients=gradients) for result in session.results]
        return Path(f"{day}-{gradients}.csv"), Session({"date": f"{day}T10:00:00"}, results)

    found = [on("2026-01-01", "kept"), on("2026-01-02", "kept"), on("2026-01-03", "new")]
    monkeypatch.setattr(tables, "_all_sessions", lambda: found)
    assert [path.stem for path, _ in tables.warm()] == ["2026-01-02-kept"]
    assert [path.stem for path, _ in tables.training()] == ["2026-01-03-new"]


def test_a_range_is_shown_where_most_runs_have_it() -> None:
    assert tables._span([1.234, 2.0, 12.34]) == "1.23 to 12.3×"
    assert tables._span([1.5, 1.501]) == "1.50×"
    assert tables._span([1.5, None, None]) == tables._span([]) == ""
