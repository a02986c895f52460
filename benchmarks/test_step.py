"""Clip + step on the CPU against torch's AdamW of every kind, and ours on one thread: `make bench`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .cases import CPU_RACES, Case, Race
from .equality import check_equal_results
from .peers import Peer, make_peers
from .problem import Problem
from .report.results import Result, evaluate
from .timing import InterleavedTimer, bandwidth, threads

CPU = torch.device("cpu")
PEERS = {
    True: ("fused", "fused+grad_scale", "foreach", "for-loop", "one-thread"),
    False: ("fused",),
}  # by the clip
# Here it is true: the peers clip the gradients that ours steps too.
pytestmark = pytest.mark.filterwarnings("ignore:for . steps the gradient norm was max_grad_norm")


@functools.lru_cache(maxsize=1)  # one at a time: large cases take gigabytes
def _problem(case: Case) -> Problem:
    return Problem(case, CPU)


@functools.lru_cache(maxsize=2)
def _checked_peers(case: Case, clip: bool, names: tuple[str, ...]) -> tuple[Peer, ...]:
    problem = _problem(case)
    peers = tuple(make_peers(problem, names or PEERS[clip], clip=clip))
    check_equal_results(problem, peers)
    return peers


@pytest.fixture(autouse=True, scope="module")
def _free_memory() -> Iterator[None]:
    yield
    _problem.cache_clear()
    _checked_peers.cache_clear()


@pytest.mark.parametrize("race", CPU_RACES, ids=lambda race: race.name)
def test_step(
    race: Race, benchmark: Callable[..., Any], results: list[Result], pytestconfig: pytest.Config
) -> None:
    quick = pytestconfig.getoption("--quick")
    if quick:
        race = race.tiny()
    with threads(race.threads):
        memory = bandwidth(CPU, 1 << 20 if quick else None)
        checked = _checked_peers(race.case, race.clip, race.peers)
        peers = [peer for peer in checked if peer.threads != race.threads]
        timer = InterleavedTimer(
            {peer.name: peer.step for peer in peers},
            CPU,
            turn_seconds=0.005,
            before=_problem(race.case).before_step(race.gradients),
            threads_of={peer.name: peer.threads for peer in peers},
        )
        limits = (0.0, 3, 3) if quick else (pytestconfig.getoption("--seconds"), 9, 600)
        benchmark.pedantic(timer.run, args=limits)  # type: ignore[attr-defined]
    if benchmark.stats is None:  # type: ignore[attr-defined]
        return  # --benchmark-disable
    # pytest-benchmark timed all of it; its table and its --benchmark-compare are to show a step of ours.
    benchmark.stats.stats.data[:] = [turn.wall for turn in timer.turns["ours"]]  # type: ignore[attr-defined]
    against = evaluate(race, timer.turns, memory, best=True)
    results += against
    one = against[0]
    benchmark.extra_info.update(  # type: ignore[attr-defined]
        bytes=one.bytes,
        gbps=one.gbps,
        memcpy_gbps=one.copy_gbps,
        copy_fraction=one.copy_fraction,
        stream_fraction=one.stream_fraction,
        **{f"ratio_{result.peer}": result.ratio for result in against},
    )
