"""The C++ compiler: of the tests' own libraries, once for all processes, and of the package in other ways."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock  # torch needs it, too

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests"
CXX = os.environ.get("CXX") or shutil.which("g++")
# For all of them, as setup.py takes them.
MORE_FLAGS = tuple(os.environ.get("FUSED_ADAMW_CXX_FLAGS", "").split())
USUAL = ("-std=c++17", "-fPIC", "-ffp-contract=off", "-Wall")
# A sanitizer that is preloaded is for what runs the tests, not for the compiler.
ENVIRONMENT = {**os.environ, "LD_PRELOAD": ""}


def _digest(command: list, sources: list[Path]) -> str:
    """Changes with the compiler, its arguments, or anything that the sources may include."""
    version = subprocess.run([CXX, "--version"], check=True, capture_output=True, env=ENVIRONMENT).stdout
    digest = hashlib.sha256(version + repr(list(map(str, command))).encode())
    included = (Path(str(flag)[2:]) for flag in command if str(flag).startswith("-I"))
    folders = {ROOT / "csrc", *included, *(source.parent for source in sources)}
    for path in sorted({path for folder in folders for path in folder.rglob("*") if path.is_file()}):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library(source: Path, *flags: str | Path, parts: tuple[tuple[str | Path, ...], ...] = ()) -> Path:
    """A shared library of a source, compiled unless it is there.

    Args:
        source: The file; what lies beside it belongs to it.
        flags: Of the compiler.
        parts: Arguments that make further objects, all compiled at the same time.
    """
    command = [CXX, *USUAL, *flags, *MORE_FLAGS]
    sources = [source, *(Path(part[-1]) for part in parts)]
    folder = BUILD / f"{source.parent.name}-{source.stem}-{_digest([*command, *parts], sources)}"
    made = folder / "library.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not made.exists():
            objects = [folder / f"{i}.o" for i in range(1 + len(parts))]
            jobs = [
                subprocess.Popen([*command, "-c", "-o", out, *part], env=ENVIRONMENT)
                for out, part in zip(objects, [(source,), *parts], strict=True)
            ]
            assert [job.wait() for job in jobs] == [0] * len(jobs), f"{source} does not compile"
            linked = folder / "linked"
            subprocess.run([*command, "-shared", "-o", linked, *objects], check=True, env=ENVIRONMENT)
            linked.rename(made)  # whole, or not there
    return made


def package(folder: Path, environment: Mapping[str, str]) -> None:
    """Build the package, without CUDA, into folder/lib."""
    shutil.rmtree(folder / "lib" / "fused_adamw" / "__pycache__", ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "objects")]
    variables = {**environment, "LD_PRELOAD": "", "FUSED_ADAMW_CUDA": "0"}
    subprocess.run(command, check=True, cwd=ROOT, env=variables)
