"""What a step launches and copies, and whether the host ever waits: a command that writes JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cases import MANY, RESNET50, VIT_B
from ..peers import make_peers
from ..problem import Problem
from .run import describe

CASES = (RESNET50, VIT_B, MANY)


def activity(step: Callable[[], object], steps: int = 4) -> dict[str, float]:
    """What one step makes the device do, by torch.profiler: kernels, copies, memsets; average of a few."""
    kinds = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=list(kinds)) as profiler:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    count = Counter(event.get("cat") for event in events)
    kernel_us = sum(event["dur"] for event in events if event.get("cat") == "kernel")
    return {
        "kernels": count["kernel"] / steps,
        "copies": count["gpu_memcpy"] / steps,
        "memsets": count["gpu_memset"] / steps,
        "kernel_ms": kernel_us * 1e-3 / steps,
    }


def synchronises(problem: Problem, backend: str, clip: bool) -> str | None:
    """None if steps never make the host wait: steady, with another learning rate, with moved gradients."""
    (peer,) = make_peers(problem, (), clip=clip, backends=(backend,))
    peer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        peer.step()
        for group in peer.optimizer.param_groups:
            group["lr"] *= 0.5
        peer.step()
        problem.move_gradients()
        peer.step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def count(problem: Problem, backend: str, clip: bool, dry_run: bool) -> dict[str, Any]:
    """The row of one case, backend and kind of step."""
    (peer,) = make_peers(problem, (), clip=clip, backends=(backend,))
    for _ in range(3):
        peer.step()
    seen = activity(peer.step)
    at_most = 2 if clip else 1
    # In a dry run the profiler sees no kernels.
    ok = dry_run or (0 < seen["kernels"] <= at_most and seen["copies"] == 0)
    row: dict[str, Any] = {**seen, "wanted_kernels": at_most, "wanted_copies": 0}
    if problem.device.type == "cuda":
        row["synchronises"] = synchronises(problem, backend, clip)
        ok = ok and row["synchronises"] is None
    return {**row, "ok": ok}


def look(backends: Sequence[str], device: torch.device, dry_run: bool) -> dict[str, Any]:
    """All rows; and, by name, why one is missing."""
    rows: list[dict[str, Any]] = []
    errors: dict[str, str] = {}
    for case in CASES:
        problem = Problem(case.tiny() if dry_run else case, device)
        for backend, clip in itertools.product(backends, (True, False)):
            try:
                row = count(problem, backend, clip, dry_run)
                rows.append({"case": case.name, "backend": backend, "clip": clip, **row})
            except Exception as error:  # one backend must not take the other with it
                errors[f"{case.name}/{backend}/{'clip+step' if clip else 'step'}"] = describe(error)
    return {"rows": rows, "errors": errors}


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.launches", description=__doc__)
    parser.add_argument("backends", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    args.out.write_text(json.dumps(look(args.backends, args.device, args.dry_run)))


if __name__ == "__main__":
    main()
