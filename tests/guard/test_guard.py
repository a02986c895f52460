"""What a guard keeps alive, follows, and leaves to Python."""

import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fused_adamw.extension import load_extension
from fused_adamw.step import guard, snapshot

from .held import Held, bytes_of, native_guard, new_guard, python_guard


@pytest.mark.parametrize("by_objects", [False, True])
def test_gradients_and_parameters_stay_while_a_step_has_them(by_objects):
    if isinstance(load_extension(), str):
        pytest.skip("the extension is not built")
    held = Held()
    native = new_guard(held, by_objects=by_objects)
    found = native.check(held.groups, held.state)
    memory = [StorageWeakRef(t.untyped_storage()) for t in (held.p.grad, held.p.detach())]
    held.groups[0][0] = held.p = held.s = None
    held.state.clear()
    gc.collect()
    assert not any(storage.expired() for storage in memory)
    del found
    gc.collect()
    assert all(storage.expired() for storage in memory)


def test_nothing_is_held(guarded):
    held = Held()
    held.groups, held.state = [], {}
    assert guarded(held)(held) == b""


def test_moments_that_are_moved_away_are_freed(guarded):
    held = Held()
    moment = weakref.ref(held.s["exp_avg"])
    check = guarded(held)
    held.s["exp_avg"] = held.s["exp_avg"].clone()
    assert moment() is None
    assert check(held) is None


def test_it_lets_go(guarded):
    held = Held()
    p = weakref.ref(held.p)
    check = guarded(held)
    # The optimizer that a hook steps: only the garbage collector can tell that nobody else knows it.
    held.p.register_hook(lambda grad, check=check: check)
    held.s["exp_avg"].owner = check
    del held, check
    gc.collect()
    assert p() is None


class Interrupted(torch.overrides.TorchFunctionMode):
    """The user presses Ctrl-C while a gradient is read."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        raise KeyboardInterrupt


def test_an_interrupt_is_not_swallowed():
    held = Held()
    check = native_guard(held)
    with pytest.raises(KeyboardInterrupt), Interrupted():
        check(held)


def a_subclass(held):
    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return super().__torch_function__(func, types, args, kwargs or {})

    held.s["exp_avg"] = held.s["exp_avg"].as_subclass(Subclass)


def a_sparse_one(held):
    held.s["exp_avg"] = held.s["exp_avg"].to_sparse()


def a_meta_one(held):
    held.s["exp_avg"] = held.s["exp_avg"].to("meta")


@pytest.mark.parametrize("tensor", [a_subclass, a_sparse_one, a_meta_one], ids=lambda f: f.__name__)
def test_other_kinds_of_tensors_are_compared_in_python(tensor):
    held = Held()
    tensor(held)
    with pytest.raises(RuntimeError):
        new_guard(held)
    check = python_guard(held)
    assert check(held) == held.addresses()
    held.s["exp_avg"] = torch.ones(3, 4)
    assert check(held) is None


def test_without_an_extension_all_are_compared_in_python(monkeypatch):
    held = Held()
    for module in (guard, snapshot):
        monkeypatch.setattr(module, "load_extension", lambda: "not built")
    with pytest.raises(RuntimeError, match="not built"):
        new_guard(held)
    assert python_guard(held)(held) == held.addresses()


def test_a_guard_follows_what_has_moved():
    if isinstance(load_extension(), str):
        pytest.skip("the extension is not built")
    held = Held()
    native = new_guard(held)
    held.s["exp_avg"], held.p.data = held.s["exp_avg"].clone(), held.p.detach().clone()
    found = native.check(held.groups, held.state)
    assert bytes_of(found, held) == held.addresses()
    here = snapshot.Snapshot(held.params, held.known_grads, held.state)
    assert found.moved == here.addresses.tobytes()
    assert native.check(held.groups, held.state).moved == found.moved  # until it is told
    native.move(found.moved)
    for _ in range(3):
        assert native.check(held.groups, held.state).moved is None
    held.s["exp_avg"].untyped_storage().resize_(0)
    assert native.check(held.groups, held.state) is None
