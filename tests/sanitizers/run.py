"""Builds everything with sanitizers and runs tests under them: `python tests/sanitizers/run.py address`.

    address   AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer
    thread    ThreadSanitizer

Further arguments are pytest's, in place of the tests that are meant for the sanitizer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # if this is what is run
import compiler  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "sanitizers"
FLAGS = "-fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1 -U_FORTIFY_SOURCE"
# Libraries whose leaks count. What torch and CPython keep until the process ends is theirs.
OURS = re.compile(r"_C\.abi3\.so|/build/tests/|/csrc/")
# Torch's header forgets the copy of a string that it is handed with an operator's arguments.
THEIRS = re.compile(r"#1 .* torch::stable::detail::unbox")
PLANTED = "tests/sanitizers/test_planted.py"
CORE = "oracle layouts tables plan stale_plans clip state threads letting_go low_precision_steps"


def files(names: str) -> tuple[str, ...]:
    """The files of tests by their short names."""
    return (PLANTED, "tests/contract/test_hostile_use.py", *(f"tests/test_{n}.py" for n in names.split()))


@dataclass(frozen=True)
class Sanitizer:
    """A set of sanitizers that go together.

    Attributes:
        flags: Of the compiler.
        libraries: The compiler's, to preload.
        tests: What is run under them.
    """

    flags: str
    libraries: tuple[str, ...]
    tests: tuple[str, ...]


SANITIZERS = {
    "address": Sanitizer(
        "-fsanitize=address,undefined",
        ("libasan.so", "libstdc++.so.6"),  # without the latter, exceptions of libraries loaded later abort
        (*files(CORE), "tests/guard", "tests/kernels", "tests/formats"),
    ),
    "thread": Sanitizer(
        "-fsanitize=thread",
        ("libtsan.so", "libstdc++.so.6"),
        (*files("threads tables plan stale_plans"), "tests/guard"),
    ),
}


def path_of(library: str) -> str:
    """Where the compiler has a library of its own."""
    command = ["g++", f"-print-file-name={library}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def environment(name: str) -> dict[str, str]:
    """The variables under which tests run."""
    sanitizer, folder = SANITIZERS[name], BUILD / name
    preload = [path_of(library) for library in sanitizer.libraries]
    if name == "thread":
        preload.append(str(folder / "openmp.so"))
    log = f"log_path={folder / 'report'}"
    return {
        **os.environ,
        "FUSED_ADAMW_SANITIZER": name,
        "FUSED_ADAMW_CXX_FLAGS": f"{sanitizer.flags} {FLAGS}",
        "LDFLAGS": sanitizer.flags,
        "LD_PRELOAD": " ".join(preload),
        "PYTHONPATH": os.pathsep.join([str(folder / "lib"), str(ROOT / "tests")]),
        "PYTHONSAFEPATH": "1",  # not the package in the current folder
        "PYTHONMALLOC": "malloc",
        # Leaks are told by the reports: most are torch's and CPython's.
        "ASAN_OPTIONS": f"detect_leaks=1:{log}",
        "LSAN_OPTIONS": "exitcode=0",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{log}",
        "TSAN_OPTIONS": f"exitcode=66:suppressions={HERE / 'thread.supp'}:{log}",
    }


def build(name: str) -> None:
    """Build the package, and what else is preloaded, into build/sanitizers."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    compiler.package(folder, environment(name))
    if name == "thread":
        flags = f"{SANITIZERS[name].flags} -g -O1 -fPIC -shared -ldl".split()
        command = ["g++", *flags, str(HERE / "openmp.cpp"), "-o", str(folder / "openmp.so")]
        subprocess.run(command, check=True)


def reports(folder: Path) -> list[str]:
    """What the sanitizers had to say: everything but leaks of others."""
    found = []
    for path in sorted(folder.glob("report.*")):
        text = path.read_text(errors="replace")
        if "LeakSanitizer" not in text:
            found.append(text)
            continue
        leaks = re.split(r"\n(?=(?:Direct|Indirect) leak)", text)[1:]
        found += [leak for leak in leaks if OURS.search(leak) and not THEIRS.search(leak)]
    return found


def forget_reports(name: str) -> None:
    """Remove those of an earlier run."""
    for path in (BUILD / name).glob("report.*"):
        path.unlink()


def main(name: str, *arguments: str) -> int:
    """Build and run; the exit status."""
    build(name)
    forget_reports(name)
    # It is numpy that interprets Triton's kernels, and billions of divisions have nothing but registers.
    usual = ("-m", "not slow", "-k", "not triton and not division", "-q", "-p", "no:cacheprovider")
    tests = arguments or (*SANITIZERS[name].tests, *usual)
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=environment(name))
    found = reports(BUILD / name)
    for report in found:
        print(report)
    print(f"{name}: pytest ended with {done.returncode}, {len(found)} reports")
    return done.returncode or bool(found)


if __name__ == "__main__":
    if sys.argv[1:2] not in [[name] for name in SANITIZERS]:
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
