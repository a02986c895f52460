"""The shape of the house: imports go one way, and one file sees torch in csrc."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fused_adamw"

# Who may import whom, by the first component under fused_adamw.
ALLOWED = {
    "groups": set(),
    "tables": set(),
    "extension": set(),
    "memory": {"extension", "distributed"},
    "distributed": set(),
    "buckets": {"memory", "tables"},
    "plan": {"buckets", "distributed", "memory", "tables"},
    "backends": {"extension", "tables"},
    "state": {"distributed", "memory"},
    "announce": set(),
    "arguments": set(),
    "checks": {"arguments", "distributed", "memory", "state"},
    "checkpoints": {"checks", "groups"},
    "second_clip": set(),
    "optimizer": {
        "announce",
        "arguments",
        "backends",
        "checkpoints",
        "checks",
        "distributed",
        "groups",
        "memory",
        "plan",
    }
    | {"second_clip", "state", "tables"},
    "version": set(),
    "__init__": {"groups", "backends", "optimizer", "version"},
    "__main__": {"groups", "backends", "optimizer", "version"},
}
# Includes of our own headers in csrc, and who may see torch.
ALLOWED_INCLUDES = {
    "tables.h": set(),
    "adamw.h": {"tables.h"},
    "adamw_cpu.h": {"tables.h"},
    "adamw_cuda.h": {"tables.h"},
    "adamw_cpu.cpp": {"adamw_cpu.h", "adamw.h", "tables.h"},
    "adamw_cuda.cu": {"adamw_cuda.h", "adamw.h", "tables.h"},
    "guard.h": set(),
    "guard.cpp": {"guard.h"},
    "bindings.cpp": {"adamw.h", "adamw_cpu.h", "adamw_cuda.h", "guard.h", "tables.h"},
}
SEES_TORCH = {"bindings.cpp"}


def component(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """First components under fused_adamw that a module imports, absolutely or relatively."""
    found = set()
    package = ["fused_adamw", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fused_adamw.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    me = component(path)
    assert imports_of(path) - {me, "_C"} <= ALLOWED[me]


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "csrc").iterdir()))
def test_includes_go_one_way(name):
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', (ROOT / "csrc" / name).read_text(), re.M)
    ours = {p.name for p in (ROOT / "csrc").iterdir()}
    assert {i for i in includes if i in ours} <= ALLOWED_INCLUDES[name]
    assert any("torch" in i for i in includes) == (name in SEES_TORCH)


def test_import_brings_in_neither_triton_nor_rich():
    code = (
        "import sys, torch; before = set(sys.modules); import fused_adamw\n"
        "assert {'triton', 'rich', 'numpy'}.isdisjoint(set(sys.modules) - before), 'heavy import'\n"
        "assert 'fused_adamw._C' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_exist():
    import fused_adamw

    assert all(hasattr(fused_adamw, name) for name in fused_adamw.__all__)
