"""Tensors that an optimizer holds, and the guards over them: in Python and in C++."""

from array import array

import pytest
import torch

from fused_adamw.extension import load_extension
from fused_adamw.step import guard, snapshot


class Held:
    """What an optimizer holds: two parameters with gradient and state, and one that has neither."""

    def __init__(self):
        shapes = [(3, 4), (), (2,)]
        self.groups = [[torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]]
        self.p, self.scalar, self.without = self.groups[0]
        self.state = {}
        for p in (self.p, self.scalar):
            p.grad = torch.ones_like(p)
            moments = {"exp_avg": torch.ones(p.shape), "exp_avg_sq": torch.ones(p.shape)}
            self.state[p] = {"step": torch.tensor(2.0), **moments, "n": 7}
        self.s = self.state[self.p]

    @property
    def params(self):
        return [p for group in self.groups for p in group]

    @property
    def known_grads(self):
        return [p.detach() if p in self.state else None for p in self.params]

    def addresses(self):
        return array("q", [0 if p.grad is None else p.grad.data_ptr() for p in self.params]).tobytes()


def python_guard(held):
    before = snapshot.Snapshot(held.params, held.known_grads, held.state)
    before.forget()

    def check(held):
        grads = [p.grad for p in held.params]
        now = snapshot.Snapshot(held.params, grads, held.state)
        is_same = now.matches(before, before.grads) and now.addresses == before.addresses
        return bytes_of(guard.Found.of(held.params, grads), held) if is_same else None

    return check


def bytes_of(found, held):
    assert list(found.present) == [p.grad is not None for p in held.params]
    return bytes(memoryview(found.addresses.numpy())[: len(held.params)])


def new_guard(held, **options):
    seen = snapshot.Snapshot(held.params, held.known_grads, held.state)
    return guard.Guard(held.params, seen.grads, seen, **options)


def versions(held):
    return [p._version for p in held.params]


def native_guard(held, **options):
    if isinstance(load_extension(), str):
        pytest.skip("the extension is not built")
    native = new_guard(held, **options)
    seen = {}

    def check(held):
        found = native.check(held.groups, held.state)
        if found is None or found.moved is not None:
            return None
        addresses, before = bytes_of(found, held), versions(held)
        assert seen.setdefault(found.version, addresses) == addresses
        found.count_changes()
        has_grad = [p.grad is not None for p in held.params]
        assert versions(held) == [n + has for n, has in zip(before, has_grad, strict=True)]
        if found.grads is not None:
            assert list(map(id, found.grads)) == [id(p.grad) for p in held.params]
            assert list(map(id, found.stepped)) == [id(p) for p in held.params if p.grad is not None]
        return addresses

    return check


def guard_of_objects(held):
    return native_guard(held, by_objects=True)
