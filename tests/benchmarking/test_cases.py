"""What is benchmarked: the tensors of the models, races, and how many bytes a step moves."""

from __future__ import annotations

import itertools
from math import prod

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks.cases import (
    CASES,
    CPU_RACES,
    GPT2,
    GPT2_XL,
    GPT2_XL_BF16,
    OFFLOADED,
    OTHER_GRADS,
    RESNET50,
    SMALL_COMPLEX,
    SMALL_IN_GROUPS,
    TRAIN_GPT,
    TRAIN_MANY,
    TRAIN_RESNET,
    VIT_B,
    WITH_BESIDES,
    Case,
)
from benchmarks.gpu.races import GPU_RACES
from benchmarks.peers import PASSES, bytes_moved, make_peers
from benchmarks.problem import Problem

from .helpers import CPU


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


def test_bytes_of_averages() -> None:
    """Read and written in the step; after it, the parameter is read once more."""
    *others, ema = WITH_BESIDES
    assert all(bytes_moved(case, "ours", clip=True) == 32 * case.numel for case in others)
    expected = {"ours": 40, "plain": 32, "plain+average": 44, "fused": 40, "fused+average": 52}
    assert {name: bytes_moved(ema, name, clip=True) / ema.numel for name in expected} == expected


def test_training_loops_are_the_models_they_are_named_after() -> None:
    assert len(TRAIN_MANY.shapes) == 500
    assert max(prod(shape) for shape in TRAIN_MANY.shapes) <= 1024
    assert len(TRAIN_RESNET.shapes) == len(RESNET50.shapes)
    for case in (TRAIN_MANY, TRAIN_RESNET, TRAIN_GPT):
        races = [race for race in CPU_RACES if race.case is case]
        assert {race.threads for race in races} == {1, 2}
        assert all(race.gradients == "new" for race in races)
