"""What to print at the end of a run: a line per stage."""

from __future__ import annotations

from .run import OK, Found, Run

#: What ncu's figures are to be compared with.
NCU_EXPECTED = "64M fp32 values move 1.88 GB in the update, 0.27 GB in the norm"


def _tests(found: Found) -> str:
    words = f": {found['last_line']}"
    if "small_step" in found and found["small_step"]["exit_code"] != 0:
        words = f": small_step: {found['small_step']['last_line']}" + words
    if "large" in found:
        words += f"; large: {found['large']['last_line']}"
    return words + "".join(f"\n  {name}" for name in found.get("failed", [])[:20])


def _launches(found: Found) -> str:
    if not found.get("rows"):
        return ""
    worst = max(found["rows"], key=lambda row: (row["kernels"], row["copies"]))
    waits = [row for row in found["rows"] if row.get("synchronises")]
    return (
        f": at most {worst['kernels']:g} kernels and {worst['copies']:g} copies per step"
        f"; the host waits in {len(waits)} of {len(found['rows'])} cases"
    )


def _table(run: Run, found: Found) -> str:
    if "missed" not in found:
        return ""
    judged = [result for result in run.results if result.reached is not None]
    words = f": {len(judged) - len(found['missed'])} of {len(judged)} targets reached"
    if run.bandwidth:
        words += "".join(f"; {kind} {gbps:.0f}" for kind, gbps in run.bandwidth.items() if gbps)
    words += "".join(f"\n  missed {name}" for name in found["missed"])
    return words + "".join(f"\n  not run {name}" for name in found["not_run"])


def _ncu(found: Found) -> str:
    if not found.get("kernels"):
        return ""
    lines = [
        f"\n  {kernel}: " + ", ".join(f"{key} {value}" for key, value in metrics.items())
        for kernel, metrics in found["kernels"].items()
    ]
    return f": {NCU_EXPECTED}" + "".join(lines)


def _line(run: Run, name: str, found: Found) -> str:
    words = found["status"] if found["status"] == OK else found["status"].upper()
    if isinstance(found.get("skipped"), str):
        words += f" ({found['skipped']})"
    if name == "build" and "native" in found:
        words += f": native {found['native']}"
    if name in ("smoke", "tests") and "last_line" in found:
        words += _tests(found)
    if name == "launches":
        words += _launches(found)
    if name == "sanitize":
        tools = [tool for tool in ("memcheck", "racecheck") if tool in found]
        words += "".join(f"; {tool}: {found[tool]['summary'] or found[tool]['status']}" for tool in tools)
    if name == "table":
        words += _table(run, found)
    if name == "ncu":
        words += _ncu(found)
    words += "".join(f"\n  {what}: {error}" for what, error in found.get("errors", {}).items())
    if "error" in found:
        words += f": {found['error']}"
    return f"{name:9}{found['seconds']:6.1f} s  {words}"


def summarize(run: Run) -> list[str]:
    """A line per stage: what was run, what passed, what was missed."""
    return [_line(run, name, found) for name, found in run.stages.items()]
