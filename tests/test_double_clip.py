"""The warning that gradients come clipped already: once, on the CPU, and only where it is so."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from common import give_grads, parameters

from fused_adamw import FusedHygieneAdamW

STEPS = 8


def warnings_of(optimizer, norms, clip=None):
    """How many warnings of a second clip come of steps whose gradients have these norms, before that clip."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, norm in enumerate(norms):
            give_grads(params, step)
            grads = [p.grad for p in params]
            scale = norm / torch.nn.utils.get_total_norm(grads)
            for p in params:
                p.grad = p.grad * scale
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
    return sum("probably clipped before step() too" in str(warning.message) for warning in caught)


def optimizer_of(dtype=torch.float32, **options):
    return FusedHygieneAdamW(parameters([(30, 40), (50,)], dtype=dtype), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_warns_once(dtype, backend):
    optimizer = optimizer_of(dtype, max_grad_norm=0.5, backend=backend)
    norms = [1.0 + step for step in range(STEPS)]
    assert warnings_of(optimizer, norms[:-1], clip=0.5) == 0
    assert warnings_of(optimizer, norms[-1:], clip=0.5) == 1
    assert warnings_of(optimizer, norms, clip=0.5) == 0
    assert warnings_of(optimizer, [0.1, *norms], clip=0.5) == 0


@pytest.mark.parametrize(
    "norms",
    [
        [0.5] * 3 * STEPS,  # clipped by nobody
        [2.0] * 3 * STEPS,
        ([1.0] * (STEPS - 1) + [0.9]) * 3,  # not in a row
        [1.0005 - 0.00005 * step for step in range(20)],  # drifts past the threshold
        [math.inf] * 2 * STEPS,
        [math.nan] * 2 * STEPS,
    ],
    ids=["below", "above", "interrupted", "drifting", "inf", "nan"],
)
@pytest.mark.parametrize("max_norm", [1.0, math.inf, None])
def test_does_not_warn(norms, max_norm):
    assert warnings_of(optimizer_of(max_grad_norm=max_norm, skip_nonfinite=True), norms) == 0


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_a_copy_counts_for_itself(clone):
    optimizer = optimizer_of(max_grad_norm=1.0)
    assert warnings_of(optimizer, [1.0] * (STEPS - 1)) == 0
    assert warnings_of(clone(optimizer), [1.0] * STEPS) == 1
    assert warnings_of(optimizer, [1.0]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_is_read_from_a_gpu():
    params = parameters([(30, 40)], device="cuda")
    optimizer = FusedHygieneAdamW(params, max_grad_norm=1.0)
    give_grads(params, 0)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2 * STEPS):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
