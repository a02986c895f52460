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
    "formats": set(),
    "extension": set(),
    "memory": set(),
    "snapshot": {"extension", "memory"},
    "guard": {"distributed", "extension", "memory", "snapshot"},
    "distributed": set(),
    "buckets": {"distributed", "memory", "snapshot", "tables"},
    "plan": {"buckets", "distributed", "guard", "memory", "snapshot", "tables"},
    "backends": {"extension", "tables"},
    "state": {"distributed", "memory"},
    "announce": set(),
    "arguments": {"distributed", "tables"},
    "checks": {"arguments", "distributed", "memory", "state"},
    "checkpoints": {"checks", "groups", "mismatch", "state"},
    "mismatch": {"groups"},
    "regroup": {"checkpoints", "groups"},
    "names": {"groups"},
    "second_clip": {"tables"},
    "loading": {"arguments", "checkpoints", "names", "regroup", "state"},
    "optimizer": {"announce", "arguments", "backends", "checks", "distributed", "groups", "loading"}
    | {"buckets", "guard", "memory", "names", "plan", "snapshot"}
    | {"second_clip", "state", "tables"},
    "version": set(),
    "__init__": {"groups", "backends", "optimizer", "version"},
    "cli": {"groups", "backends", "optimizer", "version"},
    "__main__": {"cli"},
}
# And within the folder of a backend: the rule knows no formats, and a format no rule.
ALLOWED_IN_TRITON = {
    "rule": set(),
    "formats": set(),
    "kernels": {"formats", "rule"},
    "__init__": {"formats", "kernels"},
}
CSRC = ROOT / "csrc"
# Includes of our own headers, and who may see torch. The rule knows no formats, and a format no rule.
ALLOWED_INCLUDES = {
    "tables.h": set(),
    "inline.h": set(),
    "noise.h": {"inline.h"},
    "adamw.h": {"inline.h", "tables.h"},
    "formats.h": {"inline.h", "tables.h"},
    "cpu/kernels.h": {"formats.h", "tables.h"},
    "cpu/blocks.h": {"formats.h"},
    "cpu/kernels.cpp": {"adamw.h", "cpu/blocks.h", "cpu/kernels.h"},
    "cuda/kernels.h": {"tables.h"},
    "cuda/layouts.h": {"formats.h"},
    "cuda/walk.cuh": {"formats.h"},
    "cuda/norm.cu": {"cuda/kernels.h", "cuda/walk.cuh"},
    "cuda/switches.h": set(),
    "cuda/fast_math.h": {"formats.h"},
    "cuda/update.cu": {"adamw.h", "cuda/walk.cuh"}
    | {f"cuda/{part}.h" for part in ("fast_math", "kernels", "layouts", "switches")},
    "cuda/dispatch.cu": {"cuda/kernels.h", "cuda/layouts.h", "cuda/switches.h"},
    "python/dispatch_keys.h": set(),
    "python/guard.h": set(),
    "python/survey.h": set(),
    "python/survey.cpp": {"python/dispatch_keys.h", "python/survey.h"},
    "python/guard.cpp": {"python/dispatch_keys.h", "python/guard.h"},
    "torch/bindings.cpp": {"adamw.h", "cpu/kernels.h", "cuda/kernels.h", "tables.h"}
    | {"python/guard.h", "python/survey.h"},
}
SEES_TORCH = {"torch/bindings.cpp": ".*"} | dict.fromkeys(
    ("python/dispatch_keys.h", "python/guard.cpp"), "ATen/dlpack.h"
)
SOURCES = sorted(str(p.relative_to(CSRC)) for p in CSRC.rglob("*") if p.is_file())


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


@pytest.mark.parametrize("path", sorted((PACKAGE / "backends" / "triton").glob("*.py")), ids=lambda p: p.stem)
def test_imports_within_triton_go_one_way(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    siblings = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 1}
    assert siblings <= ALLOWED_IN_TRITON[path.stem]


@pytest.mark.parametrize("name", SOURCES)
def test_includes_go_one_way(name):
    path = CSRC / name
    includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)
    found = [(path.parent / include).resolve() for include in includes]
    assert {str(p.relative_to(CSRC)) for p in found if p.exists()} <= ALLOWED_INCLUDES[name]
    of_torch = [i for i in includes if re.match("(torch|ATen|c10)/", i)]
    assert bool(of_torch) == (name in SEES_TORCH)
    assert all(re.fullmatch(SEES_TORCH[name], i) for i in of_torch)


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
