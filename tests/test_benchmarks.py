"""The benchmarks' machinery: cases, formulas, the check of equal results, provenance, files. No timings."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import host, peers, provenance
from benchmarks.cases import (
    CASES,
    CPU_RACES,
    GPT2,
    GPT2_XL,
    GPT2_XL_BF16,
    LOW_PRECISION,
    OFFLOADED,
    OTHER_GRADS,
    RESNET50,
    RESNET50_CHANNELS_LAST,
    SMALL_COMPLEX,
    SMALL_IN_GROUPS,
    TRAIN_GPT,
    TRAIN_MANY,
    TRAIN_RESNET,
    VIT_B,
    WITH_BESIDES,
    Case,
    Gradients,
)
from benchmarks.equality import check_equal_results
from benchmarks.gpu.races import GPU_RACES
from benchmarks.peers import (
    PASSES,
    PEERS,
    Peer,
    bytes_moved,
    float32_and_copy,
    fused,
    fused_wrong,
    make_peers,
    ours,
)
from benchmarks.problem import Problem
from benchmarks.report import sessions
from benchmarks.timing import InterleavedTimer, Turn, block_medians, interleaved

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
    for races in (CPU_RACES, tuple(gpu_race.race for gpu_race in GPU_RACES)):
        assert len({race.name for race in races}) == len(races)
        changes = sum(a.case is not b.case for a, b in itertools.pairwise(races))
        assert changes + 1 == len({race.case.name for race in races})


@pytest.mark.parametrize(
    ("peer", "clip", "fp32", "bf16"),
    [
        ("ours", True, 32, 16),
        ("ours", False, 28, 14),
        ("fused+grad_scale", True, 36, 18),
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
    check_equal_results(problem, list(make_peers(problem, names, clip=clip)))


@pytest.mark.parametrize("clip", [True, False])
def test_all_peers_take_gradients_of_another_dtype(clip: bool) -> None:
    problem = Problem(replace(FEW, grad_dtype=torch.bfloat16), CPU)
    names = tuple(name for name in PEERS if name != "compiled")
    all_peers = list(make_peers(problem, names, clip=clip))
    check_equal_results(problem, all_peers)
    assert [p.grad.dtype for p in problem.params] == [torch.bfloat16] * len(problem.params)
    for grad in problem.gradients:
        grad.neg_()  # a peer that does not copy them anew steps the old ones
    check_equal_results(problem, all_peers)


@pytest.mark.parametrize("case", OTHER_GRADS, ids=lambda case: case.name)
def test_gradients_of_another_layout(case: Case) -> None:
    problem = Problem(case.tiny(), CPU)
    check_equal_results(problem, list(make_peers(problem, ("fused", "one-thread"), clip=True)))
    assert any(p.grad is not None and p.grad.stride() != p.stride() for p in problem.params)


def test_only_what_misreads_gradients_is_not_compared() -> None:
    problem = Problem(RESNET50_CHANNELS_LAST.tiny(), CPU)
    right, wrong = fused(problem, clip=True), fused_wrong(problem, clip=True)
    check_equal_results(problem, [right, wrong])
    with pytest.raises(AssertionError, match="fused-wrong and fused differ"):
        check_equal_results(problem, [right, replace(wrong, is_wrong=False)])


def test_imaginary_parts_are_compared() -> None:
    problem = Problem(SMALL_COMPLEX.tiny(), CPU)
    ours, *others = make_peers(problem, ("foreach", "for-loop"), clip=True)
    check_equal_results(problem, [ours, *others])

    def spoil() -> None:
        ours.step()
        problem.params[3].detach().imag.view(-1)[5] += 1e-3

    with pytest.raises(AssertionError, match="param of tensor 3"):
        check_equal_results(problem, [replace(ours, step=spoil), *others])


def test_bytes_of_complex_numbers_and_of_copies_into_another_layout() -> None:
    shapes = ((8, 4, 3, 3), (16, 4, 1, 1), (5,))
    case = Case("mixed", shapes, layout="channels-last")  # which is no other layout for a 1 x 1 kernel
    assert bytes_moved(case, "ours", clip=True) == 32 * case.numel + 8 * 288
    assert bytes_moved(case, "fused", clip=False) == 28 * case.numel + 8 * 288
    assert bytes_moved(case, "fused-wrong", clip=True) == 40 * case.numel
    (expanded,) = (case for case in OTHER_GRADS if case.grad_layout == "expanded")
    assert bytes_moved(expanded, "ours", clip=True) == 36 * expanded.numel
    assert bytes_moved(SMALL_COMPLEX, "ours", clip=True) == 64 * SMALL_COMPLEX.numel


def test_bytes_of_gradients_of_another_dtype() -> None:
    expected = {"ours": (28, 26), "fused": (46, 34), "deepspeed": (46, 34), "for-loop": (None, None)}
    for name, (with_clip, without) in expected.items():
        for clip, per_value in ((True, with_clip), (False, without)):
            found = bytes_moved(OFFLOADED, name, clip)
            assert found == (None if per_value is None else per_value * OFFLOADED.numel), name


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


@pytest.mark.parametrize(
    ("name", "kept", "moved"),
    [
        ("split-fp32", 12, 28),
        ("split-bf16", 8, 20),
        ("split-8bit", 6.0625, 16.125),
        ("stochastic-bf16", 6, 16),
        ("stochastic-8bit", 4.0625, 12.125),
    ],
)
def test_bytes_in_low_precision(name: str, kept: float, moved: float) -> None:
    """Those that are allocated, and those that a step with a clip reads and writes."""
    case = CASES[f"50m-{name}"].tiny()
    assert bytes_moved(case, "ours", clip=True) == moved * case.numel
    assert bytes_moved(case, "ours", clip=False) == (moved - 2) * case.numel
    problem = Problem(case, CPU)
    ours = next(make_peers(problem, (), clip=True))
    ours.step()
    (p,) = problem.params
    tensors = [p, *(t for key, t in ours.optimizer.state[p].items() if key != "step")]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == kept * case.numel


@pytest.mark.parametrize("case", LOW_PRECISION, ids=lambda case: case.name)
@pytest.mark.parametrize("clip", [True, False])
def test_low_precision_is_close_to_float32(case: Case, clip: bool) -> None:
    problem = Problem(case.tiny(), CPU)
    all_peers = [ours(problem, clip=clip), fused(problem, clip=clip), float32_and_copy(problem, clip=clip)]
    check_equal_results(problem, all_peers)
    all_peers[0].optimizer.param_groups[0]["lr"] *= 1.1
    with pytest.raises(AssertionError, match="ours and float32 differ after 3 steps: updates by"):
        check_equal_results(problem, all_peers)


@pytest.mark.parametrize("case", WITH_BESIDES, ids=lambda case: case.name)
def test_what_is_done_besides_changes_nothing_else(case: Case) -> None:
    problem = Problem(case.tiny(), CPU)
    all_peers = list(make_peers(problem, ("foreach", "one-thread"), clip=True))
    names = {peer.name for peer in all_peers}
    assert {"ours", "plain", "fused", "one-thread"} <= names
    assert ("fused+average" in names) == ("plain+average" in names) == case.name.endswith("-ema")
    assert "foreach" not in names
    asked = {"stats": "stats", "guard": "guard", "ema": "ema"}[case.name.rpartition("-")[2]]
    has = {peer.name: bool(getattr(peer.optimizer, asked, None)) for peer in all_peers}
    assert has == {name: name in ("ours", "one-thread") for name in names}
    check_equal_results(problem, all_peers)


def test_averages_are_compared() -> None:
    problem = Problem(WITH_BESIDES[-1].tiny(), CPU)
    for peer in (p for p in make_peers(problem, (), clip=True) if p.averages is not None):
        reference = fused(problem, clip=True)
        check_equal_results(problem, [peer, reference])

        def spoil(peer: Peer = peer) -> None:
            peer.step()
            peer.averages()[0].view(-1)[3] *= 1.001

        with pytest.raises(AssertionError, match=r"differ after 3 steps: average of tensor 0 by"):
            check_equal_results(problem, [replace(peer, step=spoil), reference])


def test_bytes_of_averages() -> None:
    """Read and written in the step; after it, the parameter is read once more."""
    *others, ema = WITH_BESIDES
    assert all(bytes_moved(case, "ours", clip=True) == 32 * case.numel for case in others)
    expected = {"ours": 40, "plain": 32, "plain+average": 44, "fused": 40, "fused+average": 52}
    assert {name: bytes_moved(ema, name, clip=True) / ema.numel for name in expected} == expected


def test_peers_in_low_precision_are_those_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(LOW_PRECISION[0].tiny(), CPU)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    names = [peer.name for peer in make_peers(problem, ("foreach", "one-thread"), clip=True)]
    assert names == ["ours", "plain", "fused", "float32+copy", "one-thread"]


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 2e-3), ("betas", (0.9, 0.951)), ("weight_decay", 0.0), ("eps", 1e-3)]
)
def test_another_optimizer_is_noticed(key: str, value: object) -> None:
    problem = Problem(FEW, CPU)
    ours, fused = make_peers(problem, ("fused",), clip=True)
    ours.optimizer.param_groups[0][key] = value
    with pytest.raises(AssertionError, match="ours and fused differ"):
        check_equal_results(problem, [ours, fused])


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_another_clip_is_noticed(max_grad_norm: float | None) -> None:
    problem = Problem(FEW, CPU)
    ours, fused = make_peers(problem, ("fused",), clip=True)
    ours.optimizer.max_grad_norm = max_grad_norm  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="ours and fused differ"):
        check_equal_results(problem, [ours, fused])


def test_nan_is_noticed() -> None:
    problem = Problem(FEW, CPU)
    ours, fused = make_peers(problem, ("fused",), clip=False)

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


@pytest.mark.parametrize("case", [TRAIN_MANY, TRAIN_RESNET, TRAIN_GPT], ids=lambda case: case.name)
def test_a_training_loop_makes_new_gradients_that_a_step_can_take(case: Case) -> None:
    problem = Problem(case.tiny(), CPU)
    assert [tuple(p.shape) for p in problem.params] == list(problem.case.shapes)
    (peer,) = make_peers(problem, (), clip=True)
    problem.backward()
    first = [p.grad for p in problem.params]
    for _ in range(20):
        problem.backward()
        peer.step()
    for p, old in zip(problem.params, first, strict=True):
        assert p.grad is not None
        assert p.grad is not old
        assert p.grad.isfinite().all()
    norm = torch.stack([p.grad.norm() for p in problem.params if p.grad is not None]).norm()
    assert 1e-4 < norm < 1e3
    check_equal_results(problem, list(make_peers(problem, ("fused",), clip=True)))


def test_training_loops_are_the_models_they_are_named_after() -> None:
    assert len(TRAIN_MANY.shapes) == 500
    assert max(prod(shape) for shape in TRAIN_MANY.shapes) <= 1024
    assert len(TRAIN_RESNET.shapes) == len(RESNET50.shapes)
    for case in (TRAIN_MANY, TRAIN_RESNET, TRAIN_GPT):
        races = [race for race in CPU_RACES if race.case is case]
        assert {race.threads for race in races} == {1, 2}
        assert all(race.gradients == "new" for race in races)


@pytest.mark.parametrize("gradients", ["kept", "moved", "new"])
def test_before_a_step_gradients_are_what_the_race_says(gradients: Gradients) -> None:
    problem = Problem(TRAIN_GPT.tiny(), CPU)
    before = problem.before_step(gradients) or (lambda: None)
    before()
    old = [p.grad for p in problem.params]
    before()
    same = [p.grad is grad for p, grad in zip(problem.params, old, strict=True)]
    assert all(same) if gradients == "kept" else not any(same)


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


def test_provenance_says_where_a_result_comes_from() -> None:
    whence = provenance.provenance(CPU, commit="given")
    keys = ("device", "driver", "torch", "triton", "commit", "dirty", "date", "source_sha256", "build")
    assert set(keys) <= set(whence)
    assert whence["sources"] == list(provenance.SOURCES)
    assert whence["torch"] == torch.__version__
    assert len(whence["source_sha256"]) == 64
    assert whence["commit"]


@pytest.mark.parametrize("source", provenance.SOURCES)
def test_sources_are_where_provenance_says(source: str) -> None:
    """A file that moved would no longer be covered, and nothing else would tell."""
    assert (provenance.ROOT / source).exists()


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
    for part in ("backends", "tables", "plan"):
        assert any(part in name for name in walked)
    (tree / "csrc" / "adamw.h").write_text("// changed\n")
    assert provenance.source_sha256(tree) != digest
