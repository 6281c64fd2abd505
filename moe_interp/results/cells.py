"""Finished cells of a long run, on disk: what is done is kept, whatever happens to the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moe_interp.errors import ResultError
from moe_interp.results.files import check_folder, replacing

Arrays = dict[str, NDArray[Any]]


PLAN = "plan.json"


class CellStore:
    """A folder of finished cells that belong to one plan.

    The folder and the plan in it are written with the first cell: a run that fails before leaves nothing behind.

    Args:
        path: The folder; made if it does not exist.
        plan: What the run computes, as JSON values. Cells of another plan are refused, not mixed in.

    Raises:
        ResultError: the folder is a file, or holds cells of another plan or of none.
    """

    def __init__(self, path: str | Path, plan: Mapping[str, Any]) -> None:
        self.path = check_folder(path, "a folder for finished cells")
        self.plan = json.dumps(plan, sort_keys=True, indent=1)
        self._is_planned = (self.path / PLAN).exists()
        difference = None
        if self._is_planned:
            difference = _difference(_read_plan(self.path), self.plan)
        elif any(self.path.glob("*.npz")):
            difference = "they are without a plan"
        if difference:
            raise ResultError(
                f"{self.path} holds cells of another run ({difference})",
                "cells of the same model, items and options",
                "Choose another folder, delete this one's cells (as --no-resume does on the command line), or repeat "
                "the run with its options.",
            )

    @staticmethod
    def finished(path: str | Path) -> int:
        """How many finished cells of layers a folder holds, of whatever plan; what layers share is not counted."""
        return sum(1 for _ in Path(path).glob("*[0-9].npz"))

    @staticmethod
    def clear(path: str | Path) -> None:
        """Delete the cells and the plan of a folder; what else is in it stays.

        Raises:
            ResultError: the folder is a file, or the system refuses.
        """
        folder = check_folder(path, "a folder of finished cells")
        try:
            # the plan last: without it, cells that are left would be nobody's
            for file in [*folder.glob("*.npz"), *folder.glob(".*.part"), folder / PLAN]:
                if file.is_file():
                    file.unlink()
        except OSError as error:
            given = f"{str(folder)!r} could not be cleared: {error.strerror or error}"
            raise ResultError(
                given, "permission to delete its cells", "Delete it, or choose another folder."
            ) from error

    @staticmethod
    def batches_of(path: str | Path, n: int) -> list[list[int]] | None:
        """The plan's batches of ``n`` things, so that a run resumes whatever memory is free now; None if it has none.

        Cells of another plan are refused later, when the store is opened.
        """
        try:
            batches = _read_plan(Path(path))["batches"]
            is_whole = sorted(i for batch in batches for i in batch) == list(range(n))
        except (KeyError, TypeError):
            return None
        return batches if is_whole else None

    def load(self, *key: Any) -> Arrays | None:
        """The arrays of a finished cell; None where it is still to do (or was cut off while being written)."""
        file = self._file(key)
        if not file.exists():
            return None
        try:
            with file.open("rb") as stream, np.load(stream) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, BadZipFile):
            return None

    def save(self, arrays: Arrays, *key: Any) -> None:
        """Keep a finished cell, whole or not at all; before the first one, the plan.

        Raises:
            ResultError: the system refuses a write.
        """
        if not self._is_planned:
            with replacing(self.path / PLAN) as out:
                out.write(self.plan.encode())
            self._is_planned = True
        with replacing(self._file(key)) as out:
            np.savez(out, allow_pickle=False, **arrays)

    def _file(self, key: tuple[Any, ...]) -> Path:
        return self.path / ("-".join(str(part) for part in key) + ".npz")


def _read_plan(path: Path) -> Any:
    """The plan in a folder; None where it cannot be read."""
    try:
        return json.loads((path / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _difference(there: Any, wanted: str) -> str | None:
    """What of a plan in a folder is not as wanted; None where all is."""
    here = json.loads(wanted)
    if not isinstance(there, dict):
        return "its plan cannot be read"
    keys = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
    return "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys[:3])[:300] or None
