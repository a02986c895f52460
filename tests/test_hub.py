"""The project for Hugging Face's kernel-builder: it keeps to the rules, and two builds load side by side.

The rules are those of "Write kernels" and "Kernel requirements" in the documentation of `kernels`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import ONLY_HERE

tomllib = pytest.importorskip("tomllib", reason="tomllib is of Python 3.11")

ROOT = Path(__file__).parent.parent
# Keys of edition 5: those that must be there, and those that may.
GENERAL = (
    {"name", "version", "edition", "license", "backends"},
    {"upstream", "source", "hub", "python-depends"},
)
FRAMEWORKS = {"torch", "torch-noarch", "tvm-ffi"}
BACKENDS = {"cpu", "cuda", "metal", "rocm", "xpu"}
# Triton comes with torch; their own examples import it.
ALLOWED = sys.stdlib_module_names | {"torch", "triton"}
REGISTRATIONS = r"\b(custom_op|triton_op|register_kernel|register_vmap|register_torch_dispatch)\b"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project, laid out."""
    folder = tmp_path_factory.mktemp("hub") / "project"
    runpy.run_path(str(ROOT / "hub" / "make.py"))["make"](folder)
    return folder


@pytest.fixture(scope="module")
def build(project) -> dict:
    """Its build.toml."""
    return tomllib.loads((project / "build.toml").read_text())


@pytest.fixture(scope="module")
def modules(project, build) -> dict[str, ast.Module]:
    """Its modules, by path under the package."""
    package = project / "torch-ext" / build["general"]["name"].replace("-", "_")
    return {str(path.relative_to(package)): ast.parse(path.read_text()) for path in package.rglob("*.py")}


def test_build_toml_has_the_keys_of_the_edition(build):
    general = build["general"]
    required, optional = GENERAL
    assert required <= general.keys() <= required | optional
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])
    assert (type(general["version"]), general["edition"]) == (int, 5)
    assert set(general["backends"]) <= BACKENDS
    assert len(FRAMEWORKS & build.keys()) == 1
    assert build.keys() == {"general"} | (FRAMEWORKS & build.keys())


def test_the_project_has_what_the_builder_looks_for(project, modules):
    assert {path.name for path in project.iterdir()} == {
        "build.toml",
        "flake.nix",
        "CARD.md",
        "LICENSE",
        "torch-ext",
    }
    assert "__init__.py" in modules
    assert not list(project.rglob("*.so"))
    assert not list(project.rglob("__pycache__"))


def test_the_public_names_are_listed(modules):
    """Only what is in `__all__` counts as public there."""
    names = [
        ast.unparse(node.targets[0]) for node in modules["__init__.py"].body if isinstance(node, ast.Assign)
    ]
    assert "__all__" in names


def without_type_checking(tree: ast.Module) -> list[ast.AST]:
    """The nodes of a module, but for what only type checkers see."""
    hidden = [
        set(ast.walk(node))
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return [node for node in ast.walk(tree) if not any(node in nodes for nodes in hidden)]


def test_imports_are_relative_or_of_the_standard_library_or_torch(modules):
    found = {}
    for path, tree in modules.items():
        for node in without_type_checking(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names = [node.args[0].value]
            else:
                continue
            for name in names:
                if not name.startswith("."):
                    found.setdefault(name.split(".")[0], []).append(path)
    assert "torch" in found
    assert {name: paths for name, paths in found.items() if name not in ALLOWED} == {}


def test_nothing_is_registered_in_a_namespace_that_two_builds_would_share(project):
    """The build has no operators. Those of the compiled package are declared only where it is loaded."""
    for path in project.rglob("*.py"):
        assert not re.search(REGISTRATIONS, path.read_text()), path
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import fused_adamw\n"
        "from fused_adamw.backends import native\n"
        "assert 'not built' in native.unavailable_reason(torch.device('cpu'))\n"
        "names = torch._C._dispatch_get_all_op_names()\n"
        "print(fused_adamw.__file__, [name for name in names if name.startswith('fused_adamw')])"
    )
    command = [sys.executable, "-c", ONLY_HERE + code, str(project / "torch-ext")]
    out = subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout
    assert out.split() == [str(project / "torch-ext" / "fused_adamw" / "__init__.py"), "[]"]


SIDE_BY_SIDE = """
import importlib.util, sys, torch
sys.modules["rich"] = None  # their environments need not have it
def load(name, path):
    folder = [path.removesuffix("/__init__.py")]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
path = sys.argv[1] + "/__init__.py"
first, second = load("fused_adamw_1a2b3c", path), load("fused_adamw_4d5e6f", path)
assert "fused_adamw" not in sys.modules
assert first.FusedHygieneAdamW is not second.FusedHygieneAdamW
results = []
for kernel, backend in ((first, "reference"), (second, "reference"), (second, "triton"), (torch.optim, None)):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    model(torch.ones(2, 8)).square().sum().backward()
    options = {"lr": 0.1, "weight_decay": 0.1}
    if backend:
        optimizer = kernel.FusedHygieneAdamW(model, max_grad_norm=1.0, backend=backend, **options)
        assert "0.weight decays" in str(kernel.explain_param_groups(model))
    else:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rest = {"params": [model[0].bias, *model[1].parameters()], "weight_decay": 0}
        optimizer = kernel.AdamW([{"params": [model[0].weight]}, rest], **options)
    optimizer.step()
    results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
for result in results[:-1]:
    torch.testing.assert_close(result, results[-1], rtol=1e-6, atol=1e-6)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_two_builds_load_side_by_side_and_step_as_torch_does(project):
    """Under names that are not the package's, from a folder that is not on the path, without rich."""
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(project / "torch-ext" / "fused_adamw")]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LOAD = """
import sys, torch
from pathlib import Path
sys.modules["rich"] = None
import kernels
from kernels._rust import Build
print(*Build.open(sys.argv[1]).general.backends)
kernel = kernels.get_local_kernel(Path(sys.argv[2]), backend="cpu")
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
kernel.FusedHygieneAdamW([p], max_grad_norm=1.0).step()
assert (p < 1).all()
print(kernel.__name__)
"""


def test_their_library_reads_the_project_and_loads_a_build_of_it(project, tmp_path):
    """A build as the builder makes one of Python files alone: copied, with metadata beside."""
    pytest.importorskip("kernels._rust")  # tests have a package of that name, too
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(project / "torch-ext" / "fused_adamw", variant)
    metadata = {
        "name": "fused-adamw",
        "id": "_fused_adamw_cpu_1a2b3c4",
        "version": 0,
        "license": "Apache-2.0",
    }
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    command = [sys.executable, "-c", LOAD, str(project), str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "cuda", "_fused_adamw_cpu_1a2b3c4"]
