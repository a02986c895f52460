"""The acceptance run on a GPU, as far as a CPU can dry-run it, and what one failure leaves of the rest."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import gpu_acceptance, provenance
from benchmarks.cases import GPU_RACES, RESNET50
from benchmarks.results import CASE_KEYS
from fused_adamw import FusedHygieneAdamW

CPU = torch.device("cpu")
# The peers clip the gradients that ours steps too.
pytestmark = pytest.mark.filterwarnings("ignore:for . steps the gradient norm was max_grad_norm")


@pytest.fixture(autouse=True)
def _one_thread(threads: Callable[[int], None]) -> None:
    """Nothing here is large: a second thread only waits."""
    threads(1)


def test_acceptance_refuses_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_acceptance.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_acceptance_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_acceptance, "GPU_RACES", [race for race in GPU_RACES if race.case is RESNET50])
    stages = ["--stages", "launches", "table", "ncu"]
    assert gpu_acceptance.main(["--out", str(tmp_path), "--dry-run", "--commit", "abc", *stages]) == 0
    payload = json.loads((tmp_path / "acceptance.json").read_text())
    assert payload["source_sha256"] == provenance.source_sha256()
    assert payload["dry_run"] is True
    assert {"device", "driver", "torch", "triton", "commit", "date"} <= set(payload)
    assert payload["cases"]
    for case in payload["cases"]:
        assert (
            tuple(case)
            == CASE_KEYS
            == (
                *("name", "ratio", "wanted_ratio", "copy_fraction", "wanted_copy_fraction"),
                *("ours_ms", "peer_ms", "bytes"),
            )
        )
    assert list(payload["stages"]) == ["launches", "table", "ncu"]
    assert (tmp_path / "ratios.png").exists()
    assert (tmp_path / "roofline.png").exists()
    assert capsys.readouterr().out.rstrip().endswith("acceptance.json")


def test_a_failing_stage_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: gpu_acceptance.Acceptance) -> dict[str, object]:
        raise ValueError("broken")

    monkeypatch.setitem(gpu_acceptance._STAGE_FUNCTIONS, "launches", fail)
    assert gpu_acceptance.main(["--out", str(tmp_path), "--dry-run", "--stages", "launches", "ncu"]) == 1
    stages = json.loads((tmp_path / "acceptance.json").read_text())["stages"]
    assert stages["launches"]["error"] == "ValueError: broken"
    assert stages["ncu"]["ok"]


def _acceptance(tmp_path: Path) -> gpu_acceptance.Acceptance:
    return gpu_acceptance.Acceptance(tmp_path, CPU, commit=None, dry_run=True)


def _two_races(monkeypatch: pytest.MonkeyPatch) -> None:
    races = [race for race in GPU_RACES if race.case is RESNET50 and not race.moved_grads]
    monkeypatch.setattr(gpu_acceptance, "GPU_RACES", races)


def test_a_backend_alone_is_raced_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the other does not build or is not installed."""
    _two_races(monkeypatch)
    monkeypatch.setattr(gpu_acceptance.Acceptance, "backends", ("native",))
    run = _acceptance(tmp_path)
    for stage in (gpu_acceptance.launches, gpu_acceptance.table):
        found = stage(run)
        assert (found["ok"], found["errors"]) == (True, {})
    assert {(r.detail["backend"], r.detail["peer"]) for r in run.results} == {
        ("native", "fused"),
        ("native", "trick"),
    }


@pytest.mark.parametrize("broken", ["native", "reference"])
def test_a_broken_backend_leaves_the_other(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FusedHygieneAdamW.step

    def fail(optimizer: FusedHygieneAdamW) -> None:
        if optimizer.backend == broken:
            raise RuntimeError("no launch")
        step(optimizer)

    monkeypatch.setattr(FusedHygieneAdamW, "step", fail)
    _two_races(monkeypatch)
    run = _acceptance(tmp_path)
    (other,) = {"native", "reference"} - {broken}

    found = gpu_acceptance.launches(run)
    assert not found["ok"]
    assert {row["backend"] for row in found["rows"]} == {other}
    assert set(found["errors"].values()) == {"RuntimeError: no launch"}
    assert all(f"/{broken}/" in name for name in found["errors"])

    found = gpu_acceptance.table(run)
    assert not found["ok"]
    assert {result.detail["backend"] for result in run.results} == {other}
    assert found["errors"] == {
        f"resnet50/{race}/{broken}": "RuntimeError: no launch" for race in ("clip+step", "step")
    }


def test_acceptance_compiles_triton_for_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise conftest.py has it interpreted, and leaves its tests on a GPU out."""
    given, left = [], []

    def command(_: object, log: str, *words: str, **environment: str) -> tuple[int, str]:
        given.append((log, words, environment))
        left.append(run.left)
        return int(log == "tests-large"), f"end of {log}"

    monkeypatch.setattr(gpu_acceptance.Acceptance, "command", command)
    run = _acceptance(tmp_path)
    run.run("tests", gpu_acceptance.gpu_tests, 100)
    assert left[0] < left[1] - 30, "time is kept for the large ones"
    assert [environment for _, _, environment in given] == [{"TRITON_INTERPRET": "0"}] * 2
    assert not run.stages["tests"]["ok"]
    assert run.stages["tests"]["large"]["exit_code"] == 1
    assert "end of tests; large: end of tests-large" in gpu_acceptance.summarize(run)[0]


@pytest.mark.parametrize(("skipped", "ok"), [(2, True), (3, False)])
def test_tests_that_are_all_skipped_show_nothing(
    skipped: int, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(run: gpu_acceptance.Acceptance, log: str, *_: str, **__: str) -> tuple[int, str]:
        (run.out / f"{log}.xml").write_text(
            f'<testsuite tests="3" failures="0" errors="0" skipped="{skipped}"/>'
        )
        return 0, "passed"

    monkeypatch.setattr(gpu_acceptance.Acceptance, "command", command)
    run = replace(_acceptance(tmp_path), dry_run=False)
    assert gpu_acceptance.gpu_tests(run)["ok"] is ok


def test_a_command_that_takes_too_long_may_say_what_it_has(tmp_path: Path) -> None:
    slow = """if True:
        import time
        try:
            print("began", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("so far")
    """
    run = _acceptance(tmp_path)
    run.deadline = time.monotonic() + 2
    code, output = run.command("slow", sys.executable, "-c", slow)
    assert code is None
    assert output.split("\n")[:2] == ["began", "so far"]


def test_a_build_without_cuda_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance.Acceptance, "command", lambda *_, **__: (0, ""))
    monkeypatch.setattr(gpu_acceptance, "why_not", lambda backend, device: "built without CUDA")
    run = _acceptance(tmp_path)
    run.run("build", gpu_acceptance.build, 1)
    assert not run.stages["build"]["ok"]
    assert "native built without CUDA" in gpu_acceptance.summarize(run)[0]


def test_a_stage_that_failed_is_summarized(tmp_path: Path) -> None:
    run = _acceptance(tmp_path)
    for name in gpu_acceptance.STAGES:
        run.stages[name] = {"ok": False, "error": "ValueError: broken", "seconds": 0.0}
    assert all("ValueError: broken" in line for line in gpu_acceptance.summarize(run))
