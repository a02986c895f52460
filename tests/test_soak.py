"""Very many steps with everything on: memory stays flat, no file stays open, every run has the same bits."""

import gc
import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from common import NATIVE, parameters, randn
from low_precision import BF16, SCHEMES, assert_same_state

from fused_adamw import EMA, SpikeGuard

SHAPES = [(64, 64), (7,), ()]
DESCRIPTORS = Path("/proc/self/fd")


class Reading(NamedTuple):
    """What this process holds."""

    python_blocks: int
    resident_bytes: int
    descriptors: int

    @classmethod
    def now(cls):
        sys._clear_type_cache()  # which keeps names under which attributes were looked up
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE"), len(list(DESCRIPTORS.iterdir()))
        )


class Run:
    """A model in bfloat16 whose gradients spike now and then, with an optimizer that has everything on."""

    def __init__(self, scheme):
        self.params = parameters(SHAPES, dtype=BF16)
        self.optimizer = NATIVE.adamw(
            self.params,
            lr=1e-3,
            weight_decay=0.1,
            max_grad_norm=1.0,
            stats=True,
            guard=SpikeGuard(),
            ema=EMA(0.999, dtype=BF16),
            **SCHEMES[scheme],
        )
        self.grads = [[randn(*shape, seed=9 * i + j) for j, shape in enumerate(SHAPES)] for i in range(61)]
        self.grads[17] = [100 * g for g in self.grads[17]]
        self.grads[43][1][2] = float("nan")
        self.grads = [[g.to(BF16) for g in grads] for grads in self.grads]

    def go(self, steps):
        for step in range(steps):
            for p, g in zip(self.params, self.grads[step % len(self.grads)], strict=True):
                p.grad = g.clone()
            self.optimizer.observe(1.0 + step % 7)
            self.optimizer.step()
            if step % 500 == 0:
                self.watch()

    def watch(self):
        """What is done now and then: logs, an evaluation, a checkpoint, a parameter that moves."""
        self.optimizer.log_dict()
        with self.optimizer.swap_ema():
            pass
        self.optimizer.load_state_dict(self.optimizer.state_dict_compact())
        self.params[0].data = self.params[0].data.clone()


def assert_flat(readings):
    """From the second tenth on nothing grows: the readings themselves are a few blocks each."""
    warm, *later = readings[1:]
    most = Reading(*map(max, zip(*later, strict=True)))
    assert most.python_blocks - warm.python_blocks < 100, readings
    assert most.resident_bytes - warm.resident_bytes < 1 << 20, readings
    assert most.descriptors == warm.descriptors, readings


def soak(scheme, steps):
    """Two runs of so many steps, of which the first one is watched at every tenth."""
    first, readings = Run(scheme), []
    for _ in range(10):
        first.go(steps // 10)
        readings.append(Reading.now())
    print(scheme, *readings, sep="\n")  # shown by `pytest -rP`
    assert_flat(readings)
    second = Run(scheme)
    for _ in range(10):
        second.go(steps // 10)
    assert_same_state(first.optimizer, second.optimizer)
    histories = [run.optimizer.guard_state_dict()["status"].view(torch.int64) for run in (first, second)]
    assert torch.equal(*histories)
    counts = {name: int(n) for name, n in first.optimizer.skipped_steps_by_reason.items()}
    assert counts["spike"] > 0, counts
    assert counts["nonfinite"] > 0, counts
    assert all(t.isfinite().all() for t in first.params)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


schemes = pytest.mark.parametrize("scheme", ["stochastic-8bit", "split-8bit"])
on_linux = pytest.mark.skipif(not DESCRIPTORS.exists(), reason="reads /proc")


@on_linux
@schemes
def test_5_000_steps(scheme):
    soak(scheme, 5_000)


@pytest.mark.slow
@on_linux
@schemes
def test_a_million_steps(scheme):
    soak(scheme, 1_000_000)
