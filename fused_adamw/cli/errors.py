"""Errors on the command line: ours in a sentence, those of a user's code with their traceback."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import TracebackType

_PACKAGE = Path(__file__).parent.parent


def show_error(error: Exception, target: str | None) -> None:
    """Print an error to stderr.

    Args:
        error: What was raised.
        target: The target that was asked for; it is named where code outside this package raised the error.
    """
    foreign = _outside_package(error.__traceback__)
    if foreign is None:
        print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
        return
    traceback.print_exception(type(error), error, foreign)
    print(f"error: target {target!r} raised {type(error).__name__}: {error}", file=sys.stderr)


def _outside_package(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins outside this package, or None if the error was raised inside."""
    frames = []
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    inside = [_PACKAGE in Path(frame.tb_frame.f_code.co_filename).parents for frame in frames]
    if not frames or inside[-1]:
        return None
    return frames[inside.index(False)]
