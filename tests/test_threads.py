"""Threads that share out a step, that each have an optimizer, that meddle with gradients."""

import itertools
import sys
import threading
import time

import pytest
import torch
from common import NATIVE, give_grads, parameters, twins

from fused_adamw import FusedHygieneAdamW
from fused_adamw.backends import native

SHAPES = [(300, 500), (7,), (40_001,), (), (1000, 33)]  # several chunks, and rows that share one batch
PRECISIONS = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16, "stochastic_rounding": True, "state_dtype": torch.bfloat16},
    "split": {"dtype": torch.bfloat16, "master_weights": "split"},
    "8bit": {"dtype": torch.bfloat16, "stochastic_rounding": True, "state_dtype": "8bit"},
}


def stepped(params, steps=3, **options):
    """Parameters and their state after some steps."""
    optimizer = FusedHygieneAdamW(params, lr=1e-2, max_grad_norm=1.0, **options)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return [t.detach() for p in params for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_has_the_same_bits_however_many_threads_share_it(threads, precision):
    options = dict(PRECISIONS[precision])
    params = parameters(SHAPES, dtype=options.pop("dtype"))
    ends = []
    for n, own in ((1, params), (4, twins(params))):
        threads(n)
        ends.append(stepped(own, **options))
    assert all(map(torch.equal, *ends))


@pytest.fixture
def switch_often():
    """Lets Python's threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_optimizers_of_several_threads_do_not_disturb_each_other(threads, switch_often):
    threads(2)
    params = [parameters(SHAPES[1:]) for _ in range(3)]
    alone, ends = stepped(twins(params[0]), 20), {}

    def train(i):
        ends[i] = stepped(params[i], 20)

    workers = [threading.Thread(target=train, args=(i,)) for i in range(len(params))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for end in ends.values():
        assert all(map(torch.equal, end, alone))
    assert len(ends) == len(workers)


class Meddler(threading.Thread):
    """Frees and replaces gradients while kernels run: those of ones by such of minus ones, or by none.

    Not while a step looks for them: torch itself crashes where one thread reads `p.grad` and another sets it.
    """

    def __init__(self, params):
        super().__init__(daemon=True)
        self.params, self.turns, self.may_go, self.is_done = params, 0, threading.Lock(), False

    def run(self):
        for sign in itertools.cycle((1.0, -1.0, None)):
            with self.may_go:
                for p in self.params:
                    p.grad = None if sign is None else torch.full_like(p, sign)
            self.turns += 1
            time.sleep(1e-6)  # else it might never hand the lock on
            if self.is_done:
                return

    def let_in(self, kernel):
        """A kernel while which it may go."""

        def run(*args):
            self.may_go.release()
            try:
                kernel(*args)
            finally:
                self.may_go.acquire()

        return run


@pytest.mark.parametrize("n", [pytest.param(100, id="some"), pytest.param(5000, marks=pytest.mark.slow)])
def test_gradients_that_another_thread_frees_and_replaces(n, switch_often, monkeypatch):
    """A step takes those that it finds at its start: each parameter moves by its whole gradient, or stays."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((50_000,), (3,), (200, 200))]
    for p in params:
        p.grad = torch.ones_like(p)
    options = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1e-30, "weight_decay": 0.0, "max_grad_norm": 1e30}
    optimizer, meddler, seen = NATIVE.adamw(params, **options), Meddler(params), set()
    for name in ("sum_of_squares", "update"):
        monkeypatch.setattr(native, name, meddler.let_in(getattr(native, name)))
    meddler.may_go.acquire()
    meddler.start()
    try:
        for _ in range(n):
            before = [p.detach().clone() for p in params]
            signs = [0.0 if p.grad is None else -p.grad.flatten()[0].item() for p in params]
            optimizer.step()
            for p, old, sign in zip(params, before, signs, strict=True):
                assert (p.detach() - old).unique().tolist() == [sign]
            seen |= set(signs)
    finally:
        meddler.is_done = True
        meddler.may_go.release()
        meddler.join()
    assert seen == {1.0, -1.0, 0.0}
