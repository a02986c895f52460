"""A run: its folder, its time, the commands that it starts, and what it has found so far."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..provenance import ROOT
from ..report.results import Result
from ..report.sessions import to_result

# Seconds that a command has, once interrupted, to say what it found.
GRACE = 10
OK, FAILED, NOT_FINISHED = "ok", "failed", "not finished"
#: What a file of another run must agree in to be continued.
SAME = ("source_sha256", "device", "torch", "dry_run")
#: The keys of one entry of `cases`, which readers of the file rely on.
CASE_KEYS = {
    "name": "name",
    "ratio": "ratio",
    "wanted_ratio": "target_ratio",
    "copy_fraction": "copy_fraction",
    "wanted_copy_fraction": "target_copy_fraction",
    "ours_ms": "ours_ms",
    "peer_ms": "peer_ms",
    "bytes": "bytes",
    "stream_fraction": "stream_fraction",
}
Found = dict[str, Any]


def status_of(code: int | None) -> str:
    """What an exit code means; None: the command ran out of time."""
    return NOT_FINISHED if code is None else FAILED if code else OK


def worst(statuses: Iterable[str]) -> str:
    """The status of several commands together."""
    order = (OK, NOT_FINISHED, FAILED)
    return max(statuses, key=order.index, default=OK)


def describe(error: Exception) -> str:
    """Class and message."""
    return f"{type(error).__name__}: {error}"


@dataclass
class Run:
    """What an acceptance run is given, and what it has found.

    Nothing of it runs on the GPU in this process: a fault there ends a command, not the run.

    Attributes:
        out: Gets acceptance.json and logs.tgz after every stage.
        device: "cuda", or "cpu" in a dry run without one.
        commit: The commit, where there is no repository to ask.
        dry_run: Few values, no targets.
        logs: Where commands write; packed into logs.tgz.
        deadline: When the present stage has to end, by `time.monotonic`.
        machine: What `benchmarks.gpu.probe` said.
        stages: What each stage found.
        results: What the races came to.
        bandwidth: Of the memory, in GB/s.
    """

    out: Path
    device: str
    commit: str | None
    dry_run: bool
    logs: Path
    deadline: float = 0.0
    machine: Found = field(default_factory=dict)
    stages: dict[str, Found] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    bandwidth: dict[str, float | None] | None = None

    @property
    def left(self) -> float:
        """Seconds left for the present stage."""
        return self.deadline - time.monotonic()

    @property
    def backends(self) -> tuple[str, ...]:
        """Ours, as far as they can run here."""
        asked = ("native", "reference") if self.dry_run else ("native", "triton")
        unavailable_reason = self.machine.get("unavailable_reason", {})
        return tuple(
            backend
            for backend in asked
            if backend in unavailable_reason and unavailable_reason[backend] is None
        )

    def run(self, name: str, stage: Callable[[Run], Found], seconds: float) -> None:
        """Run a stage; whatever happens, note it, write what there is, and go on."""
        began = time.monotonic()
        self.deadline = began + seconds
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        try:
            found = stage(self)
        except Exception as error:
            found = {"status": FAILED, "error": describe(error)}
        found["ok"] = found["status"] == OK
        self.stages[name] = {**found, "seconds": round(time.monotonic() - began, 1)}
        try:
            self.save()
        except Exception as error:  # a full disk, say: the next stage may still have room
            print(f"{name}: could not be written: {describe(error)}", flush=True)

    def command(self, log: str, *command: str | Path, **environment: str) -> tuple[int | None, str]:
        """Run a command in what time is left.

        Returns:
            Its exit code, None if it ran out of time; and its output.
        """
        path = self.logs / f"{log}.log"
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

    def module(self, log: str, name: str, *arguments: str | Path, **env: str) -> tuple[int | None, str]:
        """Run a module of this folder like `command`."""
        return self.command(log, sys.executable, "-m", f"{__package__}.{name}", *arguments, **env)

    def probe(self) -> None:
        """Look at the machine; what was seen before stays if that fails."""
        code, output = self.module("probe", "probe", self.device, *([self.commit] if self.commit else []))
        if code == 0:
            self.machine = json.loads(output.strip().splitlines()[-1])
        elif not self.machine:
            raise RuntimeError(f"the machine could not be looked at (exit code {code}): {output[-800:]}")

    def payload(self) -> Found:
        """Everything found so far."""
        return {
            **self.machine.get("provenance", {}),
            "dry_run": self.dry_run,
            "backends": list(self.backends),
            "bandwidth": self.bandwidth,
            "stages": self.stages,
            "cases": [
                {key: getattr(result, name) for key, name in CASE_KEYS.items()} for result in self.results
            ],
            "details": {result.name: asdict(result) for result in self.results},
        }

    def save(self) -> None:
        """Write acceptance.json and pack the logs."""
        _replace(
            self.out / "acceptance.json", lambda path: path.write_text(json.dumps(self.payload(), indent=1))
        )
        _replace(self.out / "logs.tgz", self._pack)

    def _pack(self, path: Path) -> None:
        with tarfile.open(path, "w:gz") as archive:
            for log in sorted(self.logs.iterdir()):
                archive.add(log, arcname=f"logs/{log.name}")

    def resume(self) -> bool:
        """Take over what an earlier call left in the folder; False if there is nothing, or of another run."""
        file, logs = self.out / "acceptance.json", self.out / "logs.tgz"
        if not file.exists():
            return False
        before, now = json.loads(file.read_text()), self.payload()
        if any(before.get(key) != now.get(key) for key in SAME):
            return False
        self.stages, self.bandwidth = before["stages"], before["bandwidth"]
        self.results = [to_result(detail) for detail in before["details"].values()]
        if logs.exists():
            with tarfile.open(logs) as archive:
                for member in archive.getmembers():
                    (self.logs / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
        return True


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one piece: a run that is killed meanwhile leaves the one before."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    part.replace(path)
