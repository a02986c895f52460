"""Several processes that train one model, as torchrun starts them: who they are and how they share the work.

Every rank takes its share of every batch, so all of them together see the batches of one process, in the same
order. With `ddp` each holds the whole model; with `fsdp2` its shard of every parameter, gradient and moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

STRATEGIES = ("ddp", "fsdp2")
SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; without a strategy, one process on its own."""

    strategy: str | None = None
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, draws and writes."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """Return the device of this rank, of the kind asked for.

        Raises:
            ValueError: All ranks were given the same GPU, or there is none for this one.
        """
        if self.strategy is None or torch.device(asked).type != "cuda":
            return asked
        count = torch.cuda.device_count()
        if ":" in asked:
            raise ValueError(f"every process takes a GPU of its own: --device cuda instead of {asked}")
        if self.local_rank >= count:
            raise ValueError(f"process {self.local_rank} of this machine has no GPU of its own among {count}")
        return f"cuda:{self.local_rank}"

    def share(self, batch: Tensor) -> Tensor:
        """Return this rank's part of a batch, whose length the number of ranks divides."""
        return batch.chunk(self.size)[self.rank]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what to call in training: it averages the gradients over the ranks.

        `fsdp2` replaces the parameters of `model` by DTensors: build the optimizer afterwards, from `model`.
        """
        device = next(model.parameters()).device
        if self.strategy == "ddp":
            return DistributedDataParallel(model, gradient_as_bucket_view=True)
        if self.strategy == "fsdp2":
            mesh = init_device_mesh(device.type, (self.size,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def mean(self, values: Tensor) -> Tensor:
        """Average over the ranks, in float64; every rank gets the same numbers."""
        if self.strategy is None:
            return values
        values = values.double()
        dist.all_reduce(values)
        return values / self.size


def launched(strategy: str | None) -> Ranks:
    """Read from the environment who this process is.

    Raises:
        ValueError: There is a strategy and no launcher, or there are several processes and no strategy.
    """
    if strategy is None:
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size > 1:
            raise ValueError(
                f"{size} processes were started: say how they share the work, {' or '.join(STRATEGIES)}"
            )
        return Ranks()
    missing = [name for name in SET_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set. Start the processes with torchrun: "
            f"torchrun --nproc-per-node 2 examples/train.py --distributed {strategy}"
        )
    rank, local_rank, size = (int(os.environ[name]) for name in SET_BY_TORCHRUN[:3])
    return Ranks(strategy, rank, local_rank, size)


@contextmanager
def joined(ranks: Ranks, device: str) -> Iterator[None]:
    """Join the other ranks for the length of the `with`, in which only the first one has an output."""
    if ranks.strategy is None:
        yield
        return
    gpu = torch.device(device) if device.startswith("cuda") else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group("gloo" if gpu is None else "nccl", device_id=gpu)
    try:
        if ranks.first:
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield
    finally:
        dist.destroy_process_group()


def whole(value: Tensor) -> Tensor:
    """Return a norm of DTensors as a plain tensor; some versions of torch leave every rank a part of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
