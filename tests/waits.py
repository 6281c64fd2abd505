"""Counting what makes the host wait for the device, on any device: also on a CPU, where nothing is waited for."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# these read values on the host; tolist and numpy of a tensor on the CPU pass no dispatcher
_METHODS = ("tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Waits(TorchDispatchMode):
    """Inside the ``with``, notes each operation that a GPU must finish before the host can go on.

    Attributes:
        seen: One line each: what, and from where.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.is_paused = False

    def note(self, name: str) -> None:
        if self.is_paused:
            return
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.seen.append(f"{name} at {frames[-1].filename}:{frames[-1].lineno}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default:
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                self.note(str(func))
        elif _TAGS & set(func.tags):
            self.note(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """What made the host wait, in the code run inside."""
    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        for name in _METHODS:
            patch.setattr(Tensor, name, _noting(waits, name))
        patch.setattr(torch.nn.functional, "one_hot", _pausing(waits, torch.nn.functional.one_hot))
        yield waits.seen


def _noting(waits: Waits, name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def noting(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        waits.note(f"Tensor.{name}")
        return method(self, *args, **kwargs)

    return noting


def _pausing(waits: Waits, one_hot: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Given the number of classes, it looks at the ids on a CPU only."""

    def pausing(tensor: Tensor, num_classes: int = -1) -> Tensor:
        waits.is_paused = num_classes > 0
        try:
            return one_hot(tensor, num_classes)
        finally:
            waits.is_paused = False

    return pausing
