"""The benchmarks' machinery: cases, formulas, the check of equal results, provenance, files. No timings."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import compare, host, measure, provenance
from benchmarks.cases import (
    CASES,
    CPU_RACES,
    GPT2,
    GPT2_XL,
    GPT2_XL_BF16,
    GPU_RACES,
    RESNET50,
    SMALL_IN_GROUPS,
    VIT_B,
    Case,
    Race,
)
from benchmarks.equality import check_equal_results
from benchmarks.measure import Bandwidth, Heat, Turn, block_medians
from benchmarks.peers import PASSES, PEERS, Problem, line_up
from benchmarks.pictures import plot_ratios
from benchmarks.results import Result, evaluate, from_json, print_table, to_json
from fused_adamw import FusedHygieneAdamW

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FEW = Case("few", ((3, 5), (7,), (4, 2, 3), (1,)), group_of=(0, 1, 0, 1))


@pytest.fixture(autouse=True)
def _one_thread(threads: Callable[[int], None]) -> None:
    """Nothing here is large: a second thread only waits."""
    threads(1)


@pytest.mark.parametrize(
    ("case", "tensors", "values", "groups"),
    [
        (GPT2, 148, 124_439_808, 1),
        (RESNET50, 161, 25_557_032, 1),
        (VIT_B, 152, 86_567_656, 50),
        (GPT2_XL, 580, 1_557_611_200, 1),
        (SMALL_IN_GROUPS, 500, 500_000, 64),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_case_has_the_models_tensors(case: Case, tensors: int, values: int, groups: int) -> None:
    assert (len(case.shapes), case.numel, len(case.groups)) == (tensors, values, groups)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_every_tensor_is_in_one_group(case: Case) -> None:
    assert sorted(i for group in case.groups for i in group) == list(range(len(case.shapes)))
    assert case.tiny().numel < 100_000


def test_races_have_different_names_and_neighbours_share_a_case() -> None:
    for races in (CPU_RACES, GPU_RACES):
        assert len({race.name for race in races}) == len(races)
        changes = sum(a.case is not b.case for a, b in itertools.pairwise(races))
        assert changes + 1 == len({race.case.name for race in races})


@pytest.mark.parametrize(
    ("peer", "clip", "fp32", "bf16"),
    [
        ("ours", True, 32, 16),
        ("ours", False, 28, 14),
        ("trick", True, 36, 18),
        ("fused", True, 40, 20),
        ("fused", False, 28, 14),
    ],
)
def test_bytes_per_parameter(peer: str, clip: bool, fp32: int, bf16: int) -> None:
    passes = PASSES[peer][not clip]
    assert GPT2_XL.bytes_moved(passes) == fp32 * GPT2_XL.numel
    assert GPT2_XL_BF16.bytes_moved(passes) == bf16 * GPT2_XL.numel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [True, False])
def test_all_peers_compute_the_same(clip: bool, dtype: torch.dtype) -> None:
    problem = Problem(replace(FEW, dtype=dtype), CPU)
    names = tuple(name for name in PEERS if name != "compiled")
    check_equal_results(problem, list(line_up(problem, names, clip=clip)))


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 2e-3), ("betas", (0.9, 0.951)), ("weight_decay", 0.0), ("eps", 1e-3)]
)
def test_another_optimizer_is_noticed(key: str, value: object) -> None:
    problem = Problem(FEW, CPU)
    ours, fused = line_up(problem, ("fused",), clip=True)
    ours.optimizer.param_groups[0][key] = value
    with pytest.raises(AssertionError, match="ours and fused differ"):
        check_equal_results(problem, [ours, fused])


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_another_clip_is_noticed(max_grad_norm: float | None) -> None:
    problem = Problem(FEW, CPU)
    ours, fused = line_up(problem, ("fused",), clip=True)
    ours.optimizer.max_grad_norm = max_grad_norm  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="ours and fused differ"):
        check_equal_results(problem, [ours, fused])


def test_nan_is_noticed() -> None:
    problem = Problem(FEW, CPU)
    ours, fused = line_up(problem, ("fused",), clip=False)

    def spoil() -> None:
        ours.step()
        with torch.no_grad():
            problem.params[1][2] = float("nan")

    with pytest.raises(AssertionError, match="param of tensor 1"):
        check_equal_results(problem, [replace(ours, step=spoil), fused])


def test_moved_gradients_are_elsewhere_and_equal() -> None:
    problem = Problem(FEW, CPU)
    before = [p.grad for p in problem.params]
    problem.move_gradients()
    for p, grad in zip(problem.params, before, strict=True):
        assert p.grad is not None
        assert grad is not None
        assert p.grad.data_ptr() != grad.data_ptr()
        assert torch.equal(p.grad, grad)


class Machine:
    """A host and a device as benchmarks.measure sees them; time passes only as work is said to take it.

    Attributes:
        calls: The work that was done.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._now = self._device_until = 0.0
        cuda = SimpleNamespace(synchronize=lambda _: self._wait(self._device_until), Event=self._event)
        fake = SimpleNamespace(device=torch.device, cuda=cuda, zeros=self._zeros)
        monkeypatch.setattr(measure, "torch", fake)
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self._now))

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
    heat = Heat(steps, CPU, turn_seconds=5 * tick, before=move if moved else None)
    machine.calls.clear()
    heat.round()
    first, batch = ["flush", "short"], ["short"] * 3
    if moved:
        first, batch = ["move", *first], ["move", "short"] * 3
    assert machine.calls == [*first, *batch, *["move"] * moved, "long"]
    assert heat.turns == {
        "short": [Turn(8 * tick, 2 * tick, 2 * tick)],
        "long": [Turn(None, 32 * tick, 32 * tick)],
    }


def test_a_turn_on_a_gpu_ends_when_the_device_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    tick = 1 / 1024
    heat = Heat(
        {"step": lambda: machine.work("step", on_host=tick, on_device=4 * tick)}, CUDA, turn_seconds=33 * tick
    )
    machine.calls.clear()
    heat.round()
    assert machine.calls == ["flush"] * 2 + ["step"] * (1 + 8)  # the caches of both
    overlapped = (tick + 8 * 4 * tick) / 8
    assert heat.turns == {"step": [Turn(5 * tick, overlapped, overlapped)]}


def test_contestants_use_threads_of_their_own() -> None:
    used: list[tuple[str, int]] = []
    steps = {name: lambda name=name: used.append((name, torch.get_num_threads())) for name in "abc"}  # type: ignore[misc]
    heat = Heat(steps, CPU, turn_seconds=0.0, threads_of={"a": 2, "b": None})
    heat.run(0.0, least=3, most=3)
    assert set(used) == {("a", 2), ("b", 1), ("c", 1)}
    assert torch.get_num_threads() == 1


def test_one_thread_is_a_contestant_where_there_are_more() -> None:
    problem = Problem(FEW, CPU)
    assert [peer.threads for peer in line_up(problem, ("fused", "one-thread"), clip=True)] == [None, None, 1]
    with_several = [race for race in CPU_RACES if race.threads != 1 and race.clip]
    assert len(with_several) > 6
    assert all(race.wanted["one-thread"] == 1.0 for race in with_several)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 6), (6.5, 9), (99.0, 12)])
def test_a_heat_runs_for_so_long(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    heat = Heat({name: lambda: machine.work("step", on_host=0.5) for name in "ab"}, CPU, turn_seconds=0.0)
    heat.run(seconds, least=4, most=10)
    assert all(len(turns) == rounds for turns in heat.turns.values())  # three blocks of the same size


def test_slow_contestants_take_their_turn_in_every_third_round(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    steps = {name: lambda name=name: machine.work(name, float(name)) for name in ("0.25", "0.75")}  # type: ignore[misc]
    heat = Heat(steps, CPU, turn_seconds=0.0)
    machine.calls.clear()
    heat.run(0.0, least=6, most=6)
    assert machine.calls == ["0.25", "0.75", "0.25", "0.25"] * 2


def _turns(seconds: Sequence[float]) -> list[Turn]:
    return [Turn(None, wall, wall) for wall in seconds]


def test_medians_by_thirds() -> None:
    assert block_medians(_turns([1, 2, 9, 4, 4, 5, 6, 6, 7])) == _turns([2, 4, 6])
    assert block_medians(_turns([3, 1])) == _turns([2, 2, 2])
    assert block_medians([Turn(9, 1, 2)] * 4) == [Turn(9, 1, 2)] * 3


def _evaluated(ours: list[float], **more: object) -> list[Result]:
    race = Race(FEW, 1, wanted={"fused": 2.0}, **more)  # type: ignore[arg-type]
    turns = {
        "ours": list(map(Turn, (4.0, 5.0, 6.0), ours, ours)),
        "fused": list(map(Turn, (8.0, 7.0, 9.0), (2.0, 3.0, 4.0), (2.0, 3.0, 4.0))),
        "for-loop": _turns([5.0, 5.0, 5.0]),
    }
    return evaluate(race, turns, Bandwidth(copy=4000.0, stream=8000.0), best=True)


def test_the_best_of_three_runs_is_reported() -> None:
    fused, loop = _evaluated([1.0, 1.0, 1.0])
    assert fused.name == "few/clip+step/1t/vs-fused"
    assert (fused.ratio, fused.ours_ms, fused.peer_ms) == (4.0, 1000.0, 4000.0)
    assert fused.detail["ratios"] == [2.0, 3.0, 4.0]
    assert fused.bytes == 32 * FEW.numel
    assert fused.copy_fraction == fused.bytes / 4000.0
    assert fused.reached is True
    assert (loop.ratio, loop.reached) == (5.0, None)


def test_first_steps_are_those_of_the_run_reported() -> None:
    keys = ("ours_first_ms", "peer_first_ms", "first_ratio")
    fused, loop = _evaluated([1.0, 1.0, 1.0])
    assert [fused.detail[key] for key in keys] == [6000.0, 9000.0, 1.5]
    fused, _ = _evaluated([1.0, 0.5, 1.0])
    assert [fused.detail[key] for key in keys] == [5000.0, 7000.0, 1.4]
    assert [loop.detail[key] for key in keys] == [6000.0, None, None]  # the peer's step is a long one


def test_the_table_shows_first_steps_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(_evaluated([1.0, 1.0, 1.0]), "title")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "few/" in line)
    assert [cell.strip() for cell in row.split("│")[-3:-1]] == ["4.00 ≥2 (1.50)", "5.00"]


@pytest.mark.parametrize(
    ("more", "reached"),
    [
        ({"wanted_copy_fraction": 0.1}, True),
        ({"wanted_copy_fraction": 0.99}, False),
        ({"wanted_ms": 999.0}, False),
    ],
    ids=str,
)
def test_all_that_is_wanted_counts(more: dict[str, object], reached: bool) -> None:
    assert _evaluated([1.0, 1.0, 1.0], **more)[0].reached is reached


@pytest.fixture
def result_files(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes a file of results for each of the times of ours."""

    def write(**times: list[float]) -> list[str]:
        for name, ours in times.items():
            payload = to_json(_evaluated(ours), provenance.provenance(CPU))
            (tmp_path / name).write_text(json.dumps(payload))
        return [str(tmp_path / name) for name in times]

    return write


def test_compare_tells_a_change_from_noise() -> None:
    noisy, steady, faster = map(_evaluated, ([1.0, 1.5, 1.25], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]))
    assert compare.speedup(noisy[0], steady[0]) == (1.25, False)
    assert compare.speedup(noisy[0], faster[0]) == (2.5, True)
    assert compare.speedup(faster[0], steady[0]) == (0.5, True)
    assert compare.matched([noisy, steady]) == list(zip(noisy, steady, strict=True))
    assert compare.matched([noisy, steady[1:]]) == [(noisy[1], steady[1])]


def test_compare_finds_the_best_of_several() -> None:
    slow, fast, between = map(_evaluated, ([4.0, 4.0, 4.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]))
    fused, loop = compare.matched([slow, fast, between])
    assert compare.best(fused) == (fast[0], True)
    assert compare.best(loop) == (fast[1], None)
    assert compare.best([slow[0], slow[0]]) == (slow[0], False)
    assert compare.best([fast[0], replace(slow[0], wanted_ratio=4.5)]) == (fast[0], False)


def test_compare_prints_every_ratio_and_the_best(
    result_files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(result_files(a=[4.0, 4.0, 4.0], b=[1.0, 1.0, 1.0], c=[2.0, 2.0, 2.0])) == 0
    times, ratios = capsys.readouterr().out.split("Ratios")

    def row(table: str) -> list[str]:
        (line,) = (line for line in table.splitlines() if "vs-fused" in line)
        return [cell.strip() for cell in line.split("│")[2:-1]]

    assert row(times) == ["4000.000 ±0%", "1000.000 ±0%", "2000.000 ±0%", "4.00", "2.00"]
    assert row(ratios) == ["1.00 (1.50)", "4.00 (1.50)", "2.00 (1.50)", "4.00 ≥2 (1.50)", "yes"]
    assert ratios.rstrip().endswith("Reached by the best of 3: 1 of 1")


def test_compare_marks_what_no_file_reached(
    result_files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(result_files(a=[4.0, 4.0, 4.0], b=[3.0, 3.0, 3.0])) == 0
    out = capsys.readouterr().out
    assert "│      no │" in out
    assert out.rstrip().endswith("Reached by the best of 2: 0 of 1")


def test_results_without_first_steps_can_be_read(
    result_files: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = result_files(old=[1.0, 1.0, 1.0])
    payload = json.loads(Path(file).read_text())
    for detail in payload["details"].values():
        for key in ("ours_first_ms", "peer_first_ms", "first_ratio"):
            del detail[key]
    Path(file).write_text(json.dumps(payload))
    assert compare.main([file, *result_files(new=[1.0, 1.0, 1.0])]) == 0
    assert "│ 4.00 │ 4.00 (1.50) │" in capsys.readouterr().out
    print_table(from_json(payload), "title")
    assert "│ 4.00 ≥2 │" in capsys.readouterr().out
    plot_ratios(from_json(payload), payload, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").exists()


def test_parts_of_a_step_are_what_a_step_finds_unchanged() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3)
    parts = host.parts(FusedHygieneAdamW(params, max_grad_norm=1.0))
    check = parts["check state, parameters, gradients"]
    assert list(array("q", check().addresses)) == [p.grad.data_ptr() for p in params]
    for part in parts.values():
        part()
    params[0].data = torch.ones(4)
    assert check() is None


def test_host_profile_has_a_line_for_each_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "ROUNDS", 2)
    host.main(["--tensors", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("check state")
    assert all(float(number) > 0 for line in lines[2:-2] for number in line.split()[-2:])
    assert "torch: " in lines[-1]


def test_provenance_says_where_a_result_comes_from() -> None:
    whence = provenance.provenance(CPU, commit="given")
    wanted = ("device", "driver", "torch", "triton", "commit", "dirty", "date", "source_sha256", "build")
    assert set(wanted) <= set(whence)
    assert whence["torch"] == torch.__version__
    assert len(whence["source_sha256"]) == 64
    assert whence["commit"]


def test_source_sha256_is_the_same_without_git(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for source in provenance.SOURCES:
        original = provenance.ROOT / source
        (tree / source).parent.mkdir(parents=True, exist_ok=True)
        if original.is_dir():
            shutil.copytree(original, tree / source)
        else:
            shutil.copy(original, tree / source)
    walked = provenance.source_files(tree)
    digest = provenance.source_sha256(tree)
    (tree / ".gitignore").write_text("__pycache__/\n*.so\n")
    git = ["git", "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q"], cwd=tree, check=True)
    subprocess.run([*git, "add", "."], cwd=tree, check=True)
    assert provenance.source_files(tree) == walked
    assert provenance.source_sha256(tree) == digest
    assert "csrc/adamw.h" in walked
    assert "fused_adamw/plan.py" in walked
    (tree / "csrc" / "adamw.h").write_text("// changed\n")
    assert provenance.source_sha256(tree) != digest
