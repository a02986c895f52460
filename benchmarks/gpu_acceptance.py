"""One command for a machine with a GPU: build, test, check and measure, in under eight minutes.

    python -m benchmarks.gpu_acceptance --out DIR

Run it from the root of the repository, with that machine's own Python, torch and Triton; nothing is fetched.
DIR gets acceptance.json, which is complete after every stage up to that stage, two pictures, and the log of
every command. Exit code: 0 if everything passed and every target was reached, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from fused_adamw.backends import why_not

from .cases import GPU_RACES, MANY, RESNET50, VIT_B, WANTED_NATIVE_OVER_TRITON, Case, Race
from .equality import check_equal_results
from .measure import Bandwidth, Heat, bandwidth
from .peers import Problem, line_up, ours
from .pictures import plot_ratios, plot_roofline
from .provenance import ROOT, provenance
from .results import Result, evaluate, print_table, to_json, write_json

# How far into the run, in seconds, each stage may go; what one leaves over, the next ones have.
STAGES = {"build": 100, "tests": 210, "sanitize": 280, "launches": 300, "table": 430, "ncu": 460}
PEERS = ("fused", "trick")
# Processes that share out the tests; seconds that are kept for the large ones, and that a command has, once
# interrupted, to say what it found.
TEST_PROCESSES = 8
LARGE_TESTS = 35
GRACE = 10
# What a problem and the check of equal results need, in tensors the size of the parameters.
TENSORS_HELD = 11
NCU_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "dram_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass
class Acceptance:
    """A run: what it is given, and what it has found so far."""

    out: Path
    device: torch.device
    commit: str | None
    dry_run: bool
    start: float = field(default_factory=time.monotonic)
    deadline: float = 0.0
    bandwidth: Bandwidth | None = None
    results: list[Result] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds left for the stage that runs."""
        return self.deadline - time.monotonic()

    @property
    def backends(self) -> tuple[str, ...]:
        """Ours, as far as they can run here."""
        wanted = ("native", "reference") if self.dry_run else ("native", "triton")
        return tuple(backend for backend in wanted if why_not(backend, self.device) is None)

    def run(self, name: str, stage: Callable[[Acceptance], dict[str, Any]], until: float) -> None:
        """Run a stage; whatever happens, note it and write what there is."""
        self.deadline = self.start + until
        began = time.monotonic()
        print(f"[{began - self.start:4.0f} s] {name}", flush=True)
        try:
            found = stage(self)
        except Exception as error:  # one stage must not take the others with it
            found = {"ok": False, "error": _said(error)}
        self.stages[name] = {**found, "seconds": round(time.monotonic() - began, 1)}
        self.save()

    def command(self, log: str, *command: str | Path, **environment: str) -> tuple[int | None, str]:
        """Run a command in what time is left; its exit code, None if it ran out of time, and output."""
        path = self.out / f"{log}.log"
        with path.open("w") as file:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell starts what it runs in the background with interrupts ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            code: int | None
            try:
                code = process.wait(timeout=max(self.left, 1.0))
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(process.pid, signal.SIGINT)  # pytest then reports what has failed so far
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the children that it started
                process.wait()
        return code, path.read_text(errors="replace")

    def payload(self) -> dict[str, Any]:
        """Everything found so far."""
        memory = self.bandwidth
        return to_json(
            self.results,
            provenance(self.device, self.commit),
            dry_run=self.dry_run,
            backends=list(self.backends),
            bandwidth=memory and {"copy_gbps": memory.copy / 1e9, "stream_gbps": memory.stream / 1e9},
            stages=self.stages,
        )

    def save(self) -> None:
        """Write acceptance.json."""
        write_json(self.out / "acceptance.json", self.payload())


def build(run: Acceptance) -> dict[str, Any]:
    """Build the extension in place, for this GPU."""
    environment = {}
    if run.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(run.device)
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    code, _ = run.command("build", sys.executable, "setup.py", "build_ext", "--inplace", **environment)
    missing = why_not("native", run.device)  # no nvcc: a build without CUDA, which is no failure of the build
    return {"ok": code == 0 and missing is None, "exit_code": code, "native": missing or "available"}


def _pytest(run: Acceptance, log: str, markers: str, *options: str) -> dict[str, Any]:
    report = run.out / f"{log}.xml"
    code, output = run.command(
        log,
        *(sys.executable, "-m", "pytest", "tests", "-m", markers, *options, f"--junit-xml={report}"),
        *("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"),
        TRITON_INTERPRET="0",  # the tests interpret Triton unless they are told not to
    )
    found: dict[str, Any] = {
        "ok": code == 0,
        "exit_code": code,
        "last_line": (output.splitlines() or [""])[-1],
    }
    if report.exists():
        suite = next(ElementTree.parse(report).iter("testsuite"))
        found |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        found["ok"] = code == 0 and (run.dry_run or found["tests"] > found["skipped"])
        found["failed"] = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    return found


def gpu_tests(run: Acceptance) -> dict[str, Any]:
    """Run the tests marked gpu, in several processes where pytest-xdist is; the large ones one by one."""
    has_xdist = importlib.util.find_spec("xdist") is not None
    end = run.deadline
    run.deadline = end - LARGE_TESTS
    found = _pytest(run, "tests", "gpu and not large", *["-n", str(TEST_PROCESSES)] * has_xdist)
    run.deadline = end
    large = _pytest(run, "tests-large", "gpu and large")
    return {**found, "ok": found["ok"] and large["ok"], "large": large}


def sanitize(run: Acceptance) -> dict[str, Any]:
    """Run compute-sanitizer on a small case, where it is installed; without, the small case alone."""
    small = [sys.executable, "-m", "benchmarks.small_step", *run.backends, f"--device={run.device}"]
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None or run.device.type != "cuda":
        code, _ = run.command("small_step", *small)
        return {"ok": code == 0, "exit_code": code, "skipped": "no compute-sanitizer, or no GPU"}
    found: dict[str, Any] = {}
    end = run.deadline
    # Calls that fail are torch's probes, which it expects to fail; those of ours raise.
    quiet = ("--report-api-errors", "no")
    for tool, options, until in (
        ("memcheck", quiet, (time.monotonic() + end) / 2),
        ("racecheck", (), end),
    ):
        run.deadline = until
        code, output = run.command(
            tool,
            *(sanitizer, "--tool", tool, *options, "--error-exitcode", "9", "--print-limit", "20", *small),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # an allocation of its own for every tensor
        )
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", output)
        found[tool] = {"exit_code": code, "summary": summary[-1] if summary else None}
    return {"ok": all(result["exit_code"] == 0 for result in found.values()), **found}


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
    (peer,) = line_up(problem, (), clip=clip, backends=(backend,))
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


def _launched(run: Acceptance, problem: Problem, backend: str, clip: bool) -> dict[str, Any]:
    (peer,) = line_up(problem, (), clip=clip, backends=(backend,))
    for _ in range(3):
        peer.step()
    seen = activity(peer.step)
    wanted = 2 if clip else 1
    ok = run.dry_run or (0 < seen["kernels"] <= wanted and seen["copies"] == 0)
    row: dict[str, Any] = {**seen, "wanted_kernels": wanted, "wanted_copies": 0}
    if run.device.type == "cuda":
        row["synchronises"] = synchronises(problem, backend, clip)
        ok = ok and row["synchronises"] is None
    return {**row, "ok": ok}


def launches(run: Acceptance) -> dict[str, Any]:
    """Count what a step launches and copies, and see that the host never waits."""
    rows, errors = [], {}
    for case in (RESNET50, VIT_B, MANY):
        problem = Problem(case.tiny() if run.dry_run else case, run.device)
        for backend, clip in itertools.product(run.backends, (True, False)):
            try:
                row = _launched(run, problem, backend, clip)
                rows.append({"case": case.name, "backend": backend, "clip": clip, **row})
            except Exception as error:  # one backend must not take the other with it
                errors[f"{case.name}/{backend}/{'clip+step' if clip else 'step'}"] = _said(error)
    return {
        "ok": bool(rows) and not errors and all(row["ok"] for row in rows),
        "rows": rows,
        "errors": errors,
    }


def _race(
    run: Acceptance, problem: Problem, race: Race, seconds: float
) -> tuple[list[Result], dict[str, str]]:
    """The results; and, by name, why a contestant was not timed: it failed, or computes something else."""
    mine = [ours(problem, clip=race.clip, backend=backend, name=backend) for backend in run.backends]
    peers = {peer.name: peer for peer in (*mine, *line_up(problem, PEERS, clip=race.clip, backends=()))}
    errors = {}
    for name in [name for name in peers if name != "fused"]:
        try:
            check_equal_results(problem, [peers[name], peers["fused"]])
        except Exception as error:  # one contestant must not take the others with it
            errors[f"{race.name}/{name}"] = _said(error)
            del peers[name]
    backends = [backend for backend in run.backends if backend in peers]
    if not backends:
        return [], errors
    heat = Heat(
        {name: peer.step for name, peer in peers.items()},
        run.device,
        turn_seconds=0.001 if run.dry_run else 0.05,
        before=problem.move_gradients if race.moved_grads else None,
    )
    heat.run(seconds, least=3, most=60)
    assert run.bandwidth is not None
    results = []
    for backend in backends:
        wanted = dict(race.wanted)
        if backend == "triton" and race.wanted_copy_fraction is not None:
            wanted["native"] = WANTED_NATIVE_OVER_TRITON
        rivals = [name for name in heat.turns if name not in backends]
        rivals += ["native"] * (backend != "native" and "native" in heat.turns)
        results += evaluate(
            replace(race, wanted=wanted),
            {name: heat.turns[name] for name in (backend, *rivals)},
            run.bandwidth,
            ours=backend,
            best=False,
        )
    return results, errors


def _fits(case: Case, device: torch.device) -> bool:
    needed = TENSORS_HELD * case.bytes_moved(1)
    return device.type != "cuda" or needed < torch.cuda.mem_get_info(device)[0]


def table(run: Acceptance) -> dict[str, Any]:
    """Run the races; each is equal first and timed then."""
    run.bandwidth = bandwidth(run.device, 1 << 16 if run.dry_run else None)
    races = [race.tiny() if run.dry_run else race for race in GPU_RACES]
    errors: dict[str, str] = {}
    remaining = len(races)
    for case, members in itertools.groupby(races, key=lambda race: race.case):
        problem = None
        for race in members:
            share = run.left / remaining
            remaining -= 1
            try:
                if share < 1.0 and not run.dry_run:
                    raise TimeoutError("no time was left")
                if problem is None:
                    if not _fits(case, run.device):
                        raise MemoryError("does not fit into the memory of the device")
                    problem = Problem(case, run.device)
                seconds = 0.0 if run.dry_run else 0.5 * share
                results, failed = _race(run, problem, race, seconds)
                run.results += results
                errors |= failed
            except Exception as error:  # one race must not take the others with it
                errors[race.name] = _said(error)
            run.save()
        del problem
        gc.collect()
        torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    missed = [result.name for result in run.results if result.reached is False]
    return {"ok": not errors and not missed, "missed": missed, "errors": errors}


def ncu(run: Acceptance) -> dict[str, Any]:
    """Profile one large step of each backend with Nsight Compute, where it is installed."""
    tool = shutil.which("ncu", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None or run.device.type != "cuda":
        return {"ok": True, "skipped": "no ncu, or no GPU"}
    code, output = run.command(
        "ncu",
        *(tool, "--csv", "--clock-control", "none", "--profile-from-start", "off"),
        *("--metrics", ",".join(NCU_METRICS)),
        *(sys.executable, "-m", "benchmarks.small_step", *run.backends, "--profile"),
    )
    kernels: dict[str, dict[str, str]] = {}
    if (header := output.find('"ID"')) >= 0:
        for row in csv.DictReader(io.StringIO(output[header:])):
            name = NCU_METRICS.get(row.get("Metric Name") or "")
            if name is not None:
                kernel = kernels.setdefault(f"{row['ID']} {row['Kernel Name']}", {})
                kernel[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    # It needs permission to read the counters: no failure of ours where that is missing.
    return {"ok": True, "exit_code": code, "kernels": kernels}


_STAGE_FUNCTIONS = {
    "build": build,
    "tests": gpu_tests,
    "sanitize": sanitize,
    "launches": launches,
    "table": table,
    "ncu": ncu,
}


def summarize(run: Acceptance) -> list[str]:
    """A few lines: what was run, what passed, what was missed."""
    lines = []
    for name, found in run.stages.items():
        words = "ok" if found["ok"] else "FAILED"
        if "skipped" in found and isinstance(found["skipped"], str):
            words += f" ({found['skipped']})"
        if name == "build" and "native" in found:
            words += f": native {found['native']}"
        if name == "tests" and "last_line" in found:
            words += f": {found['last_line']}; large: {found['large']['last_line']}"
        if name == "sanitize":
            words += "".join(
                f"; {tool}: {found[tool]['summary']}" for tool in ("memcheck", "racecheck") if tool in found
            )
        if name == "launches" and found.get("rows"):
            worst = max(found["rows"], key=lambda row: (row["kernels"], row["copies"]))
            words += f": at most {worst['kernels']:g} kernels and {worst['copies']:g} copies per step"
            waits = [row for row in found["rows"] if row.get("synchronises")]
            words += f"; the host waits in {len(waits)} of {len(found['rows'])} cases"
        if name == "table" and "missed" in found:
            judged = [result for result in run.results if result.reached is not None]
            words += f": {len(judged) - len(found['missed'])} of {len(judged)} targets reached"
            words += "".join(f"\n           missed {name}" for name in found["missed"])
        words += "".join(f"\n           {what}: {error}" for what, error in found.get("errors", {}).items())
        if "error" in found:
            words += f": {found['error']}"
        lines.append(f"{name:9}{found['seconds']:6.1f} s  {words}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_acceptance", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these")
    parser.add_argument("--commit", help="the commit, where the source came without a repository")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, with tiny sizes: tries the script"
    )
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            "gpu_acceptance: torch sees no CUDA device here; nothing was run. (--dry-run tries the script.)"
        )
        return 2
    device = torch.device("cpu" if args.dry_run else "cuda")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Acceptance(args.out.resolve(), device, args.commit, args.dry_run)
    for name in STAGES:
        if name in args.stages:
            run.run(name, _STAGE_FUNCTIONS[name], STAGES[name])

    payload = run.payload()
    if run.results:
        print_table(run.results, f"Clip + step on {payload['device']}, torch {payload['torch']}")
    print(", ".join(f"{key} {payload[key]}" for key in ("device", "driver", "torch", "triton", "commit")))
    print("\n".join(summarize(run)))
    if run.results:
        try:
            plot_ratios(run.results, payload, run.out / "ratios.png")
            plot_roofline(run.results, payload, run.out / "roofline.png")
        except Exception as error:  # the numbers are there
            print(f"no pictures: {_said(error)}")
    print(run.out / "acceptance.json")
    return 0 if all(found["ok"] for found in run.stages.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
