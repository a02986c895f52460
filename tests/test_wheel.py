"""The wheel that is released: what is in it, what it needs of a system, and that it works with each torch.

`FUSED_ADAMW_WHEEL` names a wheel that is there; otherwise `make wheel` builds one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]

ROOT = Path(__file__).parent.parent
IS_LINUX = sys.platform == "linux"
# What manylinux_2_28 has at most.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
# Of torch, the base systems, and what every Python is.
LIBRARIES = {"libtorch.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"} | {
    *("libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1")
}
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PINNED = re.findall(r"^torch==.*$", (ROOT / "requirements.txt").read_text(), re.M)[0]
# The oldest that is served, the one that `make` uses, and the newest that there is.
TORCHES = {"oldest": "torch==2.10.0", "pinned": PINNED, "newest": "torch"}
ENVIRONMENTS = [
    pytest.param(python, torch, id="own" if (python, name) == (OWN, "pinned") else f"{python}-{name}")
    for python in PYTHONS
    for name, torch in TORCHES.items()
]
# Files of tests that need nothing but the package.
CORE = ["state", "clip", "oracle", "errors", "layouts", "precision", "masters"]


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The wheel."""
    if given := os.environ.get("FUSED_ADAMW_WHEEL"):
        return Path(given)
    run("make", "--silent", "wheel", cwd=ROOT)
    (made,) = (ROOT / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory) -> Path:
    """The compiled part of it."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("fused_adamw/_C.abi3.so", folder))


def test_one_wheel_serves_every_python_and_old_systems(wheel):
    assert re.search(r"-cp310-abi3-(manylinux_2_28_(x86_64|aarch64)|macosx_\w+_arm64)\.whl$", wheel.name)
    assert wheel.stat().st_size < 10 * 2**20


def test_the_wheel_has_the_package_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fused_adamw").rglob("*.py")}
    about = {re.sub(r".*\.dist-info/", "", name) for name in names if ".dist-info/" in name}
    assert about - {"top_level.txt"} == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == modules | {"fused_adamw/py.typed", "fused_adamw/_C.abi3.so"}


@pytest.mark.skipif(not IS_LINUX, reason="about ELF")
def test_the_library_needs_nothing_but_torch_and_an_old_system(library):
    """Each undefined symbol is of the base system in an old version, of torch, or of Python."""
    dynamic = run("readelf", "--wide", "--dynamic", library)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert set(re.findall(r"NEEDED.*\[(.+)\]", dynamic)) <= LIBRARIES
    of_torch = (Path(__file__).parent / "torch_2_10_abi.txt").read_text().splitlines()
    undefined = re.findall(r"(\w+) +DEFAULT +UND +(\S+)", run("readelf", "--wide", "--dyn-syms", library))
    assert len(undefined) > 100
    unknown = []
    for binding, symbol in undefined:
        name, _, version = symbol.partition("@")
        kind, _, number = version.lstrip("@").partition("_")
        if kind in NEWEST:
            is_known = tuple(int(part) for part in number.split(".")) <= NEWEST[kind]
        else:
            is_known = name in of_torch or re.match(r"_?Py", name) or binding == "WEAK"
        if not is_known:
            unknown.append(symbol)
    assert unknown == []


def test_the_library_does_not_tell_where_it_was_built(library):
    contents = library.read_bytes()
    assert str(ROOT).encode() not in contents
    assert str(Path.home()).encode() + b"/" not in contents


@pytest.mark.skipif(not IS_LINUX or os.environ.get("FUSED_ADAMW_CUDA") == "0", reason="without CUDA")
def test_the_library_has_code_for_every_gpu_since_ampere(library):
    """As it tells `python -m fused_adamw info`."""
    assert b"\0sm_80 sm_90 sm_100 sm_120 compute_120\0" in library.read_bytes()


def python_of(version: str) -> str | None:
    """An interpreter of that version which runs, on the path or pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in (shutil.which(f"python{version}"), *root.glob(f"versions/{version}.*/bin/python")):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return str(candidate)
    return None


def environment_with(folder: Path, python: str, torch: str) -> Path:
    """The Python of a new environment with that torch and what tests need; skips if it is not at hand."""
    interpreter = python_of(python)
    if interpreter is None:
        pytest.skip(f"there is no Python {python} here")
    run(interpreter, "-m", "venv", folder)
    new = folder / "bin" / "python"
    pip = [new, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    plan = subprocess.run([*pip, "--dry-run", "--report", "-", torch], capture_output=True, text=True)
    if plan.returncode:
        pytest.skip(f"no {torch} for Python {python} here: {plan.stderr.strip().splitlines()[-1]}")
    names = [entry["metadata"]["name"] for entry in json.loads(plan.stdout)["install"]]
    has_cuda = any(re.match("nvidia|cuda", name) for name in names)
    if has_cuda and os.environ.get("FUSED_ADAMW_LARGE_DOWNLOADS") != "1":
        pytest.skip(f"{torch} brings CUDA: several GB, which FUSED_ADAMW_LARGE_DOWNLOADS=1 would fetch")
    run(*pip, torch, "numpy", "hypothesis", "pytest")
    return new


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is removed at once: an environment may take gigabytes."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name).resolve()


@pytest.mark.parametrize(("python", "torch"), ENVIRONMENTS)
def test_the_wheel_works_in_a_new_environment(wheel, folder, python, torch):
    """Installed as users do, tested from a folder in which there is no source."""
    new = environment_with(folder / "venv", python, torch)
    run(new, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    run(new, "-m", "pip", "check")
    outside = folder / "outside"
    shutil.copytree(ROOT / "tests", outside / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", outside)
    where = "import fused_adamw, fused_adamw._C as c; print(fused_adamw.__file__, c.__file__)"
    assert run(new, "-c", where, cwd=outside).count(str(folder / "venv")) == 2
    assert re.search(r"native +│ +cpu +│ +yes", run(new, "-m", "fused_adamw", "info", cwd=outside))
    files = [f"tests/test_{name}.py" for name in CORE]
    out = run(new, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files, cwd=outside)
    assert re.search(r"\d{3,} passed", out)
