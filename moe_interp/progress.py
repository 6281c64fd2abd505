"""Progress of long work: a bar on a terminal, a line every so often in logs and notebooks, or the caller's function."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
"""Called with (cells done, cells in all)."""

FIRST_LINE, BETWEEN_LINES = 5.0, 30.0  # seconds: short work stays silent, long work fills no log


@contextmanager
def reporting(label: str, progress: bool | Report | None) -> Iterator[Report]:
    """A function to report progress to.

    Args:
        label: What is being done.
        progress: False shows nothing, a function receives the counts. None and True show a bar on a terminal; elsewhere
            (a notebook, a log) a line to standard error after 5 seconds and then every 30 at most. True also
            writes a first and a last line.
    """
    if callable(progress):
        yield progress
    elif progress is False:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(label) as report:
            yield report
    else:
        lines = Lines(label, is_eager=progress is True)
        yield lines
        lines.close()


class Lines:
    """Progress as lines of text, at most one in ``BETWEEN_LINES`` seconds.

    ``isolating experts: 12 of 48 (25%), 0:40, about 2:00 left``. The last line is written where another was.

    Args:
        label: What is being done.
        is_eager: Whether the first and the last line are written however short the work is.
        clock: Seconds, rising.
    """

    def __init__(self, label: str, is_eager: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._clock = label, clock
        self._start = clock()
        self._due = self._start if is_eager else self._start + FIRST_LINE
        self._done = self._total = 0
        self._first: tuple[float, int] | None = None  # when counting began, and at what: finished cells took no time
        self._written = -1

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        self._first = self._first or (now, done)
        self._done, self._total = done, total
        if now >= self._due:
            self._write(now)

    def close(self) -> None:
        """The last line, where there was one before it that said less."""
        if -1 < self._written < self._done:
            self._write(self._clock())

    def _write(self, now: float) -> None:
        self._due, self._written = now + BETWEEN_LINES, self._done
        share = f" ({self._done / self._total:.0%})" if self._total else ""
        text = f"{self._label}: {self._done} of {self._total}{share}, {_minutes(now - self._start)}"
        began, before = self._first or (now, self._done)
        if before < self._done < self._total:
            text += f", about {_minutes((now - began) * (self._total - self._done) / (self._done - before))} left"
        print(text, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def _bar(label: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
