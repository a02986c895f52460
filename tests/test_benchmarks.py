"""The benchmarks' machinery: cases, formulas, the check of equal results, provenance, files. No timings."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import compare, gpu_acceptance, host, provenance
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
from benchmarks.measure import Bandwidth, Heat, block_medians, threads
from benchmarks.peers import PASSES, PEERS, Problem, line_up
from benchmarks.results import CASE_KEYS, evaluate, from_json, to_json
from fused_adamw import FusedHygieneAdamW

CPU = torch.device("cpu")
FEW = Case("few", ((3, 5), (7,), (4, 2, 3), (1,)), group_of=(0, 1, 0, 1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Nothing here is large: a second thread only waits."""
    with threads(1):
        yield


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


def test_a_heat_times_all_in_turn() -> None:
    calls: list[str] = []
    heat = Heat({name: lambda name=name: calls.append(name) for name in "ab"}, CPU)  # type: ignore[misc]
    assert heat.rounds_in(0.0, least=4, most=9) == 6  # three blocks of the same size
    calls.clear()
    heat.run(3)
    assert calls == ["a", "a", "b", "b"] * 3  # each after an untimed step
    assert all(len(times) == 3 for times in heat.seconds.values())


def test_medians_by_thirds() -> None:
    assert block_medians([1, 2, 9, 4, 4, 5, 6, 6, 7]) == [2, 4, 6]
    assert block_medians([3, 1]) == [2, 2, 2]


def _evaluated(ours: list[float], **more: object) -> list:  # type: ignore[type-arg]
    race = Race(FEW, 1, wanted={"fused": 2.0}, **more)  # type: ignore[arg-type]
    seconds = {"ours": ours, "fused": [2.0, 3.0, 4.0], "for-loop": [5.0, 5.0, 5.0]}
    return evaluate(race, seconds, Bandwidth(copy=4000.0, stream=8000.0), best=True)


def test_the_best_of_three_runs_is_reported() -> None:
    fused, loop = _evaluated([1.0, 1.0, 1.0])
    assert fused.name == "few/clip+step/1t/vs-fused"
    assert (fused.ratio, fused.ours_ms, fused.peer_ms) == (4.0, 1000.0, 4000.0)
    assert fused.detail["ratios"] == [2.0, 3.0, 4.0]
    assert fused.bytes == 32 * FEW.numel
    assert fused.copy_fraction == fused.bytes / 4000.0
    assert fused.reached is True
    assert (loop.ratio, loop.reached) == (5.0, None)


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


def test_compare_tells_a_change_from_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whence = provenance.provenance(CPU)
    noisy, steady, faster = ([1.0, 1.5, 1.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5])
    for name, ours in (("noisy", noisy), ("steady", steady), ("faster", faster)):
        (tmp_path / name).write_text(json.dumps(to_json(_evaluated(ours), whence)))
    a, b, c = (from_json(json.loads((tmp_path / name).read_text())) for name in ("noisy", "steady", "faster"))
    assert [beyond for *_, beyond in compare.compare(a, b)] == [False, False]
    assert [(speedup, beyond) for _, _, speedup, beyond in compare.compare(b, c)] == [(2.0, True)] * 2
    assert compare.main([str(tmp_path / "steady"), str(tmp_path / "faster")]) == 0
    assert "2.00" in capsys.readouterr().out


def test_parts_of_a_step_are_what_a_step_finds_unchanged() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(3)
    parts = host.parts(FusedHygieneAdamW(params, max_grad_norm=1.0))
    look = parts["look at state, parameters, gradients"]
    assert list(array("q", look().addresses)) == [p.grad.data_ptr() for p in params]
    for part in parts.values():
        part()
    params[0].data = torch.ones(4)
    assert look() is None


def test_host_profile_has_a_line_for_each_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "ROUNDS", 2)
    host.main(["--tensors", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("look at state")
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
