"""The acceptance run on a GPU, as far as a CPU can dry-run it, and what one failure leaves of the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import gpu_acceptance, provenance, timing
from benchmarks.cases import RESNET50
from benchmarks.gpu import launches, races, stages, summary, table
from benchmarks.gpu.run import FAILED, NOT_FINISHED, OK, Run, worst
from benchmarks.gpu.stages import STAGES
from benchmarks.peers import bytes_moved
from benchmarks.report import sessions
from fused_adamw import FusedHygieneAdamW

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
# The peers clip the gradients that ours steps too.
pytestmark = pytest.mark.filterwarnings("ignore:for . steps the gradient norm was max_grad_norm")


@pytest.fixture(autouse=True)
def _one_thread(threads: Callable[[int], None]) -> None:
    """Nothing here is large: a second thread only waits."""
    threads(1)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A dry run that has looked at its machine."""
    machine = {
        "provenance": {"device": "pretend", "source_sha256": "0", "torch": "2"},
        "unavailable_reason": {"native": None, "triton": "not here", "reference": None},
    }
    (logs := tmp_path / "logs").mkdir()
    deadline = time.monotonic() + 60
    return Run(tmp_path, "cpu", None, dry_run=True, logs=logs, deadline=deadline, machine=machine)


def test_acceptance_refuses_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_acceptance.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_acceptance_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the commands: the tensors are small
    chosen = ["launches", "table", "ncu"]
    arguments = ["--out", str(tmp_path), "--dry-run", "--commit", "abc", "--stages", *chosen]
    assert gpu_acceptance.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("acceptance.json", "logs.tgz", "ratios.png", "roofline.png")
    }
    payload = json.loads((tmp_path / "acceptance.json").read_text())
    assert payload["source_sha256"] == provenance.source_sha256()
    assert payload["sources"] == list(provenance.SOURCES)
    assert payload["dry_run"] is True
    assert {"device", "driver", "torch", "triton", "commit", "date"} <= set(payload)
    assert {case["name"].partition("/")[0] for case in payload["cases"]} == {
        race.race.case.name for race in races.GPU_RACES
    }
    for case in payload["cases"]:
        assert set(case) >= {
            *("name", "ratio", "wanted_ratio", "copy_fraction", "wanted_copy_fraction"),
            *("ours_ms", "peer_ms", "bytes"),
        }
        assert case["stream_fraction"] > 0
    assert list(payload["stages"]) == chosen
    with tarfile.open(tmp_path / "logs.tgz") as archive:
        assert {"logs/table.log", "logs/table.json", "logs/probe.log"} <= set(archive.getnames())
    assert capsys.readouterr().out.rstrip().endswith("acceptance.json")
    session = sessions.read(tmp_path / "acceptance.json")
    assert len(session.results) == len(payload["cases"])


def test_a_failing_stage_leaves_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Run) -> dict[str, object]:
        raise ValueError("broken")

    monkeypatch.setitem(STAGES, "launches", (fail, 1))
    gpu_acceptance.run_stages(run, ("launches", "ncu"), 10)
    found = json.loads((run.out / "acceptance.json").read_text())["stages"]
    assert found["launches"]["error"] == "ValueError: broken"
    assert found["ncu"]["ok"]


def test_a_file_that_cannot_be_written_leaves_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Run.save
    calls = iter((OSError("no space left"), None))

    def save_second(self: Run) -> None:
        if error := next(calls):
            raise error
        save(self)

    monkeypatch.setattr(Run, "save", save_second)
    ok = (lambda _: {"status": OK}, 1)
    for name in ("build", "tests"):
        monkeypatch.setitem(STAGES, name, ok)
    gpu_acceptance.run_stages(run, ("build", "tests"), 10)
    assert list(json.loads((run.out / "acceptance.json").read_text())["stages"]) == ["build", "tests"]


def test_a_command_that_takes_too_long_may_say_what_it_has(run: Run) -> None:
    slow = """if True:
        import time
        try:
            print("began", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("so far")
    """
    run.deadline = time.monotonic() + 2
    code, output = run.command("slow", sys.executable, "-c", slow)
    assert code is None
    assert output.split("\n")[:2] == ["began", "so far"]


@pytest.mark.parametrize("name", ["build", "smoke", "tests", "launches", "sanitize", "table"])
def test_what_runs_out_of_time_is_not_finished_and_has_not_failed(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "command", lambda *_, **__: (None, "so far"))
    run.run(name, STAGES[name][0], 1)
    assert (run.stages[name]["status"], run.stages[name]["ok"]) == (NOT_FINISHED, False)
    (line,) = (line for line in summary.summarize(run) if line.startswith(name))
    assert "NOT FINISHED" in line
    assert "FAILED" not in line


def test_a_failure_weighs_more_than_a_lack_of_time() -> None:
    assert worst([OK, NOT_FINISHED]) == NOT_FINISHED
    assert worst([FAILED, NOT_FINISHED, OK]) == FAILED
    assert worst([]) == OK


def test_calls_take_under_ten_minutes_and_have_all_stages() -> None:
    assert {name for _, names in gpu_acceptance.CALLS.values() for name in names} == set(STAGES)
    for seconds, names in gpu_acceptance.CALLS.values():
        assert sum(STAGES[name][1] for name in names) <= seconds < 600
    assert (STAGES["sanitize"][1], STAGES["ncu"][1]) == (120, 60)


def test_a_stage_leaves_the_next_ones_what_they_need(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {}

    def look(name: str) -> Callable[[Run], dict[str, Any]]:
        def stage(run: Run) -> dict[str, Any]:
            left[name] = run.left
            return {"status": OK}

        return stage

    for name, (_, needed) in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, (look(name), needed))
    seconds, names = gpu_acceptance.CALLS[3]
    gpu_acceptance.run_stages(run, names, seconds)
    needed = {name: STAGES[name][1] for name in names}
    assert left["build"] == pytest.approx(seconds - needed["table"] - needed["ncu"], abs=2)
    assert left["table"] == pytest.approx(seconds - needed["ncu"], abs=2)
    assert left["ncu"] == pytest.approx(seconds, abs=2)


def test_a_later_call_continues_the_files_of_an_earlier_one(run: Run) -> None:
    (run.logs / "build.log").write_text("built")
    run.run("build", lambda _: {"status": OK}, 1)
    (logs := run.out / "later").mkdir()
    later = Run(run.out, "cpu", None, True, logs, machine=run.machine)
    assert later.resume()
    later.run("ncu", lambda _: {"status": OK}, 1)
    assert list(json.loads((run.out / "acceptance.json").read_text())["stages"]) == ["build", "ncu"]
    with tarfile.open(run.out / "logs.tgz") as archive:
        assert archive.getnames() == ["logs/build.log"]

    changed = {**run.machine, "provenance": {**run.machine["provenance"], "source_sha256": "1"}}
    assert not Run(run.out, "cpu", None, True, logs, machine=changed).resume()


def test_the_paths_of_the_tests_have_all_of_them() -> None:
    paths = stages.test_paths()
    assert ROOT / "tests" / "contract" in paths
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    skipped = [path for path in (ROOT / "tests").iterdir() if path.name in stages.WITHOUT_GPU_TESTS]
    assert len(skipped) == len(stages.WITHOUT_GPU_TESTS)
    done = subprocess.run([*command, *skipped], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
    assert {path.stem for path in stages.test_paths(*stages.FIRST_TESTS)} == set(stages.FIRST_TESTS)


def test_acceptance_compiles_triton_for_the_tests(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise conftest.py has it interpreted, and leaves its tests on a GPU out."""
    given, left = [], []

    def command(_: object, log: str, *words: str, **environment: str) -> tuple[int, str]:
        given.append(environment)
        left.append(run.left)
        return int(log == "tests-large"), f"end of {log}"

    monkeypatch.setattr(Run, "command", command)
    run.run("tests", stages.tests, 100)
    assert left[0] < left[1] - 30, "time is kept for the large ones"
    assert given == [{"TRITON_INTERPRET": "0"}] * 2
    assert run.stages["tests"]["status"] == FAILED
    assert run.stages["tests"]["large"]["exit_code"] == 1
    assert "end of tests; large: end of tests-large" in summary.summarize(run)[0]


@pytest.mark.parametrize(("skipped", "status"), [(2, OK), (3, FAILED)])
def test_tests_that_are_all_skipped_show_nothing(
    skipped: int, status: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(run: Run, log: str, *_: str, **__: str) -> tuple[int, str]:
        (run.logs / f"{log}.xml").write_text(
            f'<testsuite tests="3" failures="0" errors="0" skipped="{skipped}"/>'
        )
        return 0, "passed"

    monkeypatch.setattr(Run, "command", command)
    run.dry_run = False
    run.run("tests", stages.tests, 60)
    assert run.stages["tests"]["status"] == status
    assert "passed; large: passed" in summary.summarize(run)[0]


def test_a_build_without_cuda_is_not_enough(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "command", lambda *_, **__: (0, ""))
    monkeypatch.setattr(Run, "probe", lambda _: None)
    run.machine["unavailable_reason"]["native"] = "built without CUDA"
    run.run("build", stages.build, 1)
    assert run.stages["build"]["status"] == FAILED
    assert "native built without CUDA" in summary.summarize(run)[0]


def _program(folder: Path, name: str, code: str) -> None:
    """A program that is found on PATH, in Python."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport subprocess, sys, time\n{code}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_each_tool_of_the_sanitizer_says_what_it_found(run: Run, bin_folder: Path) -> None:
    _program(
        bin_folder,
        "compute-sanitizer",
        'print("========= ERROR SUMMARY: 0 errors")\nif "racecheck" in sys.argv: time.sleep(60)',
    )
    run.device = "cuda"
    run.run("sanitize", stages.sanitize, 4)
    found = run.stages["sanitize"]
    assert found["memcheck"]["status"] == OK
    assert found["racecheck"]["status"] == found["status"] == NOT_FINISHED
    assert "memcheck: ERROR SUMMARY: 0 errors" in summary.summarize(run)[0]


def test_the_figures_of_ncu_are_read(run: Run, bin_folder: Path) -> None:
    _program(
        bin_folder,
        "ncu",
        'print("==PROF== Connected")\n'
        'print(\'"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\')\n'
        'print(\'"0","update","dram__bytes.sum","Gbyte","1.88"\')\n'
        'print(\'"0","update","launch__registers_per_thread","","40"\')',
    )
    run.device = "cuda"
    run.run("ncu", stages.ncu, 10)
    assert run.stages["ncu"]["kernels"] == {"0 update": {"dram_bytes": "1.88 Gbyte", "registers": "40"}}
    assert "dram_bytes 1.88 Gbyte" in summary.summarize(run)[0]


@pytest.fixture
def two_races(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leaves two races in the table and one case for the launches; the names of the races."""
    chosen = [gpu for gpu in races.GPU_RACES if gpu.race.case is RESNET50 and gpu.race.gradients == "kept"]
    monkeypatch.setattr(table, "GPU_RACES", chosen)
    monkeypatch.setattr(launches, "CASES", (RESNET50,))
    return [gpu.race.name for gpu in chosen]


@pytest.mark.parametrize("broken", ["native", "reference"])
def test_a_broken_backend_leaves_the_other(
    broken: str, two_races: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FusedHygieneAdamW.step

    def fail(optimizer: FusedHygieneAdamW) -> None:
        if optimizer.backend == broken:
            raise RuntimeError("no launch")
        step(optimizer)

    monkeypatch.setattr(FusedHygieneAdamW, "step", fail)
    backends = ("native", "reference")
    (other,) = {*backends} - {broken}

    found = launches.look(backends, CPU, dry_run=True)
    assert {row["backend"] for row in found["rows"]} == {other}
    assert set(found["errors"].values()) == {"RuntimeError: no launch"}
    assert all(f"/{broken}/" in name for name in found["errors"])

    report = table.Table(tmp_path / "table.json")
    assert table.run(report, backends, CPU, 1.0, dry_run=True)
    assert {result["backend"] for result in report.results} == {other}
    assert report.errors == {f"{name}/{broken}": "RuntimeError: no launch" for name in two_races}


def test_a_device_that_broke_leaves_the_rest_to_another_process(
    two_races: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (("native",), CPU, 1.0, True)
    monkeypatch.setattr(table, "_is_broken", lambda _: True)
    assert not table.run(table.Table(tmp_path / "table.json"), *arguments)
    later = table.Table.load(tmp_path / "table.json")
    assert later.begun == two_races[:1]
    assert table.run(later, *arguments), "nothing is left"
    assert later.begun == two_races
    assert {result["race"] for result in later.results} == set(two_races)


def test_a_race_that_ends_the_process_is_noted_and_the_rest_is_run(
    run: Run, two_races: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def module(run: Run, log: str, name: str, *arguments: str) -> tuple[int, str]:
        calls.append(arguments)
        report = table.Table.load(run.logs / "table.json")
        if len(calls) == 1:
            report.begun, report.is_over = two_races[:1], False
            report.save()
            return -11, ""
        table.run(report, ("native",), CPU, 1.0, dry_run=True)
        return 0, ""

    monkeypatch.setattr(Run, "module", module)
    monkeypatch.setattr(stages, "GPU_RACES", table.GPU_RACES)
    found = stages.table(run)
    assert len(calls) == 2
    assert found["errors"] == {two_races[0]: "the process ended"}
    assert found["status"] == FAILED
    assert {result.race for result in run.results} == {two_races[1]}


def test_races_that_no_time_was_left_for_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(run: Run, *_: str) -> tuple[int, str]:
        table.Table(run.logs / "table.json", begun=[races.GPU_RACES[0].race.name]).save()
        return 0, ""

    monkeypatch.setattr(Run, "module", module)
    run.dry_run = False
    run.run("table", stages.table, 100)
    assert run.stages["table"]["status"] == NOT_FINISHED
    assert len(run.stages["table"]["not_run"]) == len(races.GPU_RACES) - 1
    assert f"not run {races.GPU_RACES[-1].race.name}" in summary.summarize(run)[0]


def test_the_table_does_without_the_stream(
    two_races: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setitem(timing.bandwidth.__globals__, "_stream", fail)
    report = table.Table(tmp_path / "table.json")
    assert table.run(report, ("native",), CPU, 1.0, dry_run=True)
    assert report.errors == {"stream bandwidth": "RuntimeError: no compiler"}
    results = [sessions.to_result(values) for values in report.results]
    assert results
    assert all(result.stream_fraction is None and result.copy_fraction > 0 for result in results)


def test_targets_are_within_what_bytes_allow() -> None:
    for gpu_race in races.GPU_RACES:
        case, clip = gpu_race.race.case, gpu_race.race.clip
        for device in (H100, H200):
            race = gpu_race.on(device)
            assert gpu_race.why or not race.target_ratios
            if race.target_copy_fraction is not None:  # memory is the limit of both
                assert race.target_ratios
                for peer, ratio in race.target_ratios.items():
                    if (moved := bytes_moved(case, peer, clip)) is not None:
                        assert ratio <= moved / bytes_moved(case, "ours", clip)
                assert race.target_copy_fraction < 1
        slow, fast = (gpu_race.on(device).target_ratios.get("fused", 0) for device in (H100, H200))
        assert slow <= fast, "where memory is faster, the host is more of the peer's time"
        for other in ("NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", ""):
            race = gpu_race.on(other)
            assert not race.target_ratios
            assert race.target_copy_fraction is None


def test_a_stage_that_failed_is_summarized(run: Run) -> None:
    for name in STAGES:
        run.stages[name] = {"status": FAILED, "ok": False, "error": "ValueError: broken", "seconds": 0.0}
    assert all("ValueError: broken" in line for line in summary.summarize(run))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bandwidth_gives_its_memory_back() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    assert asdict(timing.bandwidth(torch.device("cuda"), 1 << 24, stream=False))["copy"] > 0
    assert torch.cuda.memory_reserved() == before
