"""The command line: `python -m fused_adamw info | explain | coord-check`."""

from __future__ import annotations

import argparse

from . import coord_check, explain, info
from .errors import show_error

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None: those of the process.

    Returns:
        The exit status: 0, or 2 if the request cannot be met; the reason goes to stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m fused_adamw")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (info, explain, coord_check):
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        about = commands.add_parser(name, help=command.HELP)
        command.add_arguments(about)
        about.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except Exception as error:
        show_error(error, args.target)
        return 2
    return 0
