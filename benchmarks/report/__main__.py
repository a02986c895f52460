"""Write the generated tables into the pages that show them, or print those of some sessions.

python -m benchmarks.report                      # README.md and pages of docs/
python -m benchmarks.report --pictures           # and draw their pictures
python -m benchmarks.report A.csv B.csv ...      # ratios side by side
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from ..provenance import ROOT
from .marked import fill
from .pictures import plot_ratios, plot_roofline
from .sessions import describe, read
from .tables import RESULTS, TABLES, pictured, ratios

PAGES = ("README.md", "docs/offload.md", "docs/performance.md", "docs/precision.md", "docs/scaling.md")
PICTURED = RESULTS / "cpu-2026-11-26-run2.csv"


@functools.cache
def scaling() -> ModuleType:
    """The paper model beside its page; docs is no package."""
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "docs" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def all_tables() -> dict[str, Callable[[], str]]:
    """Every table, by the name that marks its place."""
    return {**TABLES, **scaling().TABLES}


def write_pages() -> list[str]:
    """Bring the pages up to date; those that changed."""
    tables, changed = all_tables(), []
    for name in PAGES:
        page = (ROOT / name).read_text()
        if (new := fill(page, tables)) != page:
            (ROOT / name).write_text(new)
            changed.append(name)
    return changed


def draw() -> None:
    """Draw the pictures of the pages."""
    session, labels = pictured(read(PICTURED))
    plot_ratios(session, PICTURED.with_name(f"{PICTURED.stem}-ratios.png"), labels)
    plot_roofline(session, ROOT / "docs" / "roofline.png")
    scaling().draw(ROOT / "docs" / "scaling.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sessions", type=Path, nargs="*", help="print these; write nothing")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures too")
    args = parser.parse_args(argv)
    if args.sessions:
        found = [(path, read(path)) for path in args.sessions]
        for path, session in found:
            print(f"{path.stem}: {describe(session)}")
        print(ratios(found))
        return
    print(f"changed: {', '.join(write_pages()) or 'nothing'}")
    if args.pictures:
        draw()


if __name__ == "__main__":
    main()
