"""The races on a GPU: a command that writes JSON after each, and can be started again for the rest.

A fault on the device spoils every later call of its process. The command then ends, and whoever started it
starts it again: races that it has been through are in the file and are left out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..cases import Case, Race
from ..equality import check_equal_results
from ..peers import make_peers, ours
from ..problem import Problem
from ..report.results import Result, evaluate
from ..timing import Bandwidth, InterleavedTimer, bandwidth
from .races import GPU_RACES, NATIVE_OVER_TRITON
from .run import describe

PEERS = ("fused", "fused+grad_scale")
# What a problem and the check of equal results need, in tensors the size of the parameters.
TENSORS_HELD = 11
#: Exit code: a fault on the device; races are left.
BROKEN = 75


@dataclass
class Table:
    """The file that the command writes.

    Attributes:
        path: Where it is.
        bandwidth: Of the memory, in bytes per second.
        results: Fields of `Result`, for each peer of each race.
        errors: By race, or race and peer: why it was not timed.
        begun: Races begun; all but the last are over.
    """

    path: Path
    bandwidth: dict[str, float] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    is_over: bool = True

    @classmethod
    def load(cls, path: Path) -> Table:
        """What is there. A race that was begun and not ended took its process with it, which is noted."""
        if not path.exists():
            return cls(path)
        table = cls(path, **json.loads(path.read_text()))
        if not table.is_over:
            table.errors[table.begun[-1]] = "the process ended"
            table.is_over = True
        return table

    def save(self) -> None:
        """Write the file."""
        fields = asdict(self)
        del fields["path"]
        self.path.write_text(json.dumps(fields))


def _race(
    problem: Problem, race: Race, backends: Sequence[str], memory: Bandwidth, seconds: float, turn: float
) -> tuple[list[Result], dict[str, str]]:
    """The results; and, by name, why a peer was not timed: it failed, or computes something else."""
    mine = [ours(problem, clip=race.clip, backend=backend, name=backend) for backend in backends]
    peers = {peer.name: peer for peer in (*mine, *make_peers(problem, PEERS, clip=race.clip, backends=()))}
    errors = {}
    for name in [name for name in peers if name != "fused"]:
        try:
            check_equal_results(problem, [peers[name], peers["fused"]])
        except Exception as error:  # one peer must not take the others with it
            errors[f"{race.name}/{name}"] = describe(error)
            del peers[name]
    present = [backend for backend in backends if backend in peers]
    if not present:
        return [], errors
    timer = InterleavedTimer(
        {name: peer.step for name, peer in peers.items()},
        problem.device,
        turn_seconds=turn,
        before=problem.before_step(race.gradients),
    )
    timer.run(seconds, least=3, most=60)
    results = []
    for backend in present:
        targets = dict(race.target_ratios)
        if backend == "triton" and race.target_copy_fraction is not None:
            targets["native"] = NATIVE_OVER_TRITON
        rivals = [name for name in timer.turns if name not in present]
        rivals += ["native"] * (backend != "native" and "native" in timer.turns)
        results += evaluate(
            replace(race, target_ratios=targets),
            {name: timer.turns[name] for name in (backend, *rivals)},
            memory,
            ours=backend,
            best=False,
        )
    return results, errors


def _bandwidth(table: Table, device: torch.device, numel: int | None) -> Bandwidth:
    """Of a copy at least: that of the stream takes Triton, whose fault must not take the races with it."""
    try:
        return bandwidth(device, numel)
    except Exception as error:
        table.errors["stream bandwidth"] = describe(error)
        return bandwidth(device, numel, stream=False)


def _check_fits(case: Case, device: torch.device) -> None:
    if device.type == "cuda":
        needed, free = TENSORS_HELD * case.bytes_moved(1), torch.cuda.mem_get_info(device)[0]
        if needed >= free:
            raise MemoryError(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")


def _is_broken(device: torch.device) -> bool:
    """Whether the device answers no more."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


def run(table: Table, backends: Sequence[str], device: torch.device, seconds: float, dry_run: bool) -> bool:
    """Run the races that were not begun; False if the device broke and some are left."""
    end = time.monotonic() + seconds
    if table.bandwidth is None:
        table.bandwidth = asdict(_bandwidth(table, device, 1 << 16 if dry_run else None))
    memory = Bandwidth(**table.bandwidth)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    races = [gpu_race.on(name) for gpu_race in GPU_RACES]
    races = [race for race in races if race.name not in table.begun]
    if dry_run:
        races = [race.tiny() for race in races]
    remaining = len(races)
    for case, members in itertools.groupby(races, key=lambda race: race.case):
        problem = None
        for race in members:
            share = (end - time.monotonic()) / remaining
            if share < 1.0 and not dry_run:
                return True  # the rest is not begun
            remaining -= 1
            table.begun.append(race.name)
            table.is_over = False
            table.save()
            try:
                if problem is None:
                    _check_fits(case, device)
                    problem = Problem(case, device)
                limits = (0.0, 0.001) if dry_run else (0.5 * share, 0.05)
                results, errors = _race(problem, race, backends, memory, *limits)
                table.results += map(asdict, results)
                table.errors |= errors
            except Exception as error:  # one race must not take the others with it
                table.errors[race.name] = describe(error)
            table.is_over = True
            table.save()
            if _is_broken(device):
                return remaining == 0
        del problem
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.table", description=__doc__.split("\n")[0]
    )
    parser.add_argument("backends", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--seconds", type=float, default=120.0, help="time for all races [120]")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    table = Table.load(args.out)
    return 0 if run(table, args.backends, args.device, args.seconds, args.dry_run) else BROKEN


if __name__ == "__main__":
    raise SystemExit(main())
