"""The documentation: all of its code runs, and all of it can be found."""

import contextlib
import inspect
import operator
import re
import sys
from pathlib import Path

import pytest
import torch
from distributed.ranks import run
from snippets import PAGES, ROOT, run_snippet, scenes

import fused_adamw

SCENES = {f"{scene.page}:{scene.line}": scene for page in PAGES for scene in scenes(page)}


def run_in_rank(key):
    SCENES[key].run()


@pytest.mark.parametrize(
    "key",
    # Other libraries take seconds to import.
    [pytest.param(key, marks=[pytest.mark.slow] if scene.needs else []) for key, scene in SCENES.items()],
)
def test_every_snippet_runs(key, tmp_path, monkeypatch, threads):
    scene = SCENES[key]
    scene.skip_unless_possible()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")  # a terminal that wide
    threads(1)  # other tests run at the same time
    if scene.ranks > 1:
        run(scene.ranks, run_in_rank, key)
    else:
        scene.run()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    """So that none is left out by a missing word: Python and console are run, the others are not."""
    fences = re.findall(r"^ *```(.*)$", (ROOT / page).read_text(), re.M)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"python", "console", "bash", "text"}
    assert set(fences[1::2]) <= {""}


def test_every_page_is_in_the_menu():
    """`make docs` builds what is in it, and knows of broken links and anchors."""
    menu = re.search(r"^nav:\n(.*?)^\w", (ROOT / "mkdocs.yml").read_text(), re.M | re.S)[1]
    listed = re.findall(r"([\w-]+\.md)$", menu, re.M)
    assert len(listed) == len(set(listed))
    assert {Path(page).name for page in PAGES if page.startswith("docs/")} <= set(listed)


REFERENCE = re.findall(r"^::: fused_adamw\.(\S+)$", (ROOT / "docs/reference.md").read_text(), re.M)


def test_the_reference_has_every_public_name():
    assert set(fused_adamw.__all__) - {"__version__"} <= set(REFERENCE)
    assert len(REFERENCE) == len(set(REFERENCE))


def callables(name):
    """An object of the reference and its public methods, by name."""
    shown = operator.attrgetter(name)(fused_adamw)
    found = {name: shown} if inspect.isfunction(shown) else {}
    if inspect.isclass(shown) and issubclass(shown, torch.optim.Optimizer):
        found[name] = shown
    for member in dir(shown) if inspect.isclass(shown) else ():
        function = getattr(shown, member)
        if inspect.isfunction(function) and function.__module__.startswith("fused_adamw"):
            found |= {} if member.startswith("_") else {f"{name}.{member}": function}
    return found


@pytest.mark.parametrize("name", REFERENCE)
def test_docstrings_have_every_argument(name):
    for label, function in callables(name).items():
        told = inspect.getdoc(function)
        if function is fused_adamw.AdamW or label.endswith("profile_hook_step"):
            continue  # the same class under another name; what torch calls, not users
        arguments = set(inspect.signature(function).parameters) - {"self"}
        sections = re.findall(r"^Args:\n(.*?)(?=^\w|\Z)", told, re.M | re.S)
        described = set(re.findall(r"^    \**(\w+): \S", "".join(sections), re.M))
        assert described == arguments, label


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page):
    """On GitHub, where the pages are read in the tree."""
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link


PAGE = """# Title

<!-- snippets
start = 1
-->

```python
a = start
```

## Section

* An item:

  ```python
  a += 1
  assert a == 2
  ```

Words.

```text
not code
```

<!-- snippets: ranks=2, needs=torch+no_such_module -->

```python
b = 1
```

## Commands

<!-- snippets -->

```console
$ python -c "print('one two three')"
one ... three
$ python -c "print(1)"
```
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes a page, and returns its path from the root."""

    def write(text=PAGE):
        (tmp_path / "page.md").write_text(text)
        monkeypatch.setattr(sys.modules["snippets"], "ROOT", tmp_path)
        return "page.md"

    return write


def test_scenes_are_found(page):
    first, second, third = scenes(page())
    assert first.run()["a"] == 2
    assert [block.headings for block in first.blocks] == [
        ("page.md", "Title"),
        ("page.md", "Title", "Section"),
    ]
    assert (second.ranks, second.needs, second.setup) == (2, ["torch", "no_such_module"], "")
    with pytest.raises(pytest.skip.Exception, match="needs no_such_module"):
        second.skip_unless_possible()
    third.run()


def test_a_fault_is_found_at_its_line(page):
    (scene,) = scenes(page("# Title\n\n```python\nx = 1\nraise KeyError\n```\n"))
    with pytest.raises(KeyError) as caught:
        scene.run()
    assert caught.traceback[-1].lineno + 1 == 5


@pytest.mark.parametrize("shown", ["one two", "one ... four"])
def test_other_output_than_shown_is_found(page, shown):
    (scene,) = scenes(page(f"```console\n$ python -c \"print('one two three')\"\n{shown}\n```\n"))
    with pytest.raises(pytest.fail.Exception, match="one two three"):
        scene.run()


@pytest.mark.parametrize(("shown", "fails"), [("1 2\n", False), ("... 2\n", False), ("1 3\n", True)])
def test_what_python_prints_is_compared(page, shown, fails):
    (scene,) = scenes(page(f"```python\nprint(1, 2)\n```\n\n```text\n{shown}```\n"))
    with pytest.raises(pytest.fail.Exception, match="1 2") if fails else contextlib.nullcontext():
        scene.run()


def test_text_with_words_before_it_is_no_output(page):
    (scene,) = scenes(page("```python\nprint(1)\n```\n\nWords.\n\n```text\n2\n```\n"))
    scene.run()


def test_a_command_that_fails_is_found(page):
    (scene,) = scenes(page('```console\n$ python -c "raise SystemExit(2)"\n```\n'))
    with pytest.raises(AssertionError):
        scene.run()


def test_an_unknown_option_is_refused(page):
    with pytest.raises(ValueError, match=r"page\.md:1: there is no option 'rank'"):
        scenes(page("<!-- snippets: rank=2 -->\n```python\n```\n"))


def test_one_block_alone_with_other_names(page):
    assert run_snippet(page(), "Title", 0, start=5)["a"] == 5
    assert run_snippet(page(), "Section", 1)["b"] == 1
