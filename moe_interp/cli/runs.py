"""The finished cells of a run, in its folder: going on from them, and what is said of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from moe_interp.cli import console
from moe_interp.cli.startup import INTERRUPTED
from moe_interp.results.cells import CellStore


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
        raise typer.Exit(INTERRUPTED) from None
    if before:
        console.say(f"{before} of {CellStore.finished(store)} cells were finished before, in {store}.")
