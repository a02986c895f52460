"""The code in README.md and docs/: found, and run.

Blocks of Python on a page run in order and share their names. A comment on the page begins a new scene,
without these names, and may tell what its blocks take for granted and need:

    <!-- snippets: ranks=2, needs=timm+transformers, gpu
    from stage import GPT
    model = GPT()
    -->

`ranks=2` runs the scene in two processes that form a process group, `needs` skips it where one of these
modules is missing, and `gpu` where there is no CUDA device.

A block of `text` right behind one of Python is what that prints. In a block of `console`, lines after `$` are
commands and the others what they print. Both may have `...` for any text. Other languages are not run.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
OPTIONS = {"ranks", "needs", "gpu"}
_PARTS = re.compile(
    r"^<!-- snippets(?::(?P<options>[^\n]*?))?(?:\n(?P<setup>.*?)^| *)-->$"
    r"|^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$"
    r"|^(?P<level>#{1,6}) (?P<heading>[^\n]+)$",
    re.M | re.S,
)
_AS_SHOWN = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass
class Block:
    """One fenced block."""

    language: str
    code: str
    line: int  # of its first line of code
    headings: tuple[str, ...]  # from the page's title down to its own
    shown: str = ""  # what it prints, if the page says so

    def run(self, names: dict[str, Any]) -> None:
        """Run it in `names`, or compare what its commands print."""
        if self.language == "python":
            place = "\n" * (self.line - 1)  # so that tracebacks have the line of the page
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(place + self.code, self.headings[0], "exec"), names)
            self._compare(self.shown, printed.getvalue())
            return
        for session in re.split(r"^\$ ", self.code, flags=re.M)[1:]:
            command, _, shown = session.partition("\n")
            program, *args = shlex.split(command)
            env = {**os.environ, "COLUMNS": "110"}  # a terminal that wide
            assert program == "python", f"line {self.line}: only commands of Python are run, found {command}"
            done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env=env)
            assert done.returncode == 0, done.stderr
            self._compare(shown, done.stdout)

    def _compare(self, shown: str, printed: str) -> None:
        if shown.strip() and not doctest.OutputChecker().check_output(shown, printed, _AS_SHOWN):
            pytest.fail(f"{self.headings[0]}, line {self.line}: printed\n{printed}")


@dataclass
class Scene:
    """Blocks that share their names."""

    page: str
    line: int
    setup: str = ""
    options: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    @property
    def needs(self) -> list[str]:
        """The modules that must be installed."""
        return self.options["needs"].split("+") if "needs" in self.options else []

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return int(self.options.get("ranks", "1"))

    def names(self) -> dict[str, Any]:
        """What its blocks take for granted."""
        names: dict[str, Any] = {"__name__": f"snippets of {self.page}"}
        exec(compile("\n" * self.line + self.setup, self.page, "exec"), names)
        return names

    def skip_unless_possible(self) -> None:
        """Skip the test where something is missing."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"needs {module}")
        if "gpu" in self.options and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")

    def run(self) -> dict[str, Any]:
        """Run all blocks in order, in this process."""
        names = self.names()
        for block in self.blocks:
            block.run(names)
        return names


def scenes(page: str) -> list[Scene]:
    """The scenes of a page that have blocks to run; `page` is a path from the root.

    Raises:
        ValueError: The comment that begins a scene has an option that does not exist.
    """
    text = (ROOT / page).read_text()
    found, headings, end, before = [Scene(page, 0)], (page,), 0, None
    for part in _PARTS.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["heading"]:
            headings = (*headings[: len(part["level"])], part["heading"])
        elif part["code"] is not None:
            if part["language"] in ("python", "console"):
                block = Block(part["language"], textwrap.dedent(part["code"]), line + 1, headings)
                found[-1].blocks.append(block)
            elif part["language"] == "text" and before == "python" and not text[end : part.start()].strip():
                found[-1].blocks[-1].shown = textwrap.dedent(part["code"])
        else:
            words = [word.strip() for word in (part["options"] or "").split(",") if word.strip()]
            options = {word.partition("=")[0]: word.partition("=")[2] for word in words}
            if unknown := options.keys() - OPTIONS:
                raise ValueError(f"{page}:{line}: there is no option {min(unknown)!r}: expected {OPTIONS}")
            found.append(Scene(page, line, part["setup"] or "", options))
        end, before = part.end(), part["language"]
    return [scene for scene in found if scene.blocks]


def run_snippet(page: str, heading: str, number: int = 0, **names: Any) -> dict[str, Any]:
    """Run one block of Python alone.

    Args:
        page: A path from the root.
        heading: That of a section; blocks of its subsections count.
        number: Which one of the section.
        names: Replace what its scene takes for granted.

    Returns:
        All names afterwards.
    """
    of_section = [
        (scene, block)
        for scene in scenes(page)
        for block in scene.blocks
        if heading in block.headings and block.language == "python"
    ]
    scene, block = of_section[number]
    names = scene.names() | names
    block.run(names)
    return names
