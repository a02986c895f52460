"""Build, test, check and measure on a machine with a GPU, in calls of under ten minutes.

    python -m benchmarks.gpu_acceptance --out DIR --call 1  # build, first tests: five minutes
    python -m benchmarks.gpu_acceptance --out DIR --call 2  # all tests, launches, compute-sanitizer
    python -m benchmarks.gpu_acceptance --out DIR --call 3  # races against torch, profiler

Run it from the root of the repository, with that machine's own Python, torch and Triton; nothing is fetched.
`--stages` runs stages by name; without either, one call runs all but `smoke`. DIR gets four files:
acceptance.json, logs.tgz and two pictures. The first two are complete after every stage up to that stage, and
a later call continues them. Exit code: 0 if everything passed and every target was reached, 1 if not, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .gpu.run import Run, describe
from .gpu.stages import STAGES
from .gpu.summary import summarize
from .report.results import print_table
from .report.sessions import Session

#: Seconds and stages of each call. Every call builds: a machine may be another one than before.
CALLS = {
    1: (300, ("build", "smoke")),
    2: (540, ("build", "tests", "launches", "sanitize")),
    3: (540, ("build", "table", "ncu")),
}
PROBE_SECONDS = 60


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--call", type=int, choices=CALLS, help="the stages of one call")
    which.add_argument("--stages", nargs="+", choices=STAGES, help="only these, in their order")
    parser.add_argument("--seconds", type=float, help="time for all stages [540; call 1: 300]")
    parser.add_argument("--commit", help="the commit, where the source came without a repository")
    parser.add_argument(
        "--dry-run", action="store_true", help="with few values and no targets: tries the script"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[cuda; in a dry run cpu]")
    args = parser.parse_args(argv)
    seconds, stages = CALLS.get(args.call, (540, [name for name in STAGES if name != "smoke"]))
    args.seconds = args.seconds or seconds
    args.stages = [name for name in STAGES if name in (args.stages or stages)]
    args.device = args.device or ("cpu" if args.dry_run else "cuda")
    return args


def run_stages(run: Run, names: Sequence[str], seconds: float) -> None:
    """Run stages; each may take what the next ones do not need."""
    end = time.monotonic() + seconds
    for i, name in enumerate(names):
        needed_later = sum(STAGES[later][1] for later in names[i + 1 :])
        run.run(name, STAGES[name][0], max(end - needed_later - time.monotonic(), 1.0))


def _draw(run: Run) -> None:
    session = Session(run.payload(), run.results)
    try:
        from .report.pictures import plot_ratios, plot_roofline  # needs matplotlib, which may be missing

        plot_ratios(session, run.out / "ratios.png")
        plot_roofline(session, run.out / "roofline.png")
    except Exception as error:  # the numbers are there
        print(f"no pictures: {describe(error)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; see the module's docstring."""
    args = _parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="acceptance-") as logs:
        return _main(args, Run(args.out.resolve(), args.device, args.commit, args.dry_run, logs=Path(logs)))


def _main(args: argparse.Namespace, run: Run) -> int:
    run.deadline = time.monotonic() + PROBE_SECONDS
    run.probe()
    if not run.machine["is_there"]:
        print(
            "gpu_acceptance: torch sees no CUDA device here; nothing was run. (--dry-run tries the script.)"
        )
        return 2
    if run.resume():
        print(f"Continuing {run.out / 'acceptance.json'}: {', '.join(run.stages)}")
    run_stages(run, args.stages, args.seconds)

    payload = run.payload()
    if run.results:
        print_table(run.results, f"Clip + step on {payload['device']}, torch {payload['torch']}")
        _draw(run)
    print(", ".join(f"{key} {payload[key]}" for key in ("device", "driver", "torch", "triton", "commit")))
    print("\n".join(summarize(run)))
    print(run.out / "acceptance.json")
    return 0 if all(run.stages[name]["ok"] for name in args.stages) else 1


if __name__ == "__main__":
    raise SystemExit(main())
