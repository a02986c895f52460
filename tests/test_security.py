"""What SECURITY.md promises: checkpoints without code, and commands that do only what they are asked to."""

from __future__ import annotations

import ast
import io
import os
import pickletools
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from low_precision import SCHEMES, SHAPES

from fused_adamw import FusedHygieneAdamW, MuonWithAdamW, split_for_muon

ROOT = Path(__file__).parent.parent
PROSE = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("fused_adamw/**/*.py")]
LIBRARIES = {"timm", "transformers", "diffusers", "lightning", "accelerate", "matplotlib", "sklearn", "scipy"}


def globals_of(saved: io.BytesIO) -> set[str]:
    """The classes and functions that unpickling what `torch.save` wrote would call, as `module.name`."""
    with zipfile.ZipFile(saved) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        stream = archive.read(record)
    return {
        argument.replace(" ", ".")
        for opcode, argument, _ in pickletools.genops(stream)
        if opcode.name == "GLOBAL"
    }


def stepped(**options) -> FusedHygieneAdamW:
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in SHAPES]
    optimizer = FusedHygieneAdamW(params, max_grad_norm=1.0, skip_nonfinite=True, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def muon() -> MuonWithAdamW:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    optimizer = MuonWithAdamW(split_for_muon(model), max_grad_norm=1.0)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return optimizer


STATES = {name: lambda options=options: stepped(**options).state_dict() for name, options in SCHEMES.items()}
STATES |= {
    "compact": lambda: stepped(**SCHEMES["split-8bit"]).state_dict_compact(),
    "variants": lambda: stepped(
        weight_decay_mode="corrected", lr_ref=1e-3, nesterov=True, cautious_weight_decay=True
    ).state_dict(),
    "muon": lambda: muon().state_dict(),
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_a_checkpoint_names_no_class_of_ours(make):
    """Nothing but what torch's own checkpoints name: it loads without this package, with `weights_only`."""
    saved = io.BytesIO()
    torch.save(make(), saved)
    assert {name.split(".")[0] for name in globals_of(saved)} <= {"torch", "collections"}
    saved.seek(0)
    torch.load(saved, weights_only=True)


def test_the_names_in_a_pickle_are_found():
    """The test above would see a class of ours."""
    saved = io.BytesIO()
    torch.save({"optimizer": FusedHygieneAdamW}, saved)
    assert "fused_adamw.optimizer.FusedHygieneAdamW" in globals_of(saved)


def loads_in(path: Path) -> list[str]:
    """The calls of `torch.load` in a file, or in what its text shows."""
    text = path.read_text()
    if path.suffix == ".py":
        calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
        found = [call for call in map(ast.unparse, calls) if call.startswith("torch.load(")]
        text = "\n".join(re.findall(r'"""(?:.|\n)*?"""', text))
        return found + re.findall(r"torch\.load\([^)]*\)", text)
    return re.findall(r"torch\.load\([^)]*\)", text)


def test_every_load_that_is_run_or_shown_refuses_code():
    folders = ("examples", "benchmarks", "tests")
    files = PROSE + [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    calls = [(path.name, call) for path in files if path != Path(__file__) for call in loads_in(path)]
    assert len(calls) > 10
    assert [call for call in calls if "weights_only=True" not in call[1]] == []


def run_cli(*arguments: str, cwd: Path, flags: tuple[str, ...] = ()) -> str:
    """Run a command; prints the top modules that it brought in, on the last line."""
    code = (
        "import sys, fused_adamw\n"
        "def hook(event, args):\n"
        "    if event in ('socket.connect', 'subprocess.Popen', 'os.system'): raise SystemExit(event)\n"
        "    if event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+'):\n"
        "        raise SystemExit(f'writes {args[0]}')\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "from fused_adamw.cli import main\n"
        "sys.addaudithook(hook)\n"
        "status = main(sys.argv[1:])\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} - before))\n"
        "sys.exit(status)"
    )
    command = [sys.executable, *flags, "-B", "-c", code, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def folder(tmp_path):
    """A folder with a model of one's own, and modules that nobody asks for."""
    (tmp_path / "own.py").write_text("import torch\ndef model(): return torch.nn.Linear(2, 2)\n")
    for name in LIBRARIES | {"setup", "conftest", "sitecustomize_", "model"}:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("info",),
        ("info", "--model", "own:model"),
        ("explain", "own:model"),
        ("explain", "own:model", "weight"),
    ],
)
def test_a_command_imports_the_model_that_it_is_asked_for_and_no_library(folder, arguments):
    """Nor does it write, connect or start anything."""
    brought = run_cli(*arguments, cwd=folder).split()
    assert not LIBRARIES & set(brought)
    assert ("own" in brought) == ("own:model" in arguments)


@pytest.mark.parametrize(
    ("target", "others"),
    [("timm:resnet18", {"transformers", "diffusers"}), ("transformers:gpt2", {"timm", "diffusers"})],
)
def test_a_library_model_brings_its_library_alone(tmp_path, target, others):
    library = target.partition(":")[0]
    pytest.importorskip(library)
    brought = set(run_cli("explain", target, cwd=tmp_path).split())
    assert library in brought
    assert not others & brought


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is of Python 3.11")
def test_the_current_folder_is_left_out_where_python_is_told_so(folder):
    """`python -P`: a target is not taken from a folder that merely happens to be the current one."""
    with pytest.raises(AssertionError, match="No module named 'own'"):
        run_cli("explain", "own:model", cwd=folder, flags=("-P",))
