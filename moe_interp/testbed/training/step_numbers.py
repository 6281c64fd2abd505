"""What one optimiser step gave, read from the device only when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

NUMBERS = ("loss", "auxiliary", "dropped_slots")


class StepNumbers(Mapping[str, Any]):
    """``loss``, ``auxiliary``, ``dropped_slots`` and ``lr``, numbers, and ``loads``, ``[expert]`` of each layer.

    The first of the first three that is read waits for the device, and so for the step.

    Args:
        totals: ``[3]``, on the device.
        check: Called before the first is handed out.
        known: What is known without a wait.
    """

    def __init__(self, totals: Tensor, check: Callable[[], None], **known: Any) -> None:
        self._totals, self._check = totals, check
        self._values = known

    def __getitem__(self, name: str) -> Any:
        if name in NUMBERS and name not in self._values:
            self._check()
            self._values |= zip(NUMBERS, self._totals.tolist())
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*NUMBERS, *(name for name in self._values if name not in NUMBERS)))

    def __len__(self) -> int:
        return len(list(iter(self)))
