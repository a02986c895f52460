"""A small model, data, and a training loop with a loss that is a mean over all processes' data."""

import torch
import torch.distributed as dist
from torch import nn

from fused_adamw import FusedHygieneAdamW

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.3}
BATCH = 4  # rows for each process


class Net(nn.Module):
    """Dimensions that neither 2 nor 4 divide; matrices, biases, a norm, and a bare vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.gain * self.down(self.norm(torch.tanh(self.up(x))))


def batch(step, rank, world_size):
    """The rows of one process, of data that is the same for any number of processes."""
    x = torch.randn(4 * BATCH, 6, generator=torch.Generator().manual_seed(step))
    n = len(x) // world_size
    return x[rank * n : (rank + 1) * n]


def train(model, optimizer, steps, first=0, after=None, device="cpu", replicas=None):
    """Steps of training; what `after` returns after each."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if replicas is not None:
        rank, world_size = replicas
    found = []
    for step in range(first, first + steps):
        model(batch(step, rank, world_size).to(device)).square().mean().backward()
        optimizer.step()
        found.append(None if after is None else after())
        optimizer.zero_grad()
    return found


def alone(steps, make=FusedHygieneAdamW, **options):
    """Training in one process: parameters by name, and norms."""
    model = Net()
    optimizer = make(model, **OPTIONS | options)
    norms = train(model, optimizer, steps, after=lambda: optimizer.grad_norm.item())
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def full_params(model):
    """The whole of each parameter, by name."""
    return {
        name: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()
        for name, p in model.named_parameters()
    }
