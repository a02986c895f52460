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
    "device": set(),
    "dtensors": set(),
    "eager": set(),
    "extension": set(),
    "fields": {"formats"},
    "formats": set(),
    "interrupts": set(),
    "layout": set(),
    "tables": {"formats"},
    "backends": {"device", "extension", "formats", "tables"},
    "step": {"device", "dtensors", "extension", "fields", "formats", "interrupts", "layout", "tables"},
    "announce": set(),
    "variants": {"tables"},
    "averages": {"formats", "tables"},
    "spikes": {"tables"},
    "arguments": {"averages", "dtensors", "spikes", "state", "step", "tables", "variants"},
    "names": {"groups"},
    "state": {"arguments", "dtensors", "fields", "formats", "groups", "layout", "names", "tables"},
    "optimizer": {"announce", "arguments", "averages", "backends", "groups", "names", "spikes", "state"}
    | {"step", "stepping", "variants"},
    "stepping": {"announce", "backends", "device", "dtensors", "eager", "fields", "names", "observations"}
    | {"state", "step", "tables"},
    "guarded": {"backends", "device", "dtensors", "eager", "state", "step", "tables"},
    "observations": {"guarded", "step", "tables"},
    "muon": {"announce", "arguments", "backends", "dtensors", "eager", "groups", "optimizer", "step"}
    | {"tables"},
    "version": set(),
    "__init__": {"averages", "groups", "backends", "muon", "optimizer", "spikes", "step", "version"},
    "cli": {"arguments", "backends", "device", "groups", "optimizer", "state", "version"},
    "__main__": {"cli"},
}
# And within folders.
ALLOWED_WITHIN = {
    "step": {
        "__init__": set(),
        "double_clip": set(),
        "norm": set(),
        "snapshot": set(),
        "guard": {"snapshot"},
        "copies": {"guard", "members"},
        "protocols": set(),
        "request": {"norm"},
        "members": {"protocols", "snapshot"},
        "launch": {"members", "protocols"},
        "statistics": {"launch", "norm"},
        "plan": {"copies", "guard", "launch", "members", "norm", "protocols", "request", "snapshot"}
        | {"statistics"},
    },
    "state": {
        "__init__": set(),
        "contents": {"precision"},
        "mismatch": set(),
        "precision": set(),
        "purposes": {"precision"},
        "checks": {"contents"},
        "checkpoints": {"checks", "contents", "mismatch"},
        "regroup": {"checkpoints"},
        "masters": {"contents", "loading"},
        "averages": {"masters"},
        "loading": {"checkpoints", "contents", "precision", "purposes", "regroup"},
    },
    # The rule knows no formats, and a format no rule.
    "backends/triton": {
        "rule": set(),
        "formats": set(),
        "noise": set(),
        "outcome": set(),
        "besides": {"formats", "rule"},
        "kernels": {"besides", "formats", "noise", "outcome", "rule"},
        "__init__": {"formats", "kernels"},
    },
}
MODULES = sorted(PACKAGE.rglob("*.py"))
CSRC = ROOT / "csrc"
# Includes of our own headers, and who may see torch. The rule knows no formats, and a format no rule.
ALLOWED_INCLUDES = {
    "tables.h": set(),
    "inline.h": set(),
    "noise.h": {"inline.h"},
    "adamw.h": {"inline.h", "tables.h"},
    "average.h": {"inline.h", "tables.h"},
    "outcome.h": {"inline.h", "tables.h"},
    "stats.h": {"formats.h", "inline.h"},
    "formats.h": {"inline.h", "tables.h"},
    "cpu/kernels.h": {"formats.h", "tables.h"},
    "cpu/halves.h": {"inline.h"},
    "cpu/blocks.h": {"cpu/halves.h", "formats.h", "noise.h"},
    "cpu/math.h": {"adamw.h", "formats.h"},
    "cpu/squares.h": {"cpu/blocks.h"},
    "cpu/besides.h": {"average.h", "cpu/squares.h", "stats.h"},
    "cpu/kernels.cpp": {"adamw.h"}
    | {f"cpu/{part}.h" for part in ("besides", "blocks", "kernels", "math", "squares")},
    "cuda/kernels.h": {"tables.h"},
    "cuda/layouts.h": {"formats.h"},
    "cuda/walk.cuh": {"formats.h"},
    "cuda/norm.cu": {"cuda/kernels.h", "cuda/walk.cuh"},
    "cuda/elements.cuh": {"cuda/layouts.h", "cuda/walk.cuh", "noise.h"},
    "cuda/switches.h": set(),
    "cuda/fast_math.h": {"formats.h"},
    "cuda/besides.cuh": {"average.h", "cuda/elements.cuh", "stats.h"},
    "cuda/update.cu": {"adamw.h", "outcome.h", "cuda/besides.cuh", "cuda/elements.cuh"}
    | {f"cuda/{part}.h" for part in ("fast_math", "kernels", "switches")},
    "cuda/dispatch.cu": {"cuda/kernels.h", "cuda/layouts.h", "cuda/switches.h"},
    "python/dispatch_keys.h": set(),
    "python/guard.h": set(),
    "python/survey.h": set(),
    "python/survey.cpp": {"python/dispatch_keys.h", "python/survey.h"},
    "python/tensor_memory.h": {"python/dispatch_keys.h"},
    "python/records.h": {"python/tensor_memory.h", "torch/direct.h"},
    "python/guard.cpp": {"python/guard.h", "python/records.h"},
    "torch/direct.h": set(),
    "torch/direct.cpp": {"torch/direct.h"},
    "torch/bindings.cpp": {"outcome.h", "cpu/kernels.h", "cuda/kernels.h", "tables.h"}
    | {"python/guard.h", "python/survey.h"},
}
SEES_TORCH = {"torch/bindings.cpp": ".*", "python/dispatch_keys.h": "ATen/dlpack.h"} | {
    "torch/direct.cpp": "torch/csrc/inductor/aoti_torch/c/shim.h"
}
SOURCES = sorted(str(p.relative_to(CSRC)) for p in CSRC.rglob("*") if p.is_file())


def component(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """The modules of fused_adamw that a module imports, absolutely or relatively: dotted names under it."""
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
        found |= {name.removeprefix("fused_adamw.") for name in names if name.startswith("fused_adamw.")}
    return found


def file_of(dotted: str) -> Path | None:
    """The file that a dotted name under fused_adamw, or one with a module's content added, is in."""
    parts = dotted.split(".")
    for n in (len(parts), len(parts) - 1):
        stem = PACKAGE.joinpath(*parts[:n])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if n and path.exists():
                return path
    return None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    me = component(path)
    assert {name.split(".")[0] for name in imports_of(path)} - {me, "_C"} <= ALLOWED[me]


@pytest.mark.parametrize("folder", ALLOWED_WITHIN)
def test_imports_within_folders_go_one_way(folder):
    inside = folder.replace("/", ".") + "."
    for path in (PACKAGE / folder).glob("*.py"):
        names = {n.removeprefix(inside).split(".")[0] for n in imports_of(path) if n.startswith(inside)}
        siblings = {name for name in names if (PACKAGE / folder / f"{name}.py").exists()}
        assert siblings <= ALLOWED_WITHIN[folder][path.stem], path


def test_no_circle_of_imports():
    """At any depth, between any two modules."""
    graph = {path: {file_of(name) for name in imports_of(path)} - {None, path} for path in MODULES}
    done, way = set(), []

    def visit(path):
        assert path not in way, [str(p.relative_to(PACKAGE)) for p in [*way[way.index(path) :], path]]
        if path not in done:
            way.append(path)
            for other in graph[path]:
                visit(other)
            done.add(way.pop())

    for path in MODULES:
        visit(path)


def test_what_only_a_gpu_has_is_in_one_place():
    """Elsewhere no device is told by its name, and nothing of torch.cuda is used."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            is_name = isinstance(node, ast.Constant) and node.value == "cuda"
            is_module = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda"
            assert path.name == "device.py" or not (is_name or is_module), f"{path}:{node.lineno}"


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
