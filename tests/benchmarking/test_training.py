"""Training loops, and the gradients that a step finds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks.cases import TRAIN_GPT, TRAIN_MANY, TRAIN_RESNET, Case, Gradients
from benchmarks.equality import check_equal_results
from benchmarks.peers import make_peers
from benchmarks.problem import Problem

from .helpers import CPU, FEW


def test_moved_gradients_are_elsewhere_and_equal() -> None:
    problem = Problem(FEW, CPU)
    before = [p.grad for p in problem.params]
    problem.move_gradients()
    for p, grad in zip(problem.params, before, strict=True):
        assert p.grad is not None
        assert grad is not None
        assert p.grad.data_ptr() != grad.data_ptr()
        assert torch.equal(p.grad, grad)


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


@pytest.mark.parametrize("gradients", ["kept", "moved", "new"])
def test_before_a_step_gradients_are_what_the_race_says(gradients: Gradients) -> None:
    problem = Problem(TRAIN_GPT.tiny(), CPU)
    before = problem.before_step(gradients) or (lambda: None)
    before()
    old = [p.grad for p in problem.params]
    before()
    same = [p.grad is grad for p, grad in zip(problem.params, old, strict=True)]
    assert all(same) if gradients == "kept" else not any(same)
