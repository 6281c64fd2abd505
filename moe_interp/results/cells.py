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
from moe_interp.results.files import replacing

Arrays = dict[str, NDArray[Any]]


class CellStore:
    """A folder of finished cells that belong to one plan.

    Args:
        path: The folder; made if it does not exist.
        plan: What the run computes, as JSON values. Cells of another plan are refused, not mixed in.

    Raises:
        ResultError: the folder cannot be made, or holds cells of another plan.
    """

    def __init__(self, path: str | Path, plan: Mapping[str, Any]) -> None:
        self.path = Path(path)
        wanted = json.dumps(plan, sort_keys=True, indent=1)
        file = self.path / "plan.json"
        if file.is_file() and (found := file.read_text(encoding="utf-8")) != wanted:
            raise ResultError(
                f"{self.path} holds cells of another run ({_difference(found, wanted)})",
                "cells of the same model, items and options",
                "Choose another folder, delete this one, or repeat the run with its options.",
            )
        with replacing(file) as out:
            out.write(wanted.encode())

    @staticmethod
    def batches_of(path: str | Path, n: int) -> list[list[int]] | None:
        """The plan's batches of ``n`` things, so that a run resumes whatever memory is free now; None if it has none.

        Cells of another plan are refused later, when the store is opened.
        """
        try:
            batches = json.loads((Path(path) / "plan.json").read_text(encoding="utf-8"))["batches"]
            is_whole = sorted(i for batch in batches for i in batch) == list(range(n))
        except (OSError, ValueError, KeyError, TypeError):
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
        """Keep a finished cell, whole or not at all."""
        with replacing(self._file(key)) as out:
            np.savez(out, allow_pickle=False, **arrays)

    def _file(self, key: tuple[Any, ...]) -> Path:
        return self.path / ("-".join(str(part) for part in key) + ".npz")


def _difference(found: str, wanted: str) -> str:
    try:
        there, here = json.loads(found), json.loads(wanted)
    except ValueError:
        return "its plan cannot be read"
    keys = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
    return "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys[:3])[:300]
