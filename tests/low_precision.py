"""What tests of masters, codes and stochastic rounding share."""

import pytest
import torch
from common import parameters, randn

from fused_adamw.formats import FORMATS, Field

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((40, 130), (7,), (32, 3, 7, 7), (5, 5), ())
SPLIT = FORMATS["bfloat16_split"]
SCHEMES = {
    "split": {"master_weights": "split", "state_dtype": F32},
    "split-bfloat16": {"master_weights": "split", "state_dtype": BF16},
    "split-8bit": {"master_weights": "split", "state_dtype": "8bit"},
    "stochastic": {"stochastic_rounding": True},
    "stochastic-8bit": {"stochastic_rounding": True, "state_dtype": "8bit"},
}
schemes = pytest.mark.parametrize("options", SCHEMES.values(), ids=SCHEMES)
CODES = ("exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale")


def model(target, params_seed=0, **options):
    """Parameters, and an optimizer of them."""
    params = parameters(SHAPES, seed=params_seed, dtype=BF16, device=target.device)
    return params, target.adamw(params, lr=1e-2, max_grad_norm=1.0, **options)


def masters_of(params):
    """float32 parameters of the same values.

    On a GPU with the same bfloat16 gradients: the order in which its norm adds, and so the last bits of what
    clips, follows their dtype.
    """
    masters = [torch.nn.Parameter(p.detach().float()) for p in params]
    for master in masters:
        if master.is_cuda:
            master.grad_dtype = BF16
    return masters


def run(params, optimizer, steps, first=0):
    for step in range(first, first + steps):
        give_rounded_grads(params, step)
        optimizer.step()


def give_rounded_grads(params, step):
    """Gradients whose values are the same in float32 as in bfloat16."""
    for i, p in enumerate(params):
        dtype = getattr(p, "grad_dtype", None) or p.dtype  # torch knows it since 2.10
        p.grad = randn(*p.shape, seed=7919 * step + i + 1, dtype=BF16).to(p.device, dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


def assert_same_state(a, b):
    """Whether two optimizers hold the same, bit for bit."""
    for p, q in zip(*([p for g in o.param_groups for p in g["params"]] for o in (a, b)), strict=True):
        assert same_bits(p.detach(), q.detach())
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            assert same_bits(value, b.state[q][key]), key


def assert_in_kernels(target, optimizer):
    """Kernels step all parameters, or none does: the reference rounds otherwise than they do."""
    fallbacks = optimizer._plan.fallbacks
    if fallbacks and target.backend == "triton":
        pytest.skip(f"Triton: {fallbacks[0]}")
    assert not fallbacks


def assert_masters(params, optimizer, expected):
    """Parameters and residuals are the two halves of float32 parameters."""
    for p, q in zip(params, expected, strict=True):
        master = Field(SPLIT, p.detach(), optimizer.state[p]["master_residual"])
        assert same_bits(master.load(), q.detach())
        assert same_bits(p.detach(), SPLIT.store(q.detach(), None, p)[0])
