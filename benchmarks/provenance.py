"""Where and from what a result comes."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fused_adamw import __version__
from fused_adamw.backends import build_info

ROOT = Path(__file__).parent.parent
# What `source_sha256` covers: the kernels, the tables and formats that they read, and the plan.
SOURCES = (
    "csrc",
    "fused_adamw/backends",
    "fused_adamw/tables.py",
    "fused_adamw/formats.py",
    "fused_adamw/device.py",
    "fused_adamw/step",
)


def _run(*command: str, cwd: Path = ROOT) -> str | None:
    """The output of a command, None if it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def source_files(root: Path = ROOT) -> list[str]:
    """The files of `SOURCES`, sorted: those git tracks; without a repository, those in the tree."""
    if tracked := _run("git", "ls-files", *SOURCES, cwd=root):
        return sorted(tracked.splitlines())
    found = [path for source in SOURCES for path in (root / source, *(root / source).rglob("*"))]
    return sorted(
        path.relative_to(root).as_posix()
        for path in found
        if path.is_file() and path.suffix not in (".pyc", ".so")
    )


def source_sha256(root: Path = ROOT) -> str:
    """SHA-256 over the concatenated bytes of `source_files`."""
    digest = hashlib.sha256()
    for name in source_files(root):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    answer = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


@functools.cache
def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    version: str = triton.__version__
    return version


def provenance(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Hardware, versions, source and date of a run.

    Args:
        device: What is measured.
        commit: The commit, where there is no repository to ask.
    """
    status = _run("git", "status", "--porcelain")
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_model(),
        "driver": _driver() if gpu else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "fused_adamw": __version__,
        "build": build_info(),
        "commit": _run("git", "rev-parse", "HEAD") or commit,
        "dirty": None if status is None else bool(status),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sources": list(SOURCES),
        "source_sha256": source_sha256(),
    }
