"""What steps find of DTensors with `stats`: what a process alone finds of whole parameters, everywhere."""

import pytest
import torch
from torch import nn

from fused_adamw import FusedHygieneAdamW

from . import layouts
from .layouts import LAYOUTS, placed_like
from .ranks import run

STEPS = 2
# Norms of gradients are sums that are exact, so clips are, and updates; the rest are float64 sums.
TOLERANCE = 1e-12
FORMATS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {"stochastic_rounding": True}),
    "master": (torch.bfloat16, {"master_weights": "split", "state_dtype": torch.bfloat16}),
}


def found(params, options):
    """By name; and what is logged."""
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = FusedHygieneAdamW(named, lr=1e-2, weight_decay=0.1, max_grad_norm=1.0, stats=True, **options)
    for step in range(STEPS):
        for p, grad in zip(params, layouts.whole_grads(step), strict=True):
            p.grad = placed_like(grad.to(p.dtype), p)
        optimizer.step()
    stats = {name: tuple(s) for name, s in optimizer.param_stats().items()}
    stats |= {name: tuple(s) for name, s in optimizer.group_stats().items()}
    return stats, optimizer.log_dict(top_k=2)


def on_a_mesh(name, dtype, options):
    layout = LAYOUTS[name]("cpu")
    return found([nn.Parameter(p.detach().to(dtype)) for p in layouts.placed_params(layout)], options)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(
    ("name", "world_size"),
    [("one_mesh", 2), ("one_mesh", 4), ("replicated", 2), ("hsdp", 4), ("fsdp_and_tp", 4), ("mixed", 4)],
)
def test_as_in_one_process(name, world_size, formats):
    dtype, options = FORMATS[formats]
    stats, logged = found([nn.Parameter(p.detach().to(dtype)) for p in layouts.whole_params()], options)
    assert any(s[-1] for s in stats.values()) == (dtype == torch.bfloat16), "nothing is lost"
    for theirs, also_logged in run(world_size, on_a_mesh, name, dtype, options):
        assert theirs.keys() == stats.keys()
        for key, expected in stats.items():
            assert theirs[key] == pytest.approx(expected, rel=TOLERANCE), key
        assert also_logged == pytest.approx(logged, rel=TOLERANCE)
