"""What several test files share: the backends under test, twins of parameters, comparisons."""

import importlib.util
import mmap
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fused_adamw import FusedHygieneAdamW


@dataclass(frozen=True)
class Target:
    """A backend on a device."""

    backend: str
    device: str

    @property
    def slow(self):
        """Whether every launch takes long: Triton's interpreter."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def bitwise(self):
        """Whether it rounds exactly as a chain of numpy operations: no fused multiply-add, exact sqrt."""
        return self.backend == "native"

    @property
    def bitwise_states(self):
        """As `bitwise`, for the moments: the reference, too, as it is one torch operator per operation."""
        return self.backend in ("native", "reference")

    def adamw(self, params, **options):
        """Our optimizer on this backend."""
        return FusedHygieneAdamW(params, backend=self.backend, **options)


def _targets():
    has_triton = importlib.util.find_spec("fused_adamw.backends.triton") and importlib.util.find_spec(
        "triton"
    )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for backend in ("native", "reference", *(["triton"] if has_triton else [])):
        if backend != "triton" or interpreted:
            yield pytest.param(Target(backend, "cpu"), id=f"{backend}-cpu")
        if backend != "triton" or not interpreted:
            marks = [
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ]
            yield pytest.param(Target(backend, "cuda"), id=f"{backend}-cuda", marks=marks)


TARGETS = list(_targets())
NATIVE = Target("native", "cpu")
F32 = torch.float32


def randn(*shape, seed=0, dtype=F32, device="cpu"):
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def parameters(shapes, seed=0, dtype=F32, device="cpu"):
    """A parameter for each shape."""
    return [
        torch.nn.Parameter(randn(*shape, seed=1000 * seed + i, dtype=dtype, device=device))
        for i, shape in enumerate(shapes)
    ]


def thin_zeros(numel, dtype):
    """Zeros that take memory only where they are written."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has a name for it since 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


def with_gaps(t):
    """A copy of its values with memory of others between them, which kernels leave to the reference."""
    return torch.zeros(*t.shape, 2, dtype=t.dtype, device=t.device)[..., 0].copy_(t.detach())


def twins(params):
    """Copies of parameters: equal values, dtypes and strides, other memory."""
    return [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def give_grads(params, step, dtype=None, scale=1.0):
    """Give every parameter the gradient that belongs to a step: the same for the same shapes."""
    for i, p in enumerate(params):
        p.grad = (scale * randn(*p.shape, seed=7919 * step + i + 1)).to(p.device, dtype or p.dtype)


def array(t):
    """A tensor's values in numpy; bfloat16 and float16 as float32."""
    t = t.detach().cpu()
    return (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).resolve_neg().numpy()


def snapshot(optimizer):
    """Copies of everything that a step may change, to compare with `unchanged_since`."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        (p, p.detach().clone(), {key: value.clone() for key, value in optimizer.state.get(p, {}).items()})
        for p in params
    ]


def unchanged_since(optimizer, before):
    """Whether parameters, moments and step counts are bit for bit as in a snapshot."""
    return all(
        torch.equal(p, value)
        and optimizer.state.get(p, {}).keys() == state.keys()
        and all(torch.equal(optimizer.state[p][key], old) for key, old in state.items())
        for p, value, state in before
    )


def ulp(x, dtype=np.float32):
    """Spacing of the numbers at the largest magnitude of `x`."""
    x = np.abs(np.asarray(x)[np.isfinite(x)])
    return float(np.spacing(dtype(x.max()))) if x.size else 0.0


def assert_same_path(params, peers, steps, grad_error=0.0):
    """Parameters agree with those of a peer after `steps` float32 (or float64) updates.

    Both chains round a parameter twice per step, and may do so in opposite directions: two units in the last
    place per step. `grad_error`, the relative error of what gradients were multiplied by, moves Adam's
    scale-free update far less than its own size; an lr of at most 1e-1 is assumed.
    """
    for p, q in zip(params, peers, strict=True):
        eps = np.finfo(array(q).dtype).eps
        biggest = max(1.0, float(q.detach().abs().max())) if q.numel() else 1.0
        atol = steps * (2 * eps * biggest + 1e-1 * grad_error)
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol, equal_nan=True)


class Pair:
    """Our optimizer beside torch's, to see that a step after a change is right."""

    def __init__(self, target, shapes=((5, 5), (70,), (5, 5)), **options):
        self.params = parameters(shapes, device=target.device)
        self.copies = twins(self.params)
        self.ours = target.adamw(self.params, lr=1e-2, max_grad_norm=1e9, **options)
        self.theirs = torch.optim.AdamW(self.copies, lr=1e-2, foreach=False, **options)
        self.steps = 0

    def both(self):
        """Each optimizer with its parameters: changes are made to both."""
        return (self.ours, self.params), (self.theirs, self.copies)

    def step(self, steps=1, without=()):
        for _ in range(steps):
            for optimizer, params in self.both():
                give_grads(params, self.steps)
                for i in without:
                    params[i].grad = None
                optimizer.step()
            self.steps += 1
        assert_same_path(self.params, self.copies, self.steps, grad_error=1e-6)
