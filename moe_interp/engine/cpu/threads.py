"""How OpenMP's threads wait for work while a pass runs: asleep, and not in a loop.

By default a thread that has done its part of an operation turns in a loop for some milliseconds before it sleeps. A
pass is thousands of small operations, so its threads turn all the time. That costs nothing where the cores have nothing
else to do. Beside other programs, which hold the core that the others wait for, a pass costs several times the work of
one thread.

Environment variables change this if they are set before torch is loaded; the command line does. In a process that has
loaded torch, :func:`threads_asleep` does.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import Any

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""The variables by which users say how threads wait. Where one is set, nothing is changed."""


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Sets what makes threads sleep in processes that load OpenMP later, unless the user has said how they wait."""
    if not any(name in environment for name in WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


@contextmanager
def threads_asleep() -> Iterator[None]:
    """Within it, OpenMP's threads sleep where they would wait in a loop. Also a decorator.

    GNU's OpenMP (torch's on Linux) has no call for it, but waits briefly (100 turns instead of 300,000) while it has
    more threads than there are cores. So it is given idle ones, which end with the block. LLVM's and Intel's have a
    call. With others, with one thread, and where the user has set one of :data:`WAITING`, nothing is changed.
    """
    if any(name in os.environ for name in WAITING):
        yield
        return
    library = _openmp()
    if hasattr(library, "kmp_set_blocktime"):
        before = library.kmp_get_blocktime()
        library.kmp_set_blocktime(0)
        try:
            yield
        finally:
            library.kmp_set_blocktime(before)
    elif hasattr(library, "GOMP_parallel") and library.omp_get_max_threads() > 1:
        _idle.enter(library)
        try:
            yield
        finally:
            _idle.leave()
    else:
        yield


class _IdleThreads:
    """Threads of GNU's OpenMP that have nothing to do, so many that all together outnumber the cores.

    They belong to a Python thread of their own and end with it. Blocks that overlap share them.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks = 0
        self._done = Event()

    def enter(self, library: Any) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks > 1:
                return
            # a team counts its threads but for the one that calls, and the pass has a team of its own
            team = library.omp_get_num_procs() - library.omp_get_max_threads() + 2
            ready, self._done = Event(), Event()
            Thread(target=self._hold, args=(library, team, ready, self._done), daemon=True).start()
            ready.wait()

    def leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                self._done.set()

    @staticmethod
    def _hold(library: Any, team: int, ready: Event, done: Event) -> None:
        if team > 1:
            # a parallel region of which every thread asks for its number: some call of C without an effect
            library.GOMP_parallel(library.omp_get_thread_num, None, team, 0)
        ready.set()
        done.wait()


_idle = _IdleThreads()


def _openmp() -> Any:
    """The functions of the OpenMP that is loaded; None where C functions cannot be looked up."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
