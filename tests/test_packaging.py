"""What a source distribution holds, and what it says about itself."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from test_build import copy_sources

import fused_adamw

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tarfile.TarFile:
    """A source distribution, made as pip and build make it."""
    folder = tmp_path_factory.mktemp("source")
    copy_sources(folder)
    (folder / "fused_adamw" / "_C.abi3.so").touch()
    (folder / "csrc" / "left.pyc").touch()
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, capture_output=True)
    (made,) = (folder / "dist").iterdir()
    return tarfile.open(made)


@pytest.fixture(scope="module")
def metadata(archive) -> email.message.Message:
    """The metadata that an index shows."""
    (info,) = (name for name in archive.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", name))
    return email.message_from_bytes(archive.extractfile(info).read())


def test_the_source_distribution_has_what_a_build_needs_and_no_more(archive):
    names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not in a clone")
    wanted = {f for f in tracked.stdout.splitlines() if re.match(r"csrc/|fused_adamw/|wheels/", f)}
    wanted |= {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}
    added = {"PKG-INFO", "setup.cfg", "requirements-wheel.txt"}
    assert {name for name in names if ".egg-info/" not in name} == wanted | added


def test_metadata_are_complete(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"triton", "test", "examples"} <= set(metadata.get_all("Provides-Extra"))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10", "rich>=13"]
    # PEP 639: an expression takes the place of classifiers.
    assert not [line for line in metadata.get_all("Classifier") if line.startswith("License")]


def test_the_version_is_that_of_the_changelog(metadata):
    """The newest release there, which may be the one in preparation."""
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert headings[1].split()[0] == fused_adamw.__version__ == metadata["Version"]
