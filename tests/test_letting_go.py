"""An optimizer keeps no memory alive that its user has replaced, whatever steps the parameters."""

import gc
import weakref

import pytest
import torch
from common import give_grads, parameters
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

PARAMETERS = {
    "plain": lambda device: nn.Parameter(torch.ones(100, device=device)),
    "strided": lambda device: nn.Parameter(torch.ones(200, device=device)[::2]),
    "complex": lambda device: nn.Parameter(torch.ones(100, dtype=torch.complex64, device=device)),
    "wrapper": lambda device: nn.Parameter(TwoTensor(torch.ones(9), torch.ones(9)).to(device)),
    "without a gradient": lambda device: nn.Parameter(torch.ones(100, device=device)),
    "frozen": lambda device: nn.Parameter(torch.ones(100, device=device), requires_grad=False),
}


def storages(*tensors):
    """Weak references to what keeps memory alive; the memory of wrappers is that of their parts."""
    parts = [part for t in tensors for part in ((t.a, t.b) if isinstance(t, TwoTensor) else (t,))]
    return [Storage(part) for part in parts]


class Storage:
    """The number of other owners of a tensor's memory, without being one."""

    def __init__(self, t):
        self.weak = t.untyped_storage()._weak_ref()

    def is_alive(self):
        return not torch.UntypedStorage._expired(self.weak)

    def __del__(self):
        torch.UntypedStorage._free_weak_ref(self.weak)


class Case:
    """An optimizer of a parameter of some kind and another one, after some steps."""

    def __init__(self, target, kind):
        self.kind = kind
        self.p = PARAMETERS[kind](target.device)
        self.others = parameters([(4,)], device=target.device)
        self.optimizer = target.adamw([*self.others, self.p])
        for step in range(3):
            self.step(step)

    @property
    def is_stepped(self):
        return self.kind not in ("without a gradient", "frozen")

    def step(self, step):
        give_grads(self.others, step)
        if self.is_stepped:
            self.p.grad = torch.ones_like(self.p)
        self.optimizer.step()


@pytest.fixture(params=PARAMETERS)
def case(target, request):
    return Case(target, request.param)


def assert_freed(old):
    gc.collect()
    assert not any(storage.is_alive() for storage in old)


def test_the_check_itself(target):
    t = torch.ones(3, device=target.device)
    (storage,) = storages(t)
    assert storage.is_alive()
    del t
    assert not storage.is_alive()


def test_data_of_a_parameter(case):
    old = storages(case.p)
    if case.kind == "wrapper":
        case.p.a, case.p.b = case.p.a.clone(), case.p.b.clone()  # `.data` would not touch them
    else:
        case.p.data = case.p.data.clone()
    assert_freed(old)
    case.step(3)
    assert_freed(old)


def test_moments(case):
    state = case.optimizer.state.get(case.p, {})
    old = storages(*state.values())
    assert bool(old) == case.is_stepped
    for key in state:
        state[key] = state[key].clone()
    assert_freed(old)
    case.step(3)
    assert_freed(old)


def test_loaded_moments(case):
    old = storages(*case.optimizer.state.get(case.p, {}).values())
    saved = case.optimizer.state_dict()
    case.optimizer.load_state_dict(saved)
    del saved
    assert_freed(old)


def test_gradients(case):
    if case.is_stepped:
        old = storages(case.p.grad)
        case.p.grad = None
        assert_freed(old)


def test_a_parameter_that_is_left_out(case):
    old = storages(case.p, *case.optimizer.state.get(case.p, {}).values())
    gone = weakref.ref(case.p)
    case.optimizer.param_groups[0]["params"].pop()
    case.optimizer.state.pop(case.p, None)
    case.p = None
    assert_freed(old)
    assert gone() is None
    give_grads(case.others, 3)
    case.optimizer.step()


def test_the_optimizer_itself(case):
    old = storages(case.p, *case.optimizer.state.get(case.p, {}).values())
    case.p = case.optimizer = None
    assert_freed(old)


def test_weak_references_do_not_hinder_swap_tensors(case):
    if case.kind == "wrapper":
        pytest.skip("has parts")
    new = nn.Parameter(torch.zeros_like(case.p), requires_grad=case.p.requires_grad)
    torch.utils.swap_tensors(case.p, new)
    case.step(3)
