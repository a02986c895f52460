"""Where the host's time goes in a step on the CPU: each part of a step, timed while steps run.

Three columns: gradients that keep their addresses; gradients that have others at every step; and a training
loop, where forward and backward have made new ones and evicted all else from the caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fused_adamw.step.guard import Found
from fused_adamw.step.launch import TableBucket
from fused_adamw.step.plan import Plan

from .cases import SCALARS, TRAIN_MANY, Case, Gradients
from .peers import fused, ours
from .problem import Problem
from .provenance import provenance
from .report.sessions import write_csv
from .timing import threads

#: The parts of a step, in their order, by the function that does each.
PARTS: dict[str, tuple[Any, str]] = {
    "check state, parameters, gradients": (Plan, "check"),
    "gradient addresses, hyper-parameters": (Plan, "prepare"),
    "norm": (Plan, "sum_of_squares"),
    "version counters": (Found, "count_changes"),
    "update": (TableBucket, "update"),
}
WHOLE, PEER = "the whole step, with torch's hooks around it", "torch: `clip_grad_norm_` + fused AdamW"
COLUMNS: dict[str, tuple[Case, Gradients]] = {
    "gradients stay": (SCALARS, "kept"),
    "gradients move": (SCALARS, "moved"),
    "training loop": (TRAIN_MANY, "new"),
}


@contextmanager
def parts_timed(spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds that each part takes to `spent`."""
    originals = {part: getattr(owner, name) for part, (owner, name) in PARTS.items()}

    def timed(part: str) -> Callable[..., Any]:
        function = originals[part]

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] = spent.get(part, 0.0) + time.perf_counter() - start

        return call

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, timed(part))
    try:
        yield
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])


def column(case: Case, gradients: Gradients, rounds: int) -> dict[str, float]:
    """Median microseconds of each part of a step, of the whole of it, and of torch's clip and step."""
    problem = Problem(case, torch.device("cpu"))
    before = problem.before_step(gradients) or (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in (*PARTS, WHOLE, PEER)}

    def time_whole(name: str, step: Callable[[], object]) -> None:
        before()
        start = time.perf_counter()
        step()
        times[name].append(time.perf_counter() - start)

    step = ours(problem, clip=True).step
    for _ in range(3):
        before()
        step()
    for _ in range(rounds):  # the whole step without the timers inside it
        time_whole(WHOLE, step)
    for _ in range(rounds):
        spent: dict[str, float] = {}
        before()
        with parts_timed(spent):
            step()
        for name in PARTS:
            times[name].append(spent[name])
    peer = fused(problem, clip=True).step
    for _ in range(rounds):
        time_whole(PEER, peer)
    return {name: 1e6 * median(t) for name, t in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, on one thread, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="steps of which the median is taken [300]")
    parser.add_argument("--out", type=Path, help="a CSV file to write")
    args = parser.parse_args(argv)
    with threads(1):
        found = {name: column(*what, args.rounds) for name, what in COLUMNS.items()}
    parts = (*PARTS, WHOLE, PEER)
    rows = [{"part": part, **{name: times[part] for name, times in found.items()}} for part in parts]
    print(f"500 tensors, one thread, median of {args.rounds}, µs")
    print(f"{'':46}" + "".join(f"{name:>16}" for name in COLUMNS))
    for row in rows:
        print(f"{row['part']:46}" + "".join(f"{row[name]:16.1f}" for name in COLUMNS))
    if args.out is not None:
        write_csv(args.out, {**provenance(torch.device("cpu")), "rounds": args.rounds}, rows)


if __name__ == "__main__":
    main()
