"""Lay out the package as a project for the kernel-builder of Hugging Face: `python hub/make.py FOLDER`.

Kernels there import only the standard library and torch. What needs more is left out: the command line, and
tables.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fused_adamw"
LEFT_OUT = {PACKAGE / name for name in ("cli", "__main__.py", "groups/render.py", "py.typed")}


def ignored(folder: str, names: list[str]) -> list[str]:
    """What is not copied of a folder."""
    return [name for name in names if Path(folder, name) in LEFT_OUT or name.endswith((".so", "__pycache__"))]


def make(folder: Path) -> None:
    """Write the project into a folder that is not there yet."""
    shutil.copytree(PACKAGE, folder / "torch-ext" / "fused_adamw", ignore=ignored)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(ROOT / "hub" / name, folder / name)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
