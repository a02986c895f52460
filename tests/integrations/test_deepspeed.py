"""DeepSpeed's ZeRO-Offload: the optimizer steps the float32 masters that ZeRO keeps on the CPU.

DeepSpeed is not among the libraries of `requirements-integrations.txt`: it compiles parts of itself for
minutes. Where it is installed, these tests run on its CPU accelerator.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from distributed.models import Net, batch
from distributed.ranks import run
from torch.nn.utils import clip_grad_norm_

from fused_adamw import FusedHygieneAdamW, build_param_groups

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

CLIP, STEPS = 0.3, 4
LR, WEIGHT_DECAY = 1e-2, 0.1


def ours(model):
    return FusedHygieneAdamW(model, lr=LR, weight_decay=WEIGHT_DECAY)


def torch_adamw(model):
    return torch.optim.AdamW(build_param_groups(model, weight_decay=WEIGHT_DECAY), lr=LR)


def trained_by_zero(make, stage, dtype):
    """Parameters and norms after some steps, and where and how the optimizer's state is kept."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(torch.distributed.get_rank())}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja
    import deepspeed

    model = Net()
    optimizer = make(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert engine.basic_optimizer is optimizer
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, WEIGHT_DECAY}
    norms = []
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(STEPS):
        engine.backward(engine(batch(step, rank, world_size).to(dtype)).float().square().mean())
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    kept = {(t.device.type, t.dtype) for state in optimizer.state.values() for t in state.values()}
    fallbacks = getattr(optimizer, "_plan", None) and optimizer._plan.fallbacks
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        params = [p.detach().float().clone() for p in model.parameters()]
    return params, norms, kept, fallbacks


def trained_alone():
    """The same by torch in one process."""
    model = Net()
    optimizer = torch_adamw(model)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step, 0, 1)).square().mean().backward()
        norms.append(clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
    return [p.detach() for p in model.parameters()], norms


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_offload_trains_as_one_process_does(stage, world_size):
    """Within the rounding of four float32 steps."""
    expected, expected_norms = trained_alone()
    for params, norms, kept, fallbacks in run(
        world_size, trained_by_zero, ours, stage, torch.float32, timeout=400
    ):
        torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)
        assert kept == {("cpu", torch.float32)}
        assert not fallbacks


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_models_are_stepped_as_by_torch(stage):
    """Masters and moments are float32: a parameter may be rounded to its neighbour, no further."""
    ((params, norms, kept, fallbacks),) = run(1, trained_by_zero, ours, stage, torch.bfloat16, timeout=400)
    ((expected, expected_norms, _, _),) = run(
        1, trained_by_zero, torch_adamw, stage, torch.bfloat16, timeout=400
    )
    torch.testing.assert_close(params, expected, rtol=2.0**-7, atol=1e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-2, atol=0)
    assert kept == {("cpu", torch.float32)}
    assert not fallbacks
