"""The acceptance run under the pretend GPU: its three calls, with few values, in a copy of the tracked files.

Timings mean nothing here; everything else has to hold. The copy is built as on a machine that starts bare.
Compute-sanitizer and ncu are stood in for by programs that run what they are given.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SANITIZER = r"""#!/usr/bin/env bash
while [[ $1 != *python* ]]; do shift; done
"$@" && echo "========= ERROR SUMMARY: 0 errors"
"""
NCU = r"""#!/usr/bin/env bash
while [[ $1 != *python* ]]; do shift; done
"$@" || exit
echo '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","stand-in","launch__registers_per_thread","register/thread","1"'
"""


def copy_tracked_files(to: Path) -> str:
    """Copy what git tracks, as it is in the tree; the commit."""
    git = ["git", "-C", str(ROOT)]
    names = subprocess.run([*git, "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return head.stdout.strip()


def add_tools(folder: Path) -> None:
    """Put the stand-ins where PATH finds them."""
    folder.mkdir()
    for name, text in (("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def check(out: Path) -> list[str]:
    """What is wrong with what the calls left."""
    files = sorted(path.name for path in out.iterdir())
    payload = json.loads((out / "acceptance.json").read_text())
    stages = payload["stages"]
    wrong = [f"{name}: {found['status']}" for name, found in stages.items() if not found["ok"]]
    if len(files) > 8:
        wrong.append(f"more than eight files: {', '.join(files)}")
    expected = {"build", "smoke", "tests", "launches", "sanitize", "table", "ncu"}
    wrong += [f"{name}: did not run" for name in sorted(expected - set(stages))]
    if not payload["cases"]:
        wrong.append("no race was run")
    for name in ("smoke", "tests"):
        if stages.get(name, {}).get("tests", 0) <= stages.get(name, {}).get("skipped", 0):
            wrong.append(f"{name}: no test ran")
    if not stages.get("ncu", {}).get("kernels") or "memcheck" not in stages.get("sanitize", {}):
        wrong.append("a tool did not run")
    return wrong


def main(out: Path) -> int:
    """Run it; 0 if everything held."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        commit = copy_tracked_files(tree)
        add_tools(Path(folder, "bin"))
        pretend = tree / "tests" / "pretend_gpu"
        subprocess.run([sys.executable, pretend / "build.py"], check=True)
        (runtime,) = (tree / "build" / "pretend_gpu" / "lib").glob("libcudart.so.*[0-9]")
        environment = {
            **os.environ,
            "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
            "CUDA_HOME": str(pretend / "toolkit"),
            "PRETEND_GPU_RUNTIME": str(runtime),
            "PYTEST_ADDOPTS": "-p pretend_gpu.plugin",
        }
        for call in ("1", "2", "3"):
            command = [sys.executable, pretend / "run.py", "python", "-m", "benchmarks.gpu_acceptance"]
            options = ["--dry-run", "--device=cuda", f"--out={out}", f"--commit={commit}"]
            # The time of a real GPU would be too short for the tests here.
            subprocess.run([*command, *options, "--call", call, "--seconds=3600"], cwd=tree, env=environment)
    wrong = check(out)
    print("\n".join(wrong) or "The acceptance run holds under the pretend GPU.")
    return 1 if wrong else 0


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "acceptance").resolve()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    raise SystemExit(main(target))
