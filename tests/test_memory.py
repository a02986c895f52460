"""What a plan remembers of tensors: that each change that a kernel would stumble over is seen."""

import gc
import weakref
from array import array

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.multiprocessing.reductions import StorageWeakRef

from fused_adamw import layout
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


@pytest.fixture(
    params=[python_guard, guard_of_objects, native_guard], ids=["python", "c++ with objects", "c++"]
)
def guarded(request):
    """Guards what is held; returns its check: the addresses of the gradients, None if it changed."""
    return request.param


# Changes of one tensor, made in place: its object stays the same.
MOVES = {
    "elsewhere": lambda t: t.clone(),
    "reshaped": lambda t: t.view(4, 3),
    "restrided": lambda t: t.as_strided((3, 4), (1, 3)),
    "cut": lambda t: t[:2],
    "flattened": lambda t: t.view(-1),
    "of another dtype": lambda t: t.view(torch.int32),
}
# Of another dtype, a parameter cannot have a gradient.
MOVES_OF_PARAMS = {name: move for name, move in MOVES.items() if name != "of another dtype"}


def step_replaced_by_an_equal_one(held):
    old, held.s["step"] = held.s["step"], torch.tensor(2.0)
    held.old = old  # or its memory could be that of the new one


def names_exchanged(held):
    step, m, v, n = held.s.values()
    held.state[held.p] = {"step": step, "exp_avg_sq": m, "exp_avg": v, "n": n}


def moment_of_a_subclass(held):
    held.s["exp_avg"] = held.s["exp_avg"].as_subclass(type("Subclass", (torch.Tensor,), {}))


def gradient_without_memory(held):
    held.p.grad.untyped_storage().resize_(0)


def moment_without_memory(held):
    held.s["exp_avg"].untyped_storage().resize_(0)


def moments_exchanged(held):
    held.s["exp_avg"], held.s["exp_avg_sq"] = held.s["exp_avg_sq"], held.s["exp_avg"]


def moment_no_tensor(held):
    held.s["exp_avg"] = None


def key_added(held):
    held.s["max_exp_avg_sq"] = torch.ones(3, 4)


def key_removed(held):
    del held.s["exp_avg_sq"]


def state_removed(held):
    del held.state[held.scalar]


def state_of_another_parameter(held):
    held.state[torch.zeros(())] = held.state.pop(held.scalar)


def parameter_replaced(held):
    held.groups[0][0] = torch.nn.Parameter(torch.zeros(3, 4))


def parameter_replaced_by_another_of_its_memory(held):
    held.groups[0][0] = torch.nn.Parameter(held.p.data)


def parameters_reordered(held):
    held.groups[0].reverse()


def parameter_added(held):
    held.groups[0].append(torch.nn.Parameter(torch.zeros(3)))


def parameter_removed(held):
    held.groups[0].pop()


def group_added(held):
    held.groups.append([held.without])


def parameters_swapped(held):
    other = torch.nn.Parameter(held.p.detach().clone())
    other.grad = held.p.grad
    torch.utils.swap_tensors(held.p, other)


def first_gradient(held):
    held.without.grad = torch.ones(2)


def gradient_transposed(held):
    held.p.grad = torch.ones(4, 3).t()


def gradient_strided(held):
    held.p.grad = torch.ones(3, 8)[:, ::2]


def gradient_smaller(held):
    held.p.grad.data = torch.ones(3, 3)


def gradient_of_another_dtype(held):
    held.p.grad.data = torch.ones(3, 4, dtype=torch.float64)


def gradient_sparse(held):
    held.p.grad = torch.ones(3, 4).to_sparse()


def gradient_of_a_subclass(held):
    held.p.grad = torch.ones(3, 4).as_subclass(type("Subclass", (torch.Tensor,), {}))


def gradient_negative(held):
    held.scalar.grad = torch.tensor(1 + 2j).conj().imag
    assert held.scalar.grad.is_neg()


def gradient_negative_at_the_same_address(held):
    held.scalar.grad = held.complex.conj().imag


def parameter_negated(held):
    held.p.data = torch._neg_view(held.p.data)


def moment_negated(held):
    held.s["exp_avg"] = torch._neg_view(held.s["exp_avg"])


def gradient_negated(held):
    held.p.grad = torch._neg_view(held.p.grad)


def moment_born_in_inference_mode(held):
    with torch.inference_mode():
        held.s["exp_avg"] = torch.from_numpy(held.s["exp_avg"].numpy())


def step_no_longer_the_state_s_first(held):
    held.s["step"] = held.s.pop("step")


CHANGES = [
    *(parameter_negated, moment_negated, gradient_negated, moment_born_in_inference_mode),
    step_no_longer_the_state_s_first,
    *(step_replaced_by_an_equal_one, moments_exchanged, moment_no_tensor, key_added, key_removed),
    *(names_exchanged, moment_of_a_subclass, moment_without_memory, gradient_without_memory),
    *(state_removed, state_of_another_parameter),
    *(parameter_replaced, parameters_reordered, parameter_added, parameter_removed, group_added),
    parameter_replaced_by_another_of_its_memory,
    *(parameters_swapped, first_gradient, gradient_transposed, gradient_strided, gradient_smaller),
    *(gradient_of_another_dtype, gradient_sparse, gradient_of_a_subclass),
    *(gradient_negative, gradient_negative_at_the_same_address),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(guarded, change):
    held = Held()
    held.complex = torch.tensor(1 + 2j)
    held.scalar.grad = held.complex.imag
    check = guarded(held)
    assert check(held) == held.addresses()
    change(held)
    assert check(held) is None


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_move_of_a_moment_is_seen(guarded, key, move):
    held = Held()
    check = guarded(held)
    held.s[key].data = move(held.s[key])
    assert check(held) is None
    assert guarded(held)(held) == held.addresses()


@pytest.mark.parametrize("move", MOVES_OF_PARAMS.values(), ids=MOVES_OF_PARAMS)
def test_a_move_of_a_parameter_is_seen(guarded, move):
    held = Held()
    check = guarded(held)
    held.p.data = move(held.p.data)
    assert check(held) is None


def test_what_a_step_changes_is_no_change(guarded):
    held = Held()
    check = guarded(held)
    for s in held.state.values():
        s["step"] += 1
        s["exp_avg"].mul_(0.5)
        s["n"] += 1  # not a tensor: no kernel reads it
    with torch.no_grad():
        held.p.mul_(2)
    assert check(held) == held.addresses()
    held.groups = [[held.p], [held.scalar, held.without]]
    held.state = {p: dict(s) for p, s in held.state.items()}
    assert check(held) == held.addresses()


@pytest.mark.parametrize("key", [5, None, "lora", torch.zeros(2)], ids=["int", "None", "str", "tensor"])
@pytest.mark.parametrize("value", [7, None, [torch.ones(2)], {"exp_avg": torch.ones(2)}, torch.ones(2)])
def test_what_users_keep_in_the_state_is_no_change(guarded, key, value):
    held = Held()
    held.state = {key: value, **held.state}
    held.s[key] = value
    check = guarded(held)
    for change in (held.state, held.s):
        change[key] = torch.ones(3)
        assert check(held) == held.addresses()
        change["new"] = {"step": 1}
        assert check(held) == held.addresses()
        del change[key]
        assert check(held) == held.addresses()


def test_keys_that_are_equal_but_other_strings(guarded):
    held = Held()
    held.state[held.p] = {"".join(key): value for key, value in held.s.items()}
    check = guarded(held)
    held.state[held.p]["".join(["exp", "_avg"])] = held.s["exp_avg"]
    assert check(held) == held.addresses()
    held.state[held.p]["".join(["max", "_exp_avg_sq"])] = torch.ones(3, 4)
    assert check(held) is None


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


def test_another_object_of_the_same_memory_is_no_change(guarded):
    held = Held()
    check = guarded(held)
    held.s["exp_avg"] = held.s["exp_avg"].view(3, 4)
    assert check(held) == held.addresses()


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


def test_functions_of_the_extension_refuse_other_types():
    extension = load_extension()
    if isinstance(extension, str):
        pytest.skip("the extension is not built")
    probes = layout.probes()
    rest = (probes, torch.zeros(1, dtype=torch.int64).data_ptr(), True)
    guard = extension.make_guard(torch.Tensor, (), (), (), (), *rest)
    assert extension.check_guard(guard, [], {}) == (0, b"", [], [], None)
    assert extension.check_guard(guard, [()], {}) is None  # only lists are walked
    assert extension.check_guard(guard, [[1]], {}) is None
    assert extension.check_guard(guard, [], {1: 2}) == (0, b"", [], [], None)  # not the optimizer's
    assert extension.check_guard(guard, [], ()) is None
    for args in [(), (guard,), (guard, (), {}), (guard, [], {}, 1)]:
        with pytest.raises(TypeError, match="a capsule, a list and a mapping"):
            extension.check_guard(*args)
    with pytest.raises(ValueError, match="PyCapsule"):
        extension.check_guard(torch.Tensor.__dlpack_c_exchange_api__, [], {})
    t = torch.zeros(2)
    for args in [([], (), ()), ((1,), (None,), ()), ((t,), (), ()), ((t,), ((t, ()),), ()), ((), (), (1,))]:
        with pytest.raises((IndexError, RuntimeError, SystemError)):
            extension.make_guard(torch.Tensor, *args, (), *rest)
    with pytest.raises(SystemError):
        extension.make_guard(torch.Tensor, (), (), (), ["step"], *rest)
    with pytest.raises(NotImplementedError, match="another layout"):
        extension.make_guard(torch.Tensor, (), (), (), (), ((t, 12345),), *rest[1:])
    with pytest.raises(TypeError, match="8 arguments"):
        extension.make_guard(torch.Tensor)
    with pytest.raises(AttributeError, match="dlpack"):
        extension.make_guard(int, (), (), (), (), *rest)
    for args in [(), (guard, guard)]:
        with pytest.raises(TypeError, match="what check_guard returned"):
            extension.count_changes(*args)
    with pytest.raises(ValueError, match="PyCapsule"):
        extension.count_changes(guard)
    assert extension.move_guard(guard, b"") is None
    with pytest.raises(ValueError, match="0 bytes, got 8"):
        extension.move_guard(guard, bytes(8))
    for args in [(), (guard,), (guard, []), (guard, b"", 1)]:
        with pytest.raises(TypeError, match="a capsule and bytes"):
            extension.move_guard(*args)
    assert extension.survey(torch.Tensor, [], probes) == (b"", b"")
    for args in [(), (torch.Tensor, (), probes), (torch.Tensor, [], probes, 1)]:
        with pytest.raises(TypeError, match="a type, a list and a tuple"):
            extension.survey(*args)
    with pytest.raises(NotImplementedError, match="another layout"):
        extension.survey(torch.Tensor, [t], ((t, 12345),))


# Layouts


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.empty(3, 4), torch.empty(3, 4), True),
        (torch.empty(3, 4), torch.empty(4, 3).t(), False),
        (torch.empty(3, 1), torch.empty(3, 7)[:, :1], False),
        (torch.empty(1, 4), torch.empty(5, 4)[:1], True),
        (torch.empty(1, 4).as_strided((1, 4), (99, 1)), torch.empty(1, 4), True),
        (torch.empty(4), torch.empty(2, 2), False),
        (torch.empty(()), torch.empty(()), True),
    ],
)
def test_same_layout(a, b, same):
    strides = a.stride(), b.stride()
    for one, other in (strides, strides[::-1]):
        assert (a.shape == b.shape and layout.same_layout(a.shape, one, other)) == same


@pytest.mark.parametrize(
    ("t", "dense"),
    [
        (torch.empty(3, 4, 5), True),
        (torch.empty(3, 4, 5).permute(2, 0, 1), True),
        (torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last), True),
        (torch.empty(3, 4)[:, :3], False),
        (torch.empty(3, 4)[1:], True),
        (torch.empty(3, 4)[::2], False),
        (torch.empty(1).expand(3), False),
        (torch.empty(3, 1).expand(3, 4), False),
        (torch.empty(0, 4)[:, ::2], True),
        (torch.empty(()), True),
        (torch.empty(8).as_strided((3, 3), (2, 1)), False),
    ],
)
def test_is_dense(t, dense):
    assert layout.is_dense(t.shape, t.stride()) == dense


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=12))
def test_overlapping(pieces):
    """Against the bytes of each."""
    spans = layout.Spans([size for _, size in pieces])
    found = spans.overlapping(torch.tensor([start for start, _ in pieces], dtype=torch.int64))
    covered = [set(range(start, start + size)) for start, size in pieces]
    shared = {i for i, a in enumerate(covered) for j, b in enumerate(covered) if i != j and a & b}
    assert found <= shared
    assert bool(found) == bool(shared)
    # All but pieces that lie in a longer one are named beside it.
    assert all(any(a & covered[j] for j in found) for i, a in enumerate(covered) if i in shared)


def assorted_tensors():
    class Subclass(torch.Tensor):
        pass

    x = torch.zeros(3, 4)
    with torch.inference_mode():
        born_in_inference = torch.zeros(3, 4)
    return [
        x, torch.zeros(3, 4), torch.nn.Parameter(x), x.t(), x[:, :1], x[:, :2], x.half(), x.view(4, 3),
        x.as_subclass(Subclass), torch.zeros(()), torch.zeros(0, 4), x.to(torch.complex64),
        x.to(torch.complex64).conj(), x.to(torch.complex64).conj().imag, born_in_inference,
        torch.zeros(1, 1, 1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, 1, 1),
    ]  # fmt: skip


def test_a_survey_in_cpp_tells_the_same_tensors_apart(monkeypatch):
    """As one in Python, and says the same of them."""
    if isinstance(load_extension(), str):
        pytest.skip("the extension is not built")
    tensors = assorted_tensors()
    forms, addresses = snapshot.Forms().survey(tensors)
    monkeypatch.setattr(snapshot, "load_extension", lambda: "not built")
    expected, same_addresses = snapshot.Forms().survey(tensors)
    assert addresses == same_addresses
    assert [form.key for form in forms] == [form.key for form in expected]
    assert [forms.index(form) for form in forms] == [expected.index(form) for form in expected]


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
