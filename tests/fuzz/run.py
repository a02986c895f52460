"""Builds the package for the fuzzer and runs it: `python tests/fuzz/run.py walk -max_total_time=600`.

The first argument is a target of fuzz.py, further ones are libFuzzer's. What it has found worth keeping is in
build/fuzz/corpus, inputs that crash are in build/fuzz. Needs clang++ and atheris.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
# atheris brings a sanitizer that does not know clang's checks of types of functions.
FLAGS = (
    "-O1 -g -fsanitize=address,undefined,fuzzer-no-link -fno-sanitize=function,vptr "
    "-fno-sanitize-recover=all -Wno-unknown-pragmas"
)


def environment() -> dict[str, str]:
    """The variables under which fuzz.py runs; builds the package, with its portable kernels alone."""
    import atheris

    sys.path[:0] = [str(ROOT / "tests")]
    import compiler

    options = {"CXX": "clang++", "FUSED_ADAMW_CXX_FLAGS": FLAGS, "FUSED_ADAMW_SIMD": "0"}
    compiler.package(BUILD, {**os.environ, **options})
    return {
        **os.environ,
        "LD_PRELOAD": str(Path(atheris.path()) / "asan_with_fuzzer.so"),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join([str(BUILD / "lib"), str(ROOT / "tests")]),
        "PYTHONSAFEPATH": "1",  # not the package in the current folder
        # What torch and Python keep until the end is no leak of ours; a tensor may be too large to be made.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }


def fuzz(target: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a target; the process, with what it has said."""
    corpus = BUILD / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)
    usual = ["-len_control=0", "-max_len=400", f"-artifact_prefix={BUILD}/{target}-", *arguments, str(corpus)]
    command = [sys.executable, str(HERE / "fuzz.py"), target, *usual]
    return subprocess.run(command, env=environment(), cwd=ROOT, stdout=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(fuzz(*sys.argv[1:]).returncode)
