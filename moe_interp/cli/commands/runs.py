"""The finished cells of a run, in its folder: going on from them, and what is said of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from moe_interp.cli import console
from moe_interp.cli.startup import INTERRUPTED
from moe_interp.results.cells import CellFolder, CellStore

# option -> the entry of a store's plan that it sets; DATA stands for the items or sequences
DATA = "data"
ENTRIES = {
    "--model": "model.weights",
    "--dtype": "model.number format",
    "--items": DATA,
    "--sequences": DATA,
    "--domains": DATA,
    "--first": DATA,
    "--per-domain": DATA,
    "--prompt-field": DATA,
    "--answer-field": DATA,
    "--layers": "layers",
    "--experts": "experts",
    "--mode": "mode",
    "--random-draws": "random_draws",
    "--routes": "n_routes",
    "--sampler": "sampler",
    "--tau": "sampler",
    "--pool": "sampler",
    "--controls": "controls",
    "--method": "method",
    "--memory": "batches",
    "--seed": "seed",
    "--max-tokens": "max_tokens",
    "--problems": DATA,
    "--domain-field": DATA,
    "--temperature": "temperature",
    "--top-p": "top_p",
    "--max-new-tokens": "max_new_tokens",
    "--stop": "stop",
    "--checker": "is_correct",
    "--generate": "generate",
    "--logits": "logits",
    "--inputs": "inputs",
    "--norms": "norms",
    "--accumulate": "accumulate",
    "--tables": "accumulate",
    "--format": "format",
    "--batch-invariant": "batch_invariant",
}


def cell_folder(context: typer.Context, path: Path, data: str) -> CellFolder:
    """A folder for cells, with the running command's options: those that differ are named where cells are refused.

    Args:
        context: Of the running command.
        path: The folder.
        data: What the plan calls the data: "items" or "sequences".
    """
    given: dict[str, tuple[str, Any]] = {}
    for parameter in context.command.params:
        option = next((name for name in parameter.opts if name in ENTRIES), None)
        if option and parameter.name:
            value = context.params.get(parameter.name)
            entry = data if ENTRIES[option] == DATA else ENTRIES[option]
            given[option] = (entry, [str(part) for part in value] if isinstance(value, list | tuple) else value)
    return CellFolder(path, given)


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
