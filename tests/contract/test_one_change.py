"""One property of one tensor changes between two steps: stepped as by torch, or refused and untouched."""

import itertools

import pytest
import torch
from common import give_grads, parameters, randn
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor


class Subclass(torch.Tensor):
    """Neither stores nor does anything of its own."""


def moved(t):
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].view(t.shape).copy_(t)


def strided(t):
    return torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0].copy_(t)


def transposed(t):
    return torch.zeros(t.shape[::-1], dtype=t.dtype).permute(*range(t.dim())[::-1]).copy_(t)


def born_in_inference_mode(t):
    """At the same address."""
    with torch.inference_mode():
        return torch.from_numpy(t.detach().numpy())


def without_memory(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


# What becomes of a tensor; each but for the property that it names is as before.
CHANGES = {
    "elsewhere": torch.clone,
    "misaligned": moved,
    "strided": strided,
    "transposed": transposed,
    "expanded": lambda t: t.flatten()[:1].expand(t.numel()).view(t.shape) if t.dim() else t.expand(2)[:1][0],
    "another shape": lambda t: t.reshape(-1, 1),
    "conjugated": lambda t: t.conj(),
    "negated": torch._neg_view,
    "in inference mode": born_in_inference_mode,
    "float64": lambda t: t.to(torch.complex128 if t.is_complex() else torch.float64),
    "bfloat16": lambda t: t if t.is_complex() else t.to(torch.bfloat16),
    "int64": lambda t: t.to(torch.int64),
    "requiring a gradient": lambda t: t.detach().clone().requires_grad_(),
    "of a subclass": lambda t: t.clone().as_subclass(Subclass),
    "a parameter": lambda t: nn.Parameter(t.clone(), requires_grad=False),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "without memory": without_memory,
    "sparse": lambda t: t.to_sparse(),
    "on another device": lambda t: t.to("meta"),
}
# torch reads memory that is not there.
CRASHES_TORCH = ("without memory", "sparse", "on another device")
# Where kernels would write what torch does not see, or what is not there.
REFUSED = (
    *itertools.product(("parameter", "exp_avg", "exp_avg_sq", "step"), CRASHES_TORCH),
    *itertools.product(("parameter", "exp_avg", "exp_avg_sq"), ("expanded", "in inference mode")),
    *itertools.product(("exp_avg", "exp_avg_sq"), ("int64", "another shape")),
    *itertools.product(("gradient",), CRASHES_TORCH),
)


class Run:
    """Two parameters after two steps, of which the second is changed before the third."""

    def __init__(self, make, dtype):
        self.params = parameters([(5,), (3, 4)])
        if dtype.is_complex:
            self.params[1] = nn.Parameter(torch.complex(randn(3, 4, seed=8), randn(3, 4, seed=9)))
        self.optimizer = make(self.params)
        for step in range(3):
            give_grads(self.params[:1], step)
            real = randn(3, 4, seed=step)
            self.params[1].grad = (
                torch.complex(real, randn(3, 4, seed=9 + step)) if dtype.is_complex else real
            )
            if step < 2:
                self.optimizer.step()

    def change(self, what, how, in_place):
        p = self.params[1]
        state = self.optimizer.state[p]
        old = {"parameter": p.data, "gradient": p.grad}.get(what, state.get(what))
        new = how(old)
        if what == "parameter":
            p.data = new
        elif in_place:
            old.data = new
        elif what == "gradient":
            p.grad = new
        else:
            state[what] = new

    def step(self):
        try:
            self.optimizer.step()
        except (RuntimeError, NotImplementedError) as error:
            return error
        return None

    def values(self):
        """Copies of all that a step changes; None for what cannot be read."""
        tensors = [t for p in self.params for t in (p, *self.optimizer.state[p].values())]
        return [self._value(t.detach()) for t in tensors]

    @staticmethod
    def _value(t):
        if t.layout is not torch.strided:
            return t.to_dense()
        if t.device.type == "meta" or (t.untyped_storage().nbytes() == 0 and not t._is_zerotensor()):
            return None
        return t.as_subclass(torch.Tensor).resolve_conj().resolve_neg().clone()


def assert_equal(found, expected, **tolerances):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, equal_nan=True, check_stride=False, **tolerances)


@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "in place"])
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("what", ["parameter", "gradient", "exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])
def test_one_change(target, dtype, what, how, in_place):
    if target.device != "cpu":
        pytest.skip("the changes are made on the CPU")
    ours = Run(lambda params: target.adamw(params, lr=0.1), dtype)
    try:
        ours.change(what, CHANGES[how], in_place)
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"torch cannot: {error}")
    before = ours.values()
    error = ours.step()
    assert error is not None or (what, how) not in REFUSED
    if error is not None:
        assert "parameter number 1 of group 0" in str(error)
        assert_equal(ours.values(), before, rtol=0, atol=0)
    elif how not in CRASHES_TORCH:
        theirs = Run(lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False), dtype)
        theirs.change(what, CHANGES[how], in_place)
        if theirs.step() is None:
            half = "bfloat16" in how and what != "step"
            assert_equal(ours.values(), theirs.values(), rtol=0, atol=1e-2 if half else 3e-6)


WRAPPERS = {
    "reset": lambda state, p: state.update(exp_avg=torch.zeros_like(state["exp_avg"])),
    "away and back": lambda state, p: state.update(
        exp_avg_sq=TwoTensor(state["exp_avg_sq"].a.clone(), state["exp_avg_sq"].b.clone())
    ),
    "changed inside": lambda state, p: setattr(state["exp_avg"], "a", state["exp_avg"].a * 2),
    "parameter changed inside": lambda state, p: setattr(p, "b", torch.ones(4)),
}


@pytest.mark.parametrize("change", WRAPPERS)
def test_tensors_without_memory_of_their_own(target, change):
    """All of them have the address 0."""
    if target.device != "cpu":
        pytest.skip("the changes are made on the CPU")
    ends = []
    for make in (target.adamw, lambda params, **kw: torch.optim.AdamW(params, foreach=False, **kw)):
        p = nn.Parameter(TwoTensor(randn(4), randn(4, seed=1)))
        plain = parameters([(3,)])
        optimizer = make([*plain, p], lr=0.1)
        for step in range(6):
            give_grads(plain, step)
            p.grad = TwoTensor(randn(4, seed=10 + step), randn(4, seed=20 + step))
            if step == 3:
                WRAPPERS[change](optimizer.state[p], p)
            optimizer.step()
        state = optimizer.state[p]
        moments = [getattr(state[key], "a", state[key]) for key in ("exp_avg", "exp_avg_sq")]
        ends.append([p.a.detach(), p.b.detach(), *moments, state["step"], plain[0].detach()])
    assert_equal(*ends, rtol=0, atol=3e-6)
