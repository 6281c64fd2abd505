"""Ctrl-C before a command's work has begun: it ends at once, with one line."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a command that was interrupted, as shells have it."""


def leave_at_once_when_interrupted() -> None:
    """Ctrl-C ends the process: libraries that are being imported, or that load a model, have nothing to put back.

    They would answer a ``KeyboardInterrupt`` with a long traceback or an error of their own. Where interruptions are
    ignored, as in a background job of a shell script, they stay so.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)


def work_begins() -> None:
    """From here on Ctrl-C raises ``KeyboardInterrupt``, so that what is finished is kept and said."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nInterrupted.\n" if os.isatty(2) else b"Interrupted.\n")  # a terminal has just shown ^C
    os._exit(INTERRUPTED)
