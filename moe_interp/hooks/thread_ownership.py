"""Threads on one attached bridge: whose pass runs, and with whose hooks.

Hook points belong to the bridge, so a hook that one thread adds for its own pass would fire in the pass of another.
Passes without hooks, or with hooks that all threads share (``bridge.add_hook``), may run side by side: what a pass
computes is kept by thread. A thread with hooks of its own (``run_with_hooks``, ``run_with_cache``, ``hooks()``) has the
bridge for itself until they are gone; what comes second is refused. So has a thread that measures the model with other
forwards or modes in its modules (:meth:`ThreadOwnership.held`), together with the threads that work for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint, LensHandle

from moe_interp.errors import HookError


class PerThread(threading.local):
    """Something a thread has to itself; a copy of the model begins without it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


def is_in_backward() -> bool:
    """Whether autograd runs this code: it may compute a checkpointed layer again, in a thread of its own."""
    return torch._C._current_graph_task_id() != -1


_working = threading.local()


def work_for(thread: int) -> None:
    """From now on this thread works for another one, by its number, and may do on a model what that one may."""
    _working.thread = thread


def acting_thread() -> int:
    """The number of the thread that this one works for; its own where that is none."""
    thread: int = getattr(_working, "thread", threading.get_ident())
    return thread


class ThreadOwnership:
    """The passes that run on one attached bridge.

    Args:
        model: The transformers model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.points: Sequence[HookPoint] = ()
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose own hooks may be on the points
        self._holder: int | None = None  # the thread that has the model for itself
        self._passes: dict[int, int] = {}  # by thread, how many passes it is inside of

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadOwnership:
        new = type(self)(memo.get(id(self.model), self.model))
        memo[id(self)] = new
        return new

    def __reduce__(self) -> Any:
        return type(self), (self.model,)

    def claim(self) -> None:
        """This thread is about to add hooks of its own.

        Raises:
            HookError: another thread has hooks of its own on the points, or runs a pass.
        """
        with self._lock:
            self._claim()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the ``with``, this thread has the model for itself: it may put something else in its modules.

        Raises:
            HookError: another thread has hooks of its own on the points, runs a pass, or has the model for itself.
        """
        with self._lock:
            self._claim()
            before, self._holder = self._holder, acting_thread()
        try:
            yield
        finally:
            self._holder = before

    def _claim(self) -> None:
        me = threading.get_ident()
        self._refuse_hooks_of_others(me)
        for thread in [t for t in self._passes if t != me]:
            if self._is_inside(thread):
                raise _refusal(f"hooks for a pass in this thread, while {_name(thread)} runs one")
            del self._passes[thread]
        self._owner = me

    def begin(self) -> None:
        """A pass of the model begins in this thread.

        Raises:
            HookError: another thread has hooks of its own on the points.
        """
        me = threading.get_ident()
        with self._lock:
            self._refuse_hooks_of_others(me)
            self._passes[me] = self._passes.get(me, 0) + 1

    def end(self) -> None:
        """It has ended, also by an exception."""
        me = threading.get_ident()
        with self._lock:
            left = self._passes.get(me, 0) - 1
            if left > 0:
                self._passes[me] = left
            else:
                self._passes.pop(me, None)

    def check(self) -> None:
        """A layer is run by this thread.

        Raises:
            HookError: another thread's own hooks are on the points.
        """
        if self._owner not in (None, threading.get_ident()):
            with self._lock:
                self._refuse_hooks_of_others(threading.get_ident())

    def _refuse_hooks_of_others(self, me: int) -> None:
        if self._holder not in (None, acting_thread()) and not is_in_backward():
            raise _refusal(f"a second thread, while {_name(self._holder)} measures the model")
        if self._owner in (None, me) or is_in_backward():
            return
        if _is_alive(self._owner) and any(_is_temporary(h) for p in self.points for h in (*p.fwd_hooks, *p.bwd_hooks)):
            raise _refusal(f"a second thread, while {_name(self._owner)} has hooks of its own on the model")
        self._owner = None

    def _is_inside(self, thread: int) -> bool:
        """Whether a thread is still in a pass; an interruption may have ended it unseen."""
        frame = sys._current_frames().get(thread)
        if frame is None or getattr(self.model, "_compiled_call_impl", None) is not None:
            return frame is not None
        while frame is not None:
            if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is self.model:
                return True
            frame = frame.f_back
        return False


class LayerHookPoint(HookPoint):
    """A hook point that keeps threads apart."""

    ownership: ThreadOwnership | None = None

    def add_hook(
        self,
        hook: Any,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> LensHandle:
        """As TransformerLens' own; hooks for one pass only are refused while another thread is at work.

        Raises:
            HookError: another thread runs a pass, or has hooks of its own.
        """
        if level is not None and self.ownership is not None:
            self.ownership.claim()
        return super().add_hook(hook, dir, is_permanent, level, prepend, alias_names)


def _is_temporary(handle: LensHandle) -> bool:
    return handle.context_level is not None


def _is_alive(thread: int | None) -> bool:
    return any(t.ident == thread for t in threading.enumerate())


def _name(thread: int | None) -> str:
    return next((f"thread {t.name!r}" for t in threading.enumerate() if t.ident == thread), "another thread")


def _refusal(given: str) -> HookError:
    return HookError(
        given,
        "one thread at a time with hooks of its own",
        "Run them one after the other (a lock around each call), give each thread its own copy of the bridge "
        "(copy.deepcopy), or share hooks between threads with bridge.add_hook.",
    )
