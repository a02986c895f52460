"""That all peers compute the same is checked before anything is timed, and what differs is noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks.cases import (
    LOW_PRECISION,
    OTHER_GRADS,
    RESNET50_CHANNELS_LAST,
    SMALL_COMPLEX,
    WITH_BESIDES,
    Case,
)
from benchmarks.equality import check_equal_results
from benchmarks.peers import PEERS, Peer, float32_and_copy, fused, fused_wrong, make_peers, ours
from benchmarks.problem import Problem

from .helpers import CPU, FEW


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
