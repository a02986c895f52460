"""Optimizers that live on the CPU, in several processes: parameters, gradients and moments in host memory."""

import pytest
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from fused_adamw import FusedHygieneAdamW

from .models import OPTIONS, Net, full_params, train
from .ranks import run
from .test_strategies import assert_as_alone

STEPS = 4


def fsdp2_with_offload():
    model = Net()
    for layer in model.children():
        fully_shard(layer, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = FusedHygieneAdamW(model, **OPTIONS)
    norms = train(model, optimizer, STEPS, after=lambda: optimizer.grad_norm.item())
    devices = {state["exp_avg"].device.type for state in optimizer.state.values()}
    return full_params(model), norms, optimizer._plan.fallbacks, devices


@pytest.mark.parametrize("world_size", [1, 2])
def test_fsdp2_with_cpu_offload(world_size):
    for params, norms, fallbacks, devices in run(world_size, fsdp2_with_offload):
        assert_as_alone(params, norms)
        assert not fallbacks
        assert devices == {"cpu"}
