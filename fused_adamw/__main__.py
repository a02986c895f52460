"""`python -m fused_adamw info | explain`."""

from __future__ import annotations

import argparse
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from .backends import available_backends, build_info
from .groups import cli as explain
from .version import __version__


def info() -> int:
    """Print versions, how the extension was built, and which backends can run here."""
    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    built = build_info()
    triton = _version("triton")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for name, value in {
        "fused_adamw": __version__,
        "torch": torch.__version__,
        "triton": triton or "not installed",
        "python": platform.python_version(),
        "GPU": ", ".join(gpus) or "none",
        "CPU kernels": built.get("cpu_capability", "not built"),
        "CUDA kernels": built.get("cuda") or "not built",
        "compiler": built.get("compiler", "unknown"),
    }.items():
        facts.add_row(name, value)
    console.print(facts)

    table = Table("backend", "device", "available", "why not")
    for status in available_backends():
        table.add_row(status.backend, status.device, "yes" if status.available else "no", status.reason or "")
    console.print(table)
    return 0


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_adamw")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build and backends")
    explain.add_arguments(commands.add_parser("explain", help="which parameters of a model decay, and why"))
    args = parser.parse_args(argv)
    return info() if args.command == "info" else explain.run(args)


if __name__ == "__main__":
    sys.exit(main())
