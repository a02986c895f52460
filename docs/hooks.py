"""Hooks of the site: pages that live above docs/ are part of it, and comments for the tests are not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages of the repository's root, by their name on the site.
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_NAMES = {source: name for name, source in PAGES.items()}
_COMMENT = re.compile(r"<!-- .*?-->\n?", re.S)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the root, and the pictures that they show."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, name, content=_with_links_of_the_site(text)))
        for picture in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", text):
            files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Take the comments out: what the snippets need, and which table is generated."""
    return _COMMENT.sub("", markdown)


def _with_links_of_the_site(text: str) -> str:
    """Let links go where pages are on the site."""
    text = text.replace("](docs/", "](")
    return re.sub(r"\]\(([A-Z]+\.md)", lambda link: f"]({_NAMES.get(link[1], link[1])}", text)
