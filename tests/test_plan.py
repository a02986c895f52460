"""The plan: what it launches, and that one serves as long as it is true."""

import itertools
import logging
import weakref

import pytest
import torch
from common import NATIVE, Pair, assert_same_path, give_grads, parameters, twins, with_gaps
from torch.optim.lr_scheduler import LambdaLR

from fused_adamw.extension import load_extension
from fused_adamw.step import guard, snapshot


def test_one_bucket_for_all_groups(built):
    """One launch per device and dtypes, whatever the number of tensors and groups."""
    params = parameters([(3,)] * 40) + parameters([(3,)] * 4, dtype=torch.bfloat16)
    optimizer = NATIVE.adamw([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params)])
    give_grads(params, 0)
    optimizer.step()
    (only,) = built
    assert [len(bucket.slots) for bucket, _, _ in only.launches] == [40, 4]
    assert not only.fallbacks


def test_fallbacks_are_logged_once_with_their_reason(caplog):
    params = parameters([(3, 4), (3, 4), (5,)])
    params[1].data = with_gaps(params[1])
    optimizer = NATIVE.adamw(list(zip("abc", params, strict=True)))
    for step in range(3):
        give_grads(params, step)
        with caplog.at_level(logging.DEBUG, "fused_adamw"):
            optimizer.step()
    lines = [r.getMessage() for r in caplog.records if "reference" in r.getMessage()]
    assert lines == [
        "parameter 'b' is stepped by the reference: parameter is not dense: strides (8, 2) for shape (3, 4)"
    ]


def test_copies_of_gradients_are_logged_once(caplog):
    params = parameters([(3, 4), (3, 4), (5,)])
    optimizer = NATIVE.adamw(list(zip("abc", params, strict=True)))
    for step in range(3):
        give_grads(params, step)
        params[1].grad = torch.ones(4, 3).t()
        with caplog.at_level(logging.DEBUG, "fused_adamw"):
            optimizer.step()
    lines = [r.getMessage() for r in caplog.records if "copied" in r.getMessage()]
    assert lines == ["the gradient of parameter 'b' is copied: it is laid out otherwise"]


def test_views_of_one_buffer_are_stepped_by_kernels():
    """Where they do not overlap."""
    buffer = torch.randn(60)
    params = [torch.nn.Parameter(view) for view in (buffer[:20], buffer[20:50].view(5, 6), buffer[50:])]
    optimizer = NATIVE.adamw(params)
    give_grads(params, 0)
    optimizer.step()
    assert not optimizer._plan.fallbacks


def test_one_plan_for_a_steady_training(target, built):
    pair = Pair(target)
    scheduler = LambdaLR(pair.ours, lambda step: 0.9**step)
    peer = LambdaLR(pair.theirs, lambda step: 0.9**step)
    for _ in range(4):
        pair.step()  # with new gradient tensors every time
        scheduler.step()
        peer.step()
    for optimizer, _ in pair.both():
        optimizer.param_groups[0].update(betas=(0.5, 0.6), weight_decay=0.3, eps=1e-3, maximize=True)
    pair.ours.max_grad_norm = 1e6
    pair.step()
    assert len(built) == 1


def test_one_plan_while_gradients_come_and_go(target, built):
    pair = Pair(target)
    pair.step()
    for present in itertools.product([True, False], repeat=3):
        pair.step(without=[i for i in range(3) if not present[i]])
    assert len(built) == 1


@pytest.mark.parametrize("other", ["stepped as a tensor", "complex", "with another gradient layout"])
def test_a_steady_step_is_checked_by_one_call(target, monkeypatch, other):
    if isinstance(load_extension(), str):
        pytest.skip("the extension is not built")
    params = [*parameters([(3, 4), (5,), ()], device=target.device)]
    dtype = torch.complex64 if other == "complex" else torch.float32
    params += parameters([(4, 4)], device=target.device, dtype=dtype)
    copies = twins(params)
    if other == "stepped as a tensor":
        params[3].data = with_gaps(params[3])
    ours = target.adamw(params, lr=1e-2, max_grad_norm=1e9)
    theirs = torch.optim.AdamW(copies, lr=1e-2, foreach=False)
    for step in range(5):
        if step == 1:
            monkeypatch.delattr(snapshot.Snapshot, "matches")
        give_grads(params, step)
        give_grads(copies, step)
        for each in (params, copies):
            each[step % 4].grad = None if step else each[0].grad
        if other == "with another gradient layout" and step != 3:
            params[3].grad = params[3].grad.t().contiguous().t()
        ours.step()
        theirs.step()
    assert_same_path(params, copies, 5, grad_error=1e-6)


def test_gradients_are_held_through_a_step(target, monkeypatch):
    """Another thread may drop them while kernels read at their addresses without the GIL."""
    params = parameters([(30,)], device=target.device)
    optimizer = target.adamw(params, max_grad_norm=1.0)
    give_grads(params, 0)
    optimizer.step()
    bucket = optimizer._plan.launches[0].bucket
    update, is_alive = bucket.update, []

    def drop_and_update(*args):
        grad = weakref.ref(params[0].grad)
        params[0].grad = None
        is_alive.append(grad() is not None)
        update(*args)

    monkeypatch.setattr(bucket, "update", drop_and_update)
    give_grads(params, 1)
    optimizer.step()
    assert is_alive == [True]


def test_only_what_is_stepped_gets_a_new_version(target):
    """A backward pass through what a step has changed is to be refused, and only that."""
    pair = Pair(target)
    pair.step()
    for without in ((0,), (1, 2), (), (0, 1)):
        before = [p._version for p in pair.params]
        pair.step(without=without)
        moved = [p._version > version for p, version in zip(pair.params, before, strict=True)]
        assert moved == [i not in without for i in range(3)]


@pytest.mark.parametrize("without_extension", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_one_plan_where_tensors_are_moved_before_each_step(
    target, built, amsgrad, without_extension, monkeypatch
):
    """As by offloading of states, and by what swaps weights: the plan follows."""
    if without_extension:
        monkeypatch.setattr(guard, "load_extension", lambda: "not built")
        monkeypatch.setattr(snapshot, "load_extension", lambda: "not built")
    pair = Pair(target, [(5, 5), (70,), (0,), ()], amsgrad=amsgrad)
    pair.step()
    kept = []  # or new tensors could lie where old ones were
    for i in range(6):
        for optimizer, params in pair.both():
            for p in params[i % 2 :]:
                state = optimizer.state[p]
                kept += state.values()
                for key in list(state)[: 1 + i]:
                    state[key] = state[key].clone()
                if i % 3:
                    kept.append(p.data)
                    p.data = p.data.clone()
        pair.step()
    pair.step(2)
    assert len(built) == 1


@pytest.mark.parametrize(
    "when",
    [
        "at first",
        "later",
    ],
)
def test_default_device_does_not_reach_the_tables(target, when):
    """As with torch.set_default_device("cuda") and a model on the CPU, or the other way round."""
    pair = Pair(target)
    if when == "later":
        pair.step()
    give_grads(pair.params, 5)
    give_grads(pair.copies, 5)
    with torch.device("meta"):
        pair.ours.step()
    pair.theirs.step()
    pair.steps += 1
    assert_same_path(pair.params, pair.copies, pair.steps, grad_error=1e-6)
    assert not pair.ours.grad_norm.is_meta
