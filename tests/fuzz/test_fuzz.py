"""The fuzzer finds what is planted for it, and nothing else at once."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("atheris", reason="needs requirements-fuzz.txt")


def run(target, seconds):
    """The exit status, and what was said."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), target, f"-max_total_time={seconds}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return done.returncode, done.stderr


def test_a_planted_overrun_is_found():
    status, told = run("overrun", 300)
    assert status != 0
    assert "AddressSanitizer" in told
    assert "kernels.cpp" in told or "blocks.h" in told


@pytest.mark.parametrize("target", ["walk", "operators", "loading"])
def test_nothing_is_found_in_a_few_seconds(target):
    status, told = run(target, 20)
    assert status == 0, told[-4000:]
