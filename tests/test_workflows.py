"""The workflows: they call targets of the Makefile, and only publishing may have more than read access."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def jobs() -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Each job, with the names of its workflow and its own, and its workflow."""
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        for name, job in workflow["jobs"].items():
            yield path.stem, name, job, workflow


def test_there_are_those_that_a_release_needs():
    assert [path.stem for path in WORKFLOWS] == ["ci", "release", "wheels"]


def test_they_call_what_there_is():
    called = set()
    for _, _, job, _ in jobs():
        for step in job.get("steps", []):
            called |= set(re.findall(r"\bmake ([a-z-]+)", step.get("run", "")))
            called |= set(re.findall(r"^\.ci/run$", step.get("run", ""), re.M))
        if local := job.get("uses"):
            assert (ROOT / local).exists()
    assert called == {"test-wheel", "sdist", ".ci/run"}
    assert called - TARGETS == {".ci/run"}


def test_only_the_job_that_publishes_may_do_more_than_read():
    """And it runs nothing but the upload, after all else has passed."""
    for workflow, name, job, whole in jobs():
        assert whole["permissions"] == {"contents": "read"}
        if (workflow, name) == ("release", "publish"):
            assert job["permissions"] == {"id-token": "write"}
            assert not [step for step in job["steps"] if "run" in step]
            assert set(job["needs"]) == set(whole["jobs"]) - {name}
        else:
            assert "permissions" not in job
            assert "uses" in job or job["timeout-minutes"] <= 90


def test_none_holds_a_secret():
    assert not [path.name for path in WORKFLOWS if "secrets." in path.read_text()]


def test_what_is_published_is_what_was_built():
    """The names under which files are handed on differ, and each job fails without its file."""
    names = []
    for _, _, job, _ in jobs():
        for step in job.get("steps", []):
            if "upload-artifact" in step.get("uses", ""):
                names.append(step["with"]["name"])
                assert step["with"]["if-no-files-found"] == "error"
    assert len(names) == len(set(names)) == 3
