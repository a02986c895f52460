"""Holds Ctrl-C off while a step writes, so that it is never left half made."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, cast


class InterruptsHeld:
    """A context in which SIGINT waits: its handler, such as Python's, runs at the end.

    In other threads than the main one it does nothing, as Python runs handlers in the main thread only.
    """

    _handler: Callable[[int, FrameType | None], Any] | None = None
    _frame: FrameType | None = None
    _has_come = False

    def __enter__(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGINT, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._has_come, self._frame = True, frame

    def __exit__(self, *error: object) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        frame, self._frame = self._frame, None
        if self._has_come:
            self._handler(cast(int, signal.SIGINT), frame)
