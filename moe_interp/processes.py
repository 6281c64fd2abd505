"""The processes that share a run out: accelerate's, as ``accelerate launch`` starts them."""

from __future__ import annotations

import atexit
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor


def accelerator() -> Accelerator:
    """For processes and devices. Its precision, which a process has one of, is not used: each run has its own."""
    try:
        made = Accelerator(mixed_precision="no")
    except ValueError:  # the process has an Accelerator of another precision already
        made = Accelerator()
    if made.num_processes > 1:
        atexit.unregister(_end_process_group)
        atexit.register(_end_process_group)
    return made


def summed(processes: Accelerator, values: Tensor) -> Tensor:
    """The sum over all processes, where the values are; of one process the values themselves."""
    if processes.num_processes == 1:
        return values
    total: Tensor = processes.reduce(values.to(processes.device), "sum")
    return total.to(values)


def gathered(processes: Accelerator, values: list[Any]) -> list[Any]:
    """All processes' values in one list, in the order of the processes."""
    return values if processes.num_processes == 1 else list(gather_object(values))


def _end_process_group() -> None:
    """Before Python ends: a communication thread that is still alive then can abort the process."""
    PartialState().destroy_process_group()
