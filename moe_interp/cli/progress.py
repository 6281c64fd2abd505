"""Progress of a command: a bar on a terminal; in a log, a line every so often."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from moe_interp.cli import console

EVERY = 30.0  # seconds between two lines


def on_terminal() -> bool:
    """Whether a bar can be drawn: not in a file or a pipe, and not on a terminal that cannot move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def in_log(label: str, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None] | None:
    """What an experiment takes as ``progress``: None on a terminal, where it draws its bar; else lines.

    Args:
        label: What is being done.
        clock: Seconds.
    """
    return None if on_terminal() else LogLines(label, clock)


class LogLines:
    """Says how far a run is when it is told, but no more often than every :data:`EVERY` seconds."""

    def __init__(self, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.label, self.clock = label, clock
        self.start = self.said = clock()

    def __call__(self, done: int, total: int) -> None:
        """Told by the experiment: cells done, and cells in all."""
        now = self.clock()
        if now - self.said < EVERY or done == total:
            return
        self.said = now
        minutes, seconds = divmod(round(now - self.start), 60)
        console.say(f"{self.label}: {done} of {total} after {minutes}:{seconds:02d} min")
