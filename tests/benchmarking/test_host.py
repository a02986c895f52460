"""The profile of the host: a line for each part of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import host
from benchmarks.peers import make_peers
from benchmarks.problem import Problem
from benchmarks.report import sessions

from .helpers import CPU, FEW


def test_host_profile_has_a_line_for_each_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "COLUMNS", dict.fromkeys(("a", "b"), (FEW, "moved")))
    host.main(["--rounds", "2", "--out", str(tmp_path / "host.csv")])
    lines = capsys.readouterr().out.splitlines()[2:]
    parts = [*host.PARTS, host.WHOLE, host.PEER]
    assert [line[:46].strip() for line in lines] == parts
    whence, rows = sessions.read_csv(tmp_path / "host.csv")
    assert [row["part"] for row in rows] == parts
    for row in rows:
        assert float(row["a"]) > 0
        assert float(row["b"]) > 0
    assert {"device", "commit", "rounds"} <= set(whence)


def test_the_host_profile_times_what_a_step_calls_and_leaves_it_as_it_was() -> None:
    before = [getattr(owner, name) for owner, name in host.PARTS.values()]
    problem = Problem(FEW, CPU)
    (peer,) = make_peers(problem, (), clip=True)
    peer.step()
    spent: dict[str, float] = {}
    with host.parts_timed(spent):
        peer.step()
    assert list(spent) == list(host.PARTS), "in the order in which a step does them"
    assert [getattr(owner, name) for owner, name in host.PARTS.values()] == before
