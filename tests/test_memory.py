"""What a plan remembers of tensors: that each change that a kernel would stumble over is seen."""

import weakref

import pytest
import torch

from fused_adamw import memory

# Metadata


@pytest.mark.parametrize("guards", [memory._guards, lambda tensors: None], ids=["guards", "columns"])
@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3, 4, dtype=torch.float16),
        torch.ones(4, 3),
        torch.ones(3, 3),
        torch.ones(4, 3).t(),
        torch.ones(3, 8)[:, ::2],
        torch.ones(3, 4).to_sparse(),
    ],
    ids=["dtype", "shape", "smaller", "transposed", "strided", "sparse"],
)
def test_metadata_tells_tensors_apart(guards, other, monkeypatch):
    monkeypatch.setattr(memory, "_guards", guards)
    like, also = torch.zeros(3, 4), torch.zeros(2)
    whole = memory.Metadata([like, also], [like, also])
    part = memory.Metadata([None, also], [like, also])
    for metadata in (whole, part):
        assert metadata.match([torch.ones(3, 4), also])
        assert metadata.match([None, also])
        assert not metadata.match([other, also])
        assert not metadata.match([other, None])


# StateSnapshot


def some_state():
    params = [torch.zeros(3, 4), torch.zeros(())]
    return {
        p: {
            "step": torch.tensor(2.0),
            "exp_avg": torch.ones_like(p),
            "exp_avg_sq": torch.ones_like(p),
            "n": 7,
        }
        for p in params
    }


def _replace_moment(state, first):
    first["exp_avg"] = torch.ones(3, 4)


def _replace_step_by_an_equal_one(state, first):
    first["step"] = torch.tensor(2.0)


def _exchange_moments(state, first):
    first["exp_avg"], first["exp_avg_sq"] = first["exp_avg_sq"], first["exp_avg"]


def _swap_data(state, first):
    first["exp_avg"].data = torch.ones(3, 4)


def _transpose(state, first):
    first["exp_avg"].data = first["exp_avg"].view(4, 3)


def _restride(state, first):
    first["exp_avg"].data = first["exp_avg"].as_strided((3, 4), (1, 3))


def _cut(state, first):
    first["exp_avg"].data = first["exp_avg"][:2]


def _flatten(state, first):
    first["exp_avg"].data = first["exp_avg"].view(-1)


def _view_as_another_dtype(state, first):
    first["exp_avg"].data = first["exp_avg"].view(torch.int32)


def _add_key(state, first):
    first["max_exp_avg_sq"] = torch.ones(3, 4)


def _remove_key(state, first):
    del first["exp_avg_sq"]


def _remove_parameter(state, first):
    del state[list(state)[-1]]


def _add_parameter(state, first):
    state[torch.zeros(1)] = {"step": torch.tensor(0.0)}


def _rename_parameter(state, first):
    last = list(state)[-1]
    state[torch.zeros(())] = state.pop(last)


CHANGES = [
    *(_replace_moment, _replace_step_by_an_equal_one, _exchange_moments, _swap_data, _transpose, _restride),
    *(_cut, _flatten, _view_as_another_dtype, _add_key, _remove_key),
    *(_remove_parameter, _add_parameter, _rename_parameter),
]


@pytest.fixture(params=["extension", "python"])
def state_snapshot(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(memory, "load_extension", lambda: "not built")
    elif isinstance(memory.load_extension(), str):
        pytest.skip("the extension is not built")
    return memory.StateSnapshot


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_state_snapshot_sees_a_change(state_snapshot, change):
    state = some_state()
    snapshot = state_snapshot(state)
    assert snapshot.matches(state)
    change(state, next(iter(state.values())))
    assert not snapshot.matches(state)
    assert state_snapshot(state).matches(state)


def test_state_snapshot_does_not_mind_what_a_step_changes(state_snapshot):
    state = some_state()
    snapshot = state_snapshot(state)
    for s in state.values():
        s["step"] += 1
        s["exp_avg"].mul_(0.5)
        s["n"] += 1  # not a tensor: no kernel reads it
    assert snapshot.matches(state)
    assert snapshot.matches({p: dict(s) for p, s in state.items()})


def test_state_snapshot_of_nothing_and_of_tensors_without_memory(state_snapshot):
    assert state_snapshot({}).matches({})
    p = torch.zeros(2)
    sparse = {p: {"exp_avg": torch.zeros(2).to_sparse()}}
    assert state_snapshot(sparse).matches(sparse)
    assert not state_snapshot(sparse).matches({})


def test_state_snapshot_lets_go_of_the_state(state_snapshot):
    state = some_state()
    moment = weakref.ref(next(iter(state.values()))["exp_avg"])
    snapshot = state_snapshot(state)
    state.clear()
    assert moment() is not None
    del snapshot
    assert moment() is None


def test_same_state_refuses_other_types():
    extension = memory.load_extension()
    if isinstance(extension, str):
        pytest.skip("the extension is not built")
    for args in [(), ({},), ([], ()), ({}, []), ({}, (), ())]:
        with pytest.raises(TypeError, match="a dict and a tuple"):
            extension.same_state(*args)
    assert not extension.same_state({1: 2}, (1, 2))


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
    assert memory.same_layout(a, b) == memory.same_layout(b, a) == same


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
    assert memory.is_dense(t) == dense
