"""Optimizers that live on the CPU: a step writes to the memory that it finds, and replaces nothing."""

import pytest
import torch
from torch import nn

from fused_adamw import FusedHygieneAdamW

BF16 = torch.bfloat16


def masters(grad_dtype, pin=lambda t: t):
    """Parameters and gradients of an optimizer whose model is elsewhere."""
    params = []
    for shape in ((30, 40), (50,), ()):
        p = nn.Parameter(pin(torch.randn(shape)))
        p.grad_dtype = grad_dtype
        p.grad = pin(torch.randn(shape).to(grad_dtype))
        params.append(p)
    return params


def memory(optimizer):
    """Every tensor of an optimizer, by its object, and where its memory is."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*params, *(p.grad for p in params), *(t for p in params for t in optimizer.state[p].values())]
    return [(id(t), t.data_ptr(), t.untyped_storage().data_ptr()) for t in tensors]


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16])
def test_a_step_stays_in_the_memory_that_it_finds(grad_dtype, max_grad_norm, backend):
    optimizer = FusedHygieneAdamW(masters(grad_dtype), max_grad_norm=max_grad_norm, backend=backend)
    optimizer.step()
    params = optimizer.param_groups[0]["params"]
    before, values = memory(optimizer), [p.detach().clone() for p in params]
    grads = [p.grad.clone() for p in params]
    for _ in range(3):
        optimizer.step()
    assert memory(optimizer) == before
    assert not any(torch.equal(p, value) for p, value in zip(params, values, strict=True))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grad_dtype", [torch.float32, BF16])
def test_pinned_memory_stays_pinned(grad_dtype):
    """Pinning takes a GPU, or one that is pretended."""
    params = masters(grad_dtype, pin=lambda t: t.pin_memory())
    optimizer = FusedHygieneAdamW(params, max_grad_norm=1.0, backend="native")
    optimizer.step()
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].pin_memory()
    before = memory(optimizer)
    for _ in range(3):
        optimizer.step()
    assert memory(optimizer) == before
    assert all(p.is_pinned() and p.grad.is_pinned() for p in params)
    states = optimizer.state.values()
    assert all(state["exp_avg"].is_pinned() and state["exp_avg_sq"].is_pinned() for state in states)
    assert not optimizer._plan.fallbacks
