"""Seconds on a device, and a limit on how long all of it may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class LimitReached(BaseException):
    """The time is over. Not an Exception, so that nothing on the way takes it for a failure of the model."""


class Limit:
    """Seconds that may still pass.

    Args:
        seconds: From now on.
        clock: What tells the time.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.end = clock, clock() + seconds

    def left(self) -> float:
        return self.end - self.clock()

    def share(self, part: float) -> Limit:
        """A limit of a part, 0 to 1, of what is left."""
        return Limit(part * self.left(), self.clock)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Ends what runs inside of the ``with`` by :class:`LimitReached`, where the system has such an alarm."""
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            yield
            return

        is_over = False

        def stop(number: int, frame: Any) -> None:
            if not is_over:
                raise LimitReached

        before = signal.signal(signal.SIGALRM, stop)
        # every second from then on: an exception inside a destructor is lost
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3), 1.0)
        try:
            yield
        finally:
            is_over = True
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def repeated(call: Callable[[], Any], device: torch.device, seconds: float, at_most: int = 5) -> list[float]:
    """Times of a call, as many as fit into some seconds; the first is a warm-up, counted only if no other fits."""
    first = seconds_of(call, device)
    times: list[float] = []
    spent = first
    while len(times) < at_most and spent + max([first, *times]) <= seconds:
        times.append(seconds_of(call, device))
        spent += times[-1]
    return times or [first]
