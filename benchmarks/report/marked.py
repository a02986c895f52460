"""Tables in Markdown pages: generated, between two comments that mark their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

_BLOCK = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /table -->", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Lay out a Markdown table: some columns of words at the left, the others of numbers."""
    rule = ["---" if column < words else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rows))


def names(page: str) -> list[str]:
    """The tables that a page has.

    Raises:
        ValueError: A mark has no end, or no beginning.
    """
    found = [block["name"] for block in _BLOCK.finditer(page)]
    if not len(found) == page.count("<!-- table:") == page.count("<!-- /table -->"):
        raise ValueError("a table's mark is not of the form <!-- table: NAME --> ... <!-- /table -->")
    return found


def fill(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: A mark is incomplete, or names a table that does not exist.
    """
    if unknown := [name for name in names(page) if name not in tables]:
        raise ValueError(f"there is no table {unknown[0]!r}: expected one of {', '.join(tables)}")

    def make(block: re.Match[str]) -> str:
        return f"<!-- table: {block['name']} -->\n{tables[block['name']]()}\n<!-- /table -->"

    return _BLOCK.sub(make, page)
