"""Peers take turns, and a turn is timed as it should be: on a machine whose time passes as it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks.timing import InterleavedTimer, Turn, block_medians, interleaved

from .helpers import CPU, CUDA


class Machine:
    """A host and a device as benchmarks.timing sees them; time passes only as work is said to take it.

    Attributes:
        calls: The work that was done.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._now = self._device_until = 0.0
        cuda = SimpleNamespace(synchronize=lambda _: self._wait(self._device_until), Event=self._event)
        fake = SimpleNamespace(device=torch.device, cuda=cuda, zeros=self._zeros)
        monkeypatch.setattr(interleaved, "torch", fake)
        monkeypatch.setattr(interleaved, "time", SimpleNamespace(perf_counter=lambda: self._now))

    def work(self, name: str, on_host: float, on_device: float = 0.0) -> None:
        """Launch it on the host, then leave it to the device."""
        self.calls.append(name)
        self._now += on_host
        self._device_until = max(self._now, self._device_until) + on_device

    def _wait(self, until: float) -> None:
        self._now = max(self._now, until)

    def _event(self, *, enable_timing: bool) -> SimpleNamespace:
        def record() -> None:
            event.at = max(self._now, self._device_until)

        event = SimpleNamespace(record=record, synchronize=lambda: self._wait(event.at))
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def _zeros(self, numel: int, *, device: torch.device) -> SimpleNamespace:
        # Longer than all steps, and longest on the device.
        return SimpleNamespace(add_=lambda _: self.work("flush", device == CPU, 2 * (device == CUDA)))


@pytest.mark.parametrize("moved", [False, True])
def test_a_turn_is_a_first_step_and_a_batch(moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    tick = 1 / 1024

    def short() -> None:
        machine.work("short", 8 * tick if machine.calls[-1:] == ["flush"] else 2 * tick)

    def move() -> None:
        machine.work("move", on_host=1.0)

    steps = {"short": short, "long": lambda: machine.work("long", 32 * tick)}
    timer = InterleavedTimer(steps, CPU, turn_seconds=5 * tick, before=move if moved else None)
    machine.calls.clear()
    timer.round()
    first, batch = ["flush", "short"], ["short"] * 3
    if moved:
        first, batch = ["move", *first], ["move", "short"] * 3
    assert machine.calls == [*first, *batch, *["move"] * moved, "long"]
    assert timer.turns == {
        "short": [Turn(8 * tick, 2 * tick, 2 * tick)],
        "long": [Turn(None, 32 * tick, 32 * tick)],
    }


def test_a_turn_on_a_gpu_ends_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    tick = 1 / 1024
    timer = InterleavedTimer(
        {"step": lambda: machine.work("step", on_host=tick, on_device=4 * tick)}, CUDA, turn_seconds=33 * tick
    )
    machine.calls.clear()
    timer.round()
    assert machine.calls == ["flush"] * 2 + ["step"] * (1 + 8)  # the caches of both
    overlapped = (tick + 8 * 4 * tick) / 8
    assert timer.turns == {"step": [Turn(5 * tick, overlapped, overlapped)]}


def test_peers_use_threads_of_their_own() -> None:
    used: list[tuple[str, int]] = []
    steps = {name: lambda name=name: used.append((name, torch.get_num_threads())) for name in "abc"}  # type: ignore[misc]
    timer = InterleavedTimer(steps, CPU, turn_seconds=0.0, threads_of={"a": 2, "b": None})
    timer.run(0.0, least=3, most=3)
    assert set(used) == {("a", 2), ("b", 1), ("c", 1)}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 6), (6.5, 9), (99.0, 12)])
def test_a_timer_runs_for_so_long(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    timer = InterleavedTimer(
        {name: lambda: machine.work("step", on_host=0.5) for name in "ab"}, CPU, turn_seconds=0.0
    )
    timer.run(seconds, least=4, most=10)
    assert all(len(turns) == rounds for turns in timer.turns.values())  # three blocks of the same size


def test_slow_peers_take_their_turn_in_every_third_round(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    steps = {name: lambda name=name: machine.work(name, float(name)) for name in ("0.25", "0.75")}  # type: ignore[misc]
    timer = InterleavedTimer(steps, CPU, turn_seconds=0.0)
    machine.calls.clear()
    timer.run(0.0, least=6, most=6)
    assert machine.calls == ["0.25", "0.75", "0.25", "0.25"] * 2


def _turns(seconds: Sequence[float]) -> list[Turn]:
    return [Turn(None, wall, wall) for wall in seconds]


def test_medians_by_thirds() -> None:
    assert block_medians(_turns([1, 2, 9, 4, 4, 5, 6, 6, 7])) == _turns([2, 4, 6])
    assert block_medians(_turns([3, 1])) == _turns([2, 2, 2])
    assert block_medians([Turn(9, 1, 2)] * 4) == [Turn(9, 1, 2)] * 3
