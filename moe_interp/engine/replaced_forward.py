"""Another forward for a module, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def forward_slot(module: nn.Module) -> str:
    """Where the instance keeps its forward: accelerate's, which moves weights in, wraps one in another attribute."""
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= module.__dict__.keys() else "forward"


@contextmanager
def swapped_forward(module: nn.Module, forward: Callable[..., Any], slot: str = "forward") -> Iterator[None]:
    """Another forward for a module inside the ``with``; its own again after, also after an exception.

    Args:
        module: The module.
        forward: In the place of its own.
        slot: ``"forward"`` goes past what accelerate does around a forward, :func:`forward_slot` inside of it.
    """
    with swapped_forwards([(module, forward)], slot):
        yield


@contextmanager
def swapped_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]], slot: str = "forward") -> Iterator[None]:
    """As :func:`swapped_forward`, of many modules at once: around every pass, where a context each would cost."""
    before = []
    try:
        for module, forward in forwards:
            # in the instance's own dictionary, past the redirection of TransformerLens' components
            before.append((module.__dict__, module.__dict__.get(slot)))
            module.__dict__[slot] = forward
        yield
    finally:
        for own, had in reversed(before):
            del own[slot]
            if had is not None:
                own[slot] = had
