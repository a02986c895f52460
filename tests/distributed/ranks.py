"""Runs a function in several processes that form a process group. All of it within a time limit."""

import datetime
import importlib
import multiprocessing
import pickle
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

# What the tests import: loaded once, in a server that the processes are forked from, instead of in each.
_PRELOADED = [
    "torch",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.fsdp.sharded_grad_scaler",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.optim",
    "torch._dynamo",
    "numpy",
    "pytest",
    "fused_adamw",
]
# How long others may go on after the first failure: they wait in a collective that it will not enter.
_GRACE = 1.0


class RanksFailed(AssertionError):
    """A process raised, died or was too slow."""


def run(world_size, function, *args, timeout=60.0, backend="gloo"):
    """Call `function(*args)` in each of `world_size` new processes, inside a process group.

    Args:
        world_size: Number of processes.
        function: At the top level of a module; it asks `torch.distributed` for its rank.
        args: Can be pickled, as must be what `function` returns.
        timeout: Seconds until all must be done; what still runs is killed.
        backend: Of the process group.

    Returns:
        What the function returned in each rank.

    Raises:
        RanksFailed: With the traceback of each rank that raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    name = (function.__module__, function.__qualname__)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], {}
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            job = (theirs, name, args, store, rank, world_size, timeout, backend)
            processes.append(context.Process(target=_work, args=job, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes[ours] = rank
        try:
            results, failures = _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
    if failures:
        raise RanksFailed("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
    return [results[rank] for rank in range(world_size)]


def _collect(pipes, deadline):
    """Results and failures by rank, until all are there or time is up."""
    results, failures = {}, {}
    waiting = dict(pipes)
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                succeeded, value = False, "died"
            (results if succeeded else failures)[rank] = value
        if failures:
            deadline = min(deadline, time.monotonic() + _GRACE)
        if not ready:
            failures.update(dict.fromkeys(waiting.values(), "still ran when time was up"))
            break
    return results, failures


def _work(pipe, name, args, store, rank, world_size, timeout, backend):
    import torch
    import torch.distributed as dist

    try:
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        function = getattr(importlib.import_module(name[0]), name[1])
        reply = (True, function(*args))
        reply = pickle.dumps(reply)
        dist.destroy_process_group()
    except BaseException:
        reply = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(reply)
