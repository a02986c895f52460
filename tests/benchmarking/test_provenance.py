"""Where a result comes from."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import provenance

from .helpers import CPU


def test_provenance_says_where_a_result_comes_from() -> None:
    whence = provenance.provenance(CPU, commit="given")
    keys = ("device", "driver", "torch", "triton", "commit", "dirty", "date", "source_sha256", "build")
    assert set(keys) <= set(whence)
    assert whence["sources"] == list(provenance.SOURCES)
    assert whence["torch"] == torch.__version__
    assert len(whence["source_sha256"]) == 64
    assert whence["commit"]


@pytest.mark.parametrize("source", provenance.SOURCES)
def test_sources_are_where_provenance_says(source: str) -> None:
    """A file that moved would no longer be covered, and nothing else would tell."""
    assert (provenance.ROOT / source).exists()


def test_source_sha256_is_the_same_without_git(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for source in provenance.SOURCES:
        original = provenance.ROOT / source
        (tree / source).parent.mkdir(parents=True, exist_ok=True)
        if original.is_dir():
            shutil.copytree(original, tree / source)
        else:
            shutil.copy(original, tree / source)
    walked = provenance.source_files(tree)
    digest = provenance.source_sha256(tree)
    (tree / ".gitignore").write_text("__pycache__/\n*.so\n")
    git = ["git", "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q"], cwd=tree, check=True)
    subprocess.run([*git, "add", "."], cwd=tree, check=True)
    assert provenance.source_files(tree) == walked
    assert provenance.source_sha256(tree) == digest
    assert "csrc/adamw.h" in walked
    for part in ("backends", "tables", "plan"):
        assert any(part in name for name in walked)
    (tree / "csrc" / "adamw.h").write_text("// changed\n")
    assert provenance.source_sha256(tree) != digest
