"""Memory runs out, at one allocation after another: a step is undone, or done, and the next one works."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PROBLEMS = ["plain", "low_precision", "besides", "two_launches", "copied_grads", "reference"]
MOMENTS = ["first", "later", "replanned", "moved"]
MANY = {"first", "replanned"}  # a plan is built: hundreds of allocations, of the interpreter thousands

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="replaces functions of glibc"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "allocations.so"
    command = ["c++", "-O1", "-fPIC", "-shared", str(HERE / "allocations.cpp"), "-o", str(path), "-ldl"]
    subprocess.run(command, check=True)
    return path


def outcomes(library, problem, moment, kind, stride):
    """How often each outcome came, and where in Python processes crashed."""
    variables = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])]),
    }
    command = [sys.executable, str(HERE / "short_of_memory.py"), problem, moment, kind, str(stride)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    crashes = re.findall(r"most recent call first\):\n  (File .*)", done.stderr)
    return json.loads(done.stdout)["outcomes"], crashes


def thorough(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("problem", "moment", "stride"),
    [
        ("plain", "first", 17),
        ("two_launches", "later", 3),
        ("besides", "moved", 5),
        ("copied_grads", "later", 3),
        *(thorough(problem, moment, 1) for problem in PROBLEMS[:-1] for moment in MOMENTS),
    ],
)
def test_of_tensors_and_of_the_extension(library, problem, moment, stride):
    found, crashes = outcomes(library, problem, moment, "ours", stride)
    assert found.keys() <= {"undone", "done"}
    assert found["undone"] > 0
    assert not crashes


@pytest.mark.parametrize(
    ("moment", "stride"),
    [("later", 29), *(thorough(moment, 1) for moment in MOMENTS)],
)
def test_of_tensors_of_the_reference(library, moment, stride):
    """It steps one parameter after the other: each is stepped or not."""
    found, crashes = outcomes(library, "reference", moment, "ours", stride)
    assert found.keys() <= {"undone", "done", "done, raised", "by parameter"}
    assert found["undone"] > 0
    assert not crashes


@pytest.mark.parametrize(
    ("problem", "moment", "stride"),
    [
        ("plain", "later", 9),
        *(thorough(problem, moment, 1) for problem in ["plain", "besides"] for moment in ["later", "moved"]),
        *(thorough("plain", moment, 3) for moment in MANY),
    ],
)
def test_of_the_interpreter(library, problem, moment, stride):
    """Torch itself crashes where Python objects cannot be made, but we do not."""
    found, crashes = outcomes(library, problem, moment, "python", stride)
    known = {"undone", "done", "done, raised", "crashed (-11)", "crashed (-6)"}
    assert found.keys() <= known
    assert found["undone"] > 0
    assert all("/torch/" in crash or "dispatch_keys" in crash for crash in crashes), crashes
