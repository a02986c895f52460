"""The harness itself: what goes wrong in a process is told, and nothing hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from fused_adamw import FusedHygieneAdamW

from . import layouts
from .ranks import RanksFailed, run


def rank_and_sum(addend):
    total = torch.tensor(float(dist.get_rank() + addend))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_by_rank(world_size):
    total = sum(range(world_size)) + 10.0 * world_size
    assert run(world_size, rank_and_sum, 10) == [(rank, total) for rank in range(world_size)]


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("a reason")
    dist.barrier()


def die_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


@pytest.mark.parametrize(("function", "message"), [(fail_on_rank_1, "a reason"), (die_on_rank_1, "died")])
def test_a_failure_of_one_ends_all(function, message):
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=rf"(?s)rank 1: .*{message}"):
        run(2, function)
    assert time.monotonic() - start < 30


def other_order(ranks):
    """Two meshes, {0, 1}, {2, 3} and {0, 2}, {1, 3}; some processes reduce over the second first."""
    layout = layouts.two_meshes("cpu")
    params = layouts.placed_params(layout)
    layouts.give_grads(params, layout, 0)
    optimizer = FusedHygieneAdamW(params, max_grad_norm=1.0)
    optimizer.step()
    if dist.get_rank() in ranks:
        optimizer._plan._reduction._meshes.reverse()
    for _ in range(2):
        optimizer.step()


def test_a_wrong_order_of_collectives_is_noticed():
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"still ran when time was up|Timed out|Connection"):
        run(4, other_order, (1, 2), timeout=4.0)  # 0 waits for 1, 1 for 3, 3 for 2, 2 for 0
    assert time.monotonic() - start < 30
    run(4, other_order, ())


def skip_collective_on_rank_1():
    """One process takes its parameters for plain ones, and does not reduce."""
    params = layouts.placed_params(layouts.one_mesh("cpu"))
    optimizer = FusedHygieneAdamW(params, max_grad_norm=1.0)
    optimizer.step()
    if dist.get_rank() == 1:
        optimizer._plan._reduction._meshes.clear()
    optimizer.step()
    optimizer.step()


def test_a_collective_that_one_process_leaves_out_is_noticed():
    with pytest.raises(RanksFailed, match=r"still ran when time was up|Timed out|Connection"):
        run(2, skip_collective_on_rank_1, timeout=5.0)
