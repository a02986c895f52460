"""Norms of single parameters that are spread over processes: those of the whole gradients, everywhere."""

import math

import pytest
import torch
import torch.distributed as dist

from fused_adamw import FusedHygieneAdamW

from . import layouts
from .layouts import LAYOUTS
from .ranks import run


def found_by(name, poisoned_ranks):
    layout = LAYOUTS[name]("cpu")
    params = layouts.placed_params(layout)
    optimizer = FusedHygieneAdamW(params, max_grad_norm=1.0)
    layouts.give_grads(params, layout, 0)
    if dist.get_rank() in poisoned_ranks:
        params[2].grad.to_local().view(-1)[0] = math.nan
    optimizer.step()
    return [tuple(stats) for stats in optimizer.param_stats().values()], optimizer.nonfinite_params()


@pytest.mark.parametrize("name", ["one_mesh", "hsdp", "fsdp_and_tp", "two_meshes", "mixed"])
def test_norms_of_whole_parameters(name):
    whole = [torch.linalg.vector_norm(grad.double()).item() for grad in layouts.whole_grads(0)]
    for found, nonfinite in run(4, found_by, name, ()):
        assert [norm for norm, *_ in found] == pytest.approx(whole, rel=1e-12)
        assert nonfinite == []


def test_all_processes_name_the_parameter_that_one_found():
    for found, nonfinite in run(2, found_by, "one_mesh", (1,)):
        assert nonfinite == ["group 0.2"]
        assert [bad for _, _, bad, *_ in found] == [i == 2 for i in range(len(found))]
