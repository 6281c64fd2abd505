"""Finished cells of a long run, on disk: what is done is kept, whatever happens to the rest."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_interp.disk import read_json
from moe_interp.errors import MoEInterpError, ResultError
from moe_interp.results.files import check_folder, replacing
from moe_interp.results.npz import npz_arrays, npz_bytes
from moe_interp.results.plans import Options, difference
from moe_interp.results.seals import read_sealed

Arrays = dict[str, NDArray[Any]]

PLAN = "plan.json"
OWNER = "moe_interp_cell"  # the entry of a cell that says of which plan and place it is


class DamagedCellWarning(UserWarning):
    """A finished cell that cannot be read, or is not of this run, and is computed again."""


@dataclass(frozen=True)
class CellFolder(os.PathLike[str]):
    """A folder for finished cells, with the command line's options that belong to the run in it.

    Attributes:
        path: The folder.
        options: Option -> (the entry of the plan that it sets, its value): named where a run is refused.
    """

    path: Path
    options: Options = field(default_factory=dict)

    def __fspath__(self) -> str:
        return str(self.path)


class CellStore:
    """A folder of finished cells that belong to one plan.

    The folder and the plan in it are written with the first cell: a run that fails before leaves nothing behind.

    Args:
        path: The folder; made if it does not exist. A :class:`CellFolder` brings the options of the command line.
        plan: What the run computes, as JSON values: see :mod:`moe_interp.results.plans`. Cells of another plan are
            refused, not mixed in.

    Raises:
        ResultError: the folder is a file, or holds cells of another plan or of none. The message names the options
            that differ.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Mapping[str, Any]) -> None:
        self.path = check_folder(path, "a folder for finished cells")
        self.plan: dict[str, Any] = json.loads(json.dumps(plan))
        self.options: Options = dict(path.options) if isinstance(path, CellFolder) else {}
        self._check()

    def _check(self) -> None:
        """Refuse a folder that belongs to another run."""
        what = None
        self._is_planned = os.path.lexists(self.path / PLAN)
        if self._is_planned:
            stored = _read_plan(self.path)
            if stored is None:
                what = "its plan cannot be read"
            else:
                what = difference(stored[0], self.plan, stored[1], self.options)
        elif any(self.path.glob("*.npz")):
            what = "they are without a plan"
        if what:
            raise ResultError(
                f"{self.path} holds cells of another run ({what})",
                "cells of the same model, items and options",
                "Choose another folder, delete this one's cells (as --no-resume does on the command line), or repeat "
                "the run with its options.",
            )

    @staticmethod
    def finished(path: str | os.PathLike[str]) -> int:
        """How many finished cells of layers a folder holds, of whatever plan; what layers share is not counted."""
        return sum(1 for _ in Path(path).glob("*[0-9].npz"))

    @staticmethod
    def clear(path: str | os.PathLike[str]) -> None:
        """Delete the cells and the plan of a folder; what else is in it stays.

        Raises:
            ResultError: the folder is a file, or the system refuses.
        """
        folder = check_folder(path, "a folder of finished cells")
        try:
            # the plan last: without it, cells that are left would be nobody's
            for file in [*folder.glob("*.npz"), *folder.glob(".*.part"), folder / PLAN]:
                if os.path.lexists(file) and not file.is_dir():
                    file.unlink()
        except OSError as error:
            given = f"{str(folder)!r} could not be cleared: {error.strerror or error}"
            raise ResultError(
                given, "permission to delete its cells", "Delete it, or choose another folder."
            ) from error

    @staticmethod
    def batches_of(path: str | os.PathLike[str], n: int) -> list[list[int]] | None:
        """The plan's batches of ``n`` things, so that a run resumes whatever memory is free now; None if it has none.

        Cells of another plan are refused later, when the store is opened.
        """
        stored = _read_plan(Path(path))
        try:
            batches = stored[0]["batches"] if stored else []
            is_whole = sorted(i for batch in batches for i in batch) == list(range(n)) and all(batches)
        except (KeyError, TypeError):
            return None
        return batches if is_whole else None

    def load(self, *key: Any) -> Arrays | None:
        """The arrays of a finished cell; None where it is still to do. One that is damaged, or of another run or place,
        is to do again, with a :class:`DamagedCellWarning`."""
        file = self._file(key)
        if not os.path.lexists(file):
            return None
        try:
            arrays = npz_arrays(read_sealed(file, "a finished cell", "It is computed again."))
            if arrays.pop(OWNER).item() == self._owner(file.name):
                return arrays
            reason = "it is of another run, or was renamed"
        except MoEInterpError as error:
            reason = error.given
        except Exception as error:  # numpy and zipfile raise errors of any class
            reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"The cell {file.name} is computed again: {reason}", DamagedCellWarning, stacklevel=2)
        return None

    def save(self, arrays: Arrays, *key: Any) -> None:
        """Keep a finished cell, whole or not at all; before the first one, the plan.

        Raises:
            ResultError: the system refuses a write, or another run has begun in the folder meanwhile.
        """
        if not self._is_planned:
            self._check()
        if not self._is_planned:
            content = {"plan": self.plan, "options": {name: list(value) for name, value in self.options.items()}}
            with replacing(self.path / PLAN) as out:
                out.write(json.dumps(content | {"checksum": _digest(content)}, indent=1).encode())
            self._is_planned = True
        file = self._file(key)
        with replacing(file) as out:
            out.write(npz_bytes({**arrays, OWNER: np.array(self._owner(file.name))}))

    def _file(self, key: tuple[Any, ...]) -> Path:
        return self.path / ("-".join(str(part) for part in key) + ".npz")

    def _owner(self, name: str) -> str:
        return f"{_digest(self.plan)} {name}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_plan(path: Path) -> tuple[dict[str, Any], Options] | None:
    """The plan in a folder, and the options beside it; None where they cannot be read or were changed."""
    try:
        content = read_json(path / PLAN, "a plan", error=ResultError)
        if content.pop("checksum") != _digest(content):
            return None
        return dict(content["plan"]), {name: (entry, value) for name, (entry, value) in content["options"].items()}
    except (ResultError, AttributeError, KeyError, TypeError, ValueError):
        return None
