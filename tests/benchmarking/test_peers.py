"""Who is compared with whom."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import peers
from benchmarks.cases import CPU_RACES, LOW_PRECISION
from benchmarks.peers import fused, make_peers
from benchmarks.problem import Problem

from .helpers import CPU, FEW


def test_peers_that_are_not_installed_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    problem = Problem(FEW, CPU)
    assert [peer.name for peer in make_peers(problem, ("fused", "deepspeed"), clip=False)] == [
        "ours",
        "fused",
    ]
    assert "deepspeed" in peers.not_installed()
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    assert peers.not_installed() == []


def test_step_counts_that_are_numbers_begin_anew() -> None:
    problem = Problem(FEW, CPU)
    peer = fused(problem, clip=False)
    problem.share_state(peer.optimizer, lambda: 7)
    peer.restart()
    assert {state["step"] for state in peer.optimizer.state.values()} == {0}


def test_peers_in_low_precision_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(LOW_PRECISION[0].tiny(), CPU)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    names = [peer.name for peer in make_peers(problem, ("foreach", "one-thread"), clip=True)]
    assert names == ["ours", "plain", "fused", "float32+copy", "one-thread"]


def test_one_thread_is_a_peer_where_there_are_more() -> None:
    problem = Problem(FEW, CPU)
    assert [peer.threads for peer in make_peers(problem, ("fused", "one-thread"), clip=True)] == [
        None,
        None,
        1,
    ]
    with_several = [race for race in CPU_RACES if race.threads != 1 and race.clip]
    assert len(with_several) > 6
    assert all(race.target_ratios["one-thread"] == 1.0 for race in with_several)
