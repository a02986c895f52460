"""Options of `make bench`, and what it prints and writes at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .peers import not_installed
from .provenance import provenance
from .report.pictures import plot_ratios, plot_roofline
from .report.results import Result, print_table
from .report.sessions import Session, write
from .report.tables import pictured


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("fused_adamw benchmarks")
    group.addoption("--quick", action="store_true", help="few values and rounds: tries the machinery only")
    group.addoption("--seconds", type=float, default=8.0, help="time for the rounds of one race [8]")
    group.addoption("--out", type=Path, default=Path("runs/bench"), help="folder for CSV and PNG")


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Iterator[list[Result]]:
    """Collects the results of all races; prints and writes them when the session ends."""
    collected: list[Result] = []
    yield collected
    if not collected:
        return
    whence = provenance(torch.device("cpu"))
    quick = pytestconfig.getoption("--quick")
    stem = f"cpu-{whence['date'][:10]}" + "-quick" * quick
    out = pytestconfig.getoption("--out")
    session = Session({**whence, "quick": quick}, collected)
    write(out / f"{stem}.csv", session)
    shown, labels = pictured(session)
    plot_ratios(shown, out / f"{stem}-ratios.png", labels)
    plot_roofline(shown, out / f"{stem}-roofline.png")
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        print_table(collected, f"Clip + step on {whence['device']}, torch {whence['torch']}")
        if missing := not_installed():
            print(f"Left out, as the packages are not installed: {', '.join(missing)}")
        print(f"{out / stem}.csv, -ratios.png, -roofline.png")
