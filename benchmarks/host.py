"""Where the host's time goes in a step on the CPU: what each part takes, warm and after another optimizer."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from fused_adamw import FusedHygieneAdamW

from .provenance import provenance

ROUNDS = 300


def parts(optimizer: FusedHygieneAdamW) -> dict[str, Callable[[], object]]:
    """The parts of a step that finds nothing changed, in their order; the last is a whole step."""
    optimizer.step()
    plan = optimizer._plan
    assert plan is not None
    groups, state = optimizer.param_groups, optimizer.state
    grads = plan.check(groups, state)
    assert grads is not None
    ((bucket, _, status),) = plan.launches
    plan.sum_of_squares(())
    sums = plan.totals(True, None, None)[0][bucket.device]
    return {
        "check state, parameters, gradients": lambda: plan.check(groups, state),
        "gradient addresses, hypers": lambda: plan.prepare(optimizer._hypers(), grads),
        "norm": lambda: plan.sum_of_squares(()),
        "update": lambda: bucket.update((), optimizer._step_inputs(sums, None, status)),
        "version counters": lambda: torch.autograd.graph.increment_version(plan.stepped),
        "step": optimizer.step,
    }


def medians(
    parts: Mapping[str, Callable[[], object]], before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median time of each part in microseconds; `before` runs before each round of parts."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        before()
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * median(t) for name, t in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--tensors", type=int, default=500)
    parser.add_argument("--numel", type=int, default=1, help="values per tensor")
    args = parser.parse_args(argv)

    def tensors() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(args.numel)) for _ in range(args.tensors)]
        for p in made:
            p.grad = torch.randn(args.numel)
        return made

    peer = torch.optim.AdamW(others := tensors(), fused=True)

    def other_optimizer() -> None:
        torch.nn.utils.clip_grad_norm_(others, 1.0, foreach=True)
        peer.step()

    mine = parts(FusedHygieneAdamW(tensors(), max_grad_norm=1.0))
    whole = {"step": mine.pop("step")}
    warm = medians(mine) | medians(whole)
    cold = medians(mine, other_optimizer) | medians(whole, other_optimizer)
    theirs = medians({"": other_optimizer})[""]
    print(f"{args.tensors} tensors of {args.numel}, median of {ROUNDS}, µs")
    print(f"{'':40}{'warm':>8}{'after a peer':>14}")
    for name in warm:
        print(f"{name:40}{warm[name]:8.1f}{cold[name]:14.1f}")
    print(f"{'clip_grad_norm_ + fused AdamW':40}{theirs:8.1f}")
    print("; ".join(f"{key}: {value}" for key, value in provenance(torch.device("cpu")).items() if value))


if __name__ == "__main__":
    main()
