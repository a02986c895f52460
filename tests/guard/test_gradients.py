"""Gradients come and go and move from step to step, which is no change."""

from array import array

import torch

from .held import Held


def test_gradients_come_and_go_and_move(guarded):
    held = Held()
    check = guarded(held)
    seen = set()
    for grad in (None, torch.ones(3, 4), torch.zeros(5, 4)[1:4], torch.zeros(1).expand(3, 4).clone()):
        held.p.grad = grad
        assert check(held) == held.addresses()
        seen.add(check(held))
    assert len(seen) == 4
    held.scalar.grad = None
    assert check(held) == held.addresses()


def test_an_empty_gradient_is_not_an_absent_one(guarded):
    held = Held()
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    held.groups.append([empty])
    held.state[empty] = {}
    check = guarded(held)
    assert check(held)[-8:] == bytes(8)
    empty.grad = torch.zeros(0, 3)
    assert array("q", check(held))[-1] == 1


def test_a_gradient_that_a_subclass_keeps_elsewhere(guarded):
    class Parameter(torch.nn.Parameter):
        @property
        def grad(self):
            return self.main_grad

        @grad.setter
        def grad(self, value):
            self.main_grad = value

    held = Held()
    held.groups.append([Parameter(torch.zeros(3))])
    held.state[held.params[-1]] = {}
    held.params[-1].grad = torch.zeros(3)
    check = guarded(held)
    assert check(held) == held.addresses()
    held.params[-1].grad = None
    assert check(held) == held.addresses()


def test_gradients_of_many_dimensions(guarded):
    """More than torch keeps in the tensor itself."""
    held = Held()
    p = torch.nn.Parameter(torch.zeros(2, 1, 2, 1, 2, 3, 2))
    held.groups.append([p])
    held.state[p] = {"exp_avg": torch.zeros_like(p)}
    p.grad = torch.zeros_like(p)
    check = guarded(held)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        assert check(held) == held.addresses()
    moment = held.state[p]["exp_avg"]
    p.grad = torch.zeros(2, 1, 2, 1, 2, 2, 3).transpose(-1, -2)
    assert check(held) is None
    p.grad = torch.zeros_like(p)
    moment.as_strided_(moment.shape, (*moment.stride()[:-2], 1, 3))
    assert check(held) is None
