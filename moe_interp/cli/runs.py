"""What the commands that run experiments share: their folder, its finished cells, and options of one meaning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_interp.cli import console
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.results.cells import CellStore
from moe_interp.results.files import check_folder


def check_out(out: Path) -> None:
    """Refuse, before anything runs, a folder that cannot be one.

    Raises:
        ResultError: it is a file, or would lie in one.
    """
    check_folder(out, "a folder to write to")


def layer_labels(moe: MoEHooks, layers: str | None) -> list[Any] | None:
    """``--layers`` such as "0, 3,-1"; None for all."""
    return None if layers is None else [moe.layer_label(part.strip()) for part in layers.split(",")]


def memory_bytes(gib: float | None) -> int | None:
    """``--memory`` in bytes.

    Raises:
        ConfigError: not a positive number.
    """
    if gib is None:
        return None
    if not math.isfinite(gib) or gib <= 0:
        raise ConfigError(f"--memory {gib}", "a positive number of GiB", "Leave it out for the default.")
    return int(gib * 2**30)


@contextmanager
def finished_cells(store: Path, resume: bool = True) -> Iterator[None]:
    """A run that keeps its cells in a folder: with ``resume`` it goes on from those there, else they are deleted.

    It says what an interrupted run goes on from, and what was not computed again.
    """
    if not resume:
        CellStore.clear(store)
    before = CellStore.finished(store)
    try:
        yield
    except KeyboardInterrupt:
        console.say(f"Interrupted. The same command goes on from the finished cells in {store}.")
        raise
    if before:
        console.say(f"{before} of {CellStore.finished(store)} cells were finished before, in {store}.")
