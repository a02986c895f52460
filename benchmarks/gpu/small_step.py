"""A few small steps, to be run under compute-sanitizer, or one large step of each backend under ncu."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..cases import Case
from ..equality import check_equal_results
from ..peers import make_peers
from ..problem import Problem

# Around the chunks of either backend, and tensors whose ends are not aligned.
BORDERS = Case("borders", tuple((n,) for n in (1, 3, 7, 4095, 4097, 8191, 8192, 8193, 3 * 8192 + 7)))
LARGE = 1 << 26


def check(backends: tuple[str, ...], device: torch.device) -> None:
    """Step small tensors of each dtype, with and without a clip, and compare with torch."""
    for dtype in (torch.float32, torch.bfloat16):
        for clip in (True, False):
            problem = Problem(replace(BORDERS, dtype=dtype), device)
            check_equal_results(problem, list(make_peers(problem, ("fused",), clip=clip, backends=backends)))


def profile(backends: tuple[str, ...], device: torch.device, numel: int) -> None:
    """One step of each backend for the profiler, after one that it does not see."""
    problem = Problem(Case("one tensor", ((numel,),)), device)
    for peer in make_peers(problem, (), clip=True, backends=backends):
        peer.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        peer.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_step", description=__doc__)
    parser.add_argument("backends", nargs="+")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--profile", action="store_true", help="one large step of each backend")
    parser.add_argument("--numel", type=int, default=LARGE, help="its values [64M]")
    args = parser.parse_args(argv)
    if args.profile:
        profile(tuple(args.backends), args.device, args.numel)
    else:
        check(tuple(args.backends), args.device)


if __name__ == "__main__":
    main()
