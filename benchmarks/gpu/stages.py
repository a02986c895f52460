"""The stages of a run: commands, and what is read from what they leave."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..provenance import ROOT
from ..report.sessions import to_result
from .races import GPU_RACES
from .run import FAILED, NOT_FINISHED, OK, Found, Run, status_of, worst

# No test of a GPU is in there.
WITHOUT_GPU_TESTS = ("groups", "integrations")
# Which tests to run first: what is most likely to be wrong, and worst.
FIRST_TESTS = ("test_cuda_graphs", "test_oracle", "test_clip", "test_amp")
# Processes that share out the tests; seconds that are kept for the large ones.
TEST_PROCESSES = 8
LARGE_TESTS = 35
NCU_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "dram_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/local/cuda/bin")


def build(run: Run) -> Found:
    """Build the extension in place, for this GPU, and say what can run."""
    environment = {}
    if capability := run.machine.get("capability"):
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*capability)
    code, _ = run.command("build", sys.executable, "setup.py", "build_ext", "--inplace", **environment)
    run.command("info", sys.executable, "-m", "fused_adamw", "info")
    run.probe()
    # Without nvcc, the build leaves CUDA out and succeeds.
    missing = run.machine["unavailable_reason"]["native"]
    status = FAILED if code == 0 and missing else status_of(code)
    return {"status": status, "exit_code": code, "native": missing or "available"}


def test_paths(*names: str) -> list[Path]:
    """The folders and files of tests/ that have tests of a GPU; or the files with these names."""
    if names:
        return sorted(path for path in (ROOT / "tests").rglob("test_*.py") if path.stem in names)
    entries = [path for path in (ROOT / "tests").iterdir() if path.name not in WITHOUT_GPU_TESTS]
    return sorted(path for path in entries if path.match("test_*.py") or any(path.rglob("test_*.py")))


def _pytest(run: Run, log: str, markers: str, *options: str | Path) -> Found:
    report = run.logs / f"{log}.xml"
    code, output = run.command(
        log,
        *(sys.executable, "-m", "pytest", "-m", markers, *options, f"--junit-xml={report}"),
        *("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"),
        TRITON_INTERPRET="0",  # the tests interpret Triton unless they are told not to
    )
    found: Found = {
        "status": status_of(code),
        "exit_code": code,
        "last_line": (output.splitlines() or [""])[-1],
    }
    if report.exists():
        suite = next(ElementTree.parse(report).iter("testsuite"))
        found |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "skipped")}
        found["broken"] = int(suite.get("errors", 0))
        found["failed"] = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        nothing_ran = not run.dry_run and found["tests"] == found["skipped"]
        if found["failed"] or (nothing_ran and code is not None):
            found["status"] = FAILED
    return found


def _processes() -> list[str]:
    return ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") is not None else []


def smoke(run: Run) -> Found:
    """A few small steps against torch's, then the tests to look at first."""
    code, output = run.module("small_step", "small_step", *run.backends, f"--device={run.device}")
    last = (output.strip().splitlines() or [""])[-1]
    tests = _pytest(run, "tests-first", "gpu and not large", *_processes(), *test_paths(*FIRST_TESTS))
    status = worst((status_of(code), tests["status"]))
    return {**tests, "status": status, "small_step": {"exit_code": code, "last_line": last if code else ""}}


def tests(run: Run) -> Found:
    """Run the tests marked gpu, in several processes where pytest-xdist is; the large ones one by one."""
    end = run.deadline
    run.deadline = end - LARGE_TESTS
    found = _pytest(run, "tests", "gpu and not large", *_processes(), *test_paths())
    run.deadline = end
    # Gigabytes take a GPU: a dry run only finds these tests.
    large = _pytest(run, "tests-large", "gpu and large", *["--collect-only"] * run.dry_run, *test_paths())
    return {**found, "status": worst((found["status"], large["status"])), "large": large}


def launches(run: Run) -> Found:
    """Count what a step launches and copies, and see that the host never waits."""
    file = run.logs / "launches.json"
    file.unlink(missing_ok=True)
    dry_run = ["--dry-run"] * run.dry_run
    code, output = run.module(
        "launches", "launches", *run.backends, f"--device={run.device}", f"--out={file}", *dry_run
    )
    if not file.exists():
        return {"status": status_of(code), "exit_code": code, "error": output[-800:]}
    found = json.loads(file.read_text())
    ok = code == 0 and found["rows"] and not found["errors"] and all(row["ok"] for row in found["rows"])
    return {**found, "status": OK if ok else FAILED, "exit_code": code}


def sanitize(run: Run) -> Found:
    """Run compute-sanitizer on a small case, where it is installed; without, the small case alone."""
    small = [sys.executable, "-m", f"{__package__}.small_step", *run.backends, f"--device={run.device}"]
    sanitizer = _tool("compute-sanitizer")
    if sanitizer is None or run.device != "cuda":
        code, _ = run.command("small_step", *small)
        return {"status": status_of(code), "exit_code": code, "skipped": "no compute-sanitizer, or no GPU"}
    found: Found = {}
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
        found[tool] = {
            "status": status_of(code),
            "exit_code": code,
            "summary": summary[-1] if summary else None,
        }
    return {**found, "status": worst(result["status"] for result in found.values())}


def table(run: Run) -> Found:
    """Run the races, in another process after each fault that breaks the device."""
    file = run.logs / "table.json"
    file.unlink(missing_ok=True)
    run.results, run.bandwidth = [], None
    dry_run = ["--dry-run"] * run.dry_run
    begun: list[str] = []
    found: dict[str, Any] = {}
    while True:
        seconds = f"--seconds={max(run.left - 10, 1):.0f}"
        arguments = (*run.backends, f"--device={run.device}", f"--out={file}", seconds, *dry_run)
        code, output = run.module("table", "table", *arguments)
        if not file.exists():
            return {"status": status_of(code), "exit_code": code, "error": output[-800:]}
        found = json.loads(file.read_text())
        progress, begun = len(found["begun"]) > len(begun), found["begun"]
        if not code or not progress or run.left < 20:
            break
    run.results = [to_result(fields) for fields in found["results"]]
    if memory := found["bandwidth"]:
        run.bandwidth = {f"{kind}_gbps": value and value / 1e9 for kind, value in memory.items()}
    if code != 0 and not found["is_over"]:
        found["errors"].setdefault(begun[-1], "no time was left" if code is None else "the process ended")
    missed = [result.name for result in run.results if result.reached is False]
    rest = [r.race.name for r in GPU_RACES if r.race.name not in begun and not run.dry_run]
    wrong = [name for name, error in found["errors"].items() if error != "no time was left"]
    status = FAILED if wrong or missed else NOT_FINISHED if rest or code is None else status_of(code)
    return {"status": status, "exit_code": code, "missed": missed, "not_run": rest, "errors": found["errors"]}


def ncu(run: Run) -> Found:
    """Profile one large step of each backend with Nsight Compute, where it is installed."""
    tool = _tool("ncu")
    if tool is None or run.device != "cuda":
        return {"status": OK, "skipped": "no ncu, or no GPU"}
    code, output = run.command(
        "ncu",
        *(tool, "--csv", "--clock-control", "none", "--profile-from-start", "off"),
        *("--metrics", ",".join(NCU_METRICS)),
        *(sys.executable, "-m", f"{__package__}.small_step", *run.backends, "--profile"),
        *["--numel=65536"] * run.dry_run,
    )
    kernels: dict[str, dict[str, str]] = {}
    if (header := output.find('"ID"')) >= 0:
        for row in csv.DictReader(io.StringIO(output[header:])):
            name = NCU_METRICS.get(row.get("Metric Name") or "")
            if name is not None:
                kernel = kernels.setdefault(f"{row['ID']} {row['Kernel Name']}", {})
                kernel[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    # It needs permission to read the counters: no failure of ours where that is missing.
    return {"status": NOT_FINISHED if code is None else OK, "exit_code": code, "kernels": kernels}


#: Every stage, and the seconds that it is to have at least: what earlier ones leave over comes on top.
STAGES: dict[str, tuple[Callable[[Run], Found], int]] = {
    "build": (build, 90),
    "smoke": (smoke, 150),
    "tests": (tests, 150),
    "launches": (launches, 30),
    "sanitize": (sanitize, 120),
    "table": (table, 90),
    "ncu": (ncu, 60),
}
