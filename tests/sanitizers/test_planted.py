"""The sanitizers find what is planted for them, in our own code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import run

SANITIZER = os.environ.get("FUSED_ADAMW_SANITIZER")
FAULTS = {
    "overflow": ("address", "heap-buffer-overflow|use-after-poison", "sum_of_squares"),
    "undefined": ("address", "signed integer overflow", "span_of"),
    "leak": ("address", "leak of", "make_guard"),
    "race": ("thread", "data race", "update_"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, tmp_path):
    sanitizer, words, function = FAULTS[fault]
    if sanitizer != SANITIZER:
        pytest.skip(f"needs `python tests/sanitizers/run.py {sanitizer}`")
    variables = run.environment(sanitizer)
    log = str(run.BUILD / sanitizer / "report")
    variables = {key: value.replace(log, str(tmp_path / "report")) for key, value in variables.items()}
    variables["TSAN_OPTIONS"] += ":halt_on_error=1"  # one race is enough of thousands
    planted = str(Path(__file__).with_name("planted.py"))
    command = [sys.executable, planted, fault]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    told = [*run.reports(tmp_path), done.stderr]  # UndefinedBehaviorSanitizer writes no report
    found = [text for text in told if any(word in text for word in words.split("|"))]
    assert any(function in text for text in found)
