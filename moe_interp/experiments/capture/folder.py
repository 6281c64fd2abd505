"""A folder of captured routing: whose it is, and which of its parts are finished."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_interp.errors import ResultError
from moe_interp.experiments.capture.sequences import CapturedSequence
from moe_interp.results import checksum
from moe_interp.results.cells import CellFolder
from moe_interp.results.files import check_folder
from moe_interp.results.plans import Options, difference
from moe_interp.traces.part_files import (
    FORMAT,
    FORMAT_KEY,
    MANIFEST,
    part_name,
    part_records,
    read_manifest,
    write_json,
)

OURS = ("part-*.json", "part-*.parquet", "part-*.npz", "counts*.npz", ".*.part", MANIFEST)  # the manifest last


class CaptureFolder:
    """A folder that belongs to one capture: its manifest and the notes of its finished parts.

    The folder and its manifest are written with the first part, and what they replace is deleted then: a run that fails
    before leaves everything as it was.

    Args:
        path: The folder. A :class:`CellFolder` brings the options of the command line.
        plan: What the capture is known by: see :mod:`moe_interp.results.plans`.
        about: What else the manifest says.
        resume: Go on with what is there; else it is replaced.

    Attributes:
        records: What is noted of each finished part.

    Raises:
        ResultError: a file, a folder of something else, or a capture of another plan (what differs is named).
    """

    def __init__(
        self, path: str | os.PathLike[str], plan: Mapping[str, Any], about: Mapping[str, Any], resume: bool
    ) -> None:
        self.path = check_folder(path, "a folder for recorded routing")
        options: Options = dict(path.options) if isinstance(path, CellFolder) else {}
        self.content: dict[str, Any] = {
            FORMAT_KEY: FORMAT,
            "plan": dict(plan),
            "options": {name: list(value) for name, value in options.items()},
            "about": dict(about),
        }
        self.is_complete, self._is_begun, self._is_replaced = False, False, False
        self.records: list[dict[str, Any]] = []
        if not self.path.is_dir() or not any(not name.startswith(".") for name in os.listdir(self.path)):
            return
        if not (self.path / MANIFEST).is_file():
            raise ResultError(
                f"{str(self.path)!r}, which holds something else ({sorted(os.listdir(self.path))[0]})",
                "a new or empty folder, or one of an earlier capture",
                "Choose another folder.",
            )
        if not resume:
            self._is_replaced = True
            return
        manifest = read_manifest(self.path)
        there = {name: (entry, value) for name, (entry, value) in manifest["options"].items()}
        if what := difference(manifest["plan"], self.content["plan"], there, options):
            raise ResultError(
                f"{str(self.path)!r} holds another capture ({what})",
                "a capture of the same model with the same options",
                "Choose another folder, pass resume=False to replace it, or repeat the run with its options.",
            )
        self.records, self._is_begun = part_records(self.path), True
        self.is_complete = bool(manifest["is_complete"])

    def has(self, number: int, sequences: Sequence[CapturedSequence]) -> bool:
        """Whether a part of these sequences is finished.

        Raises:
            ResultError: it is, of other sequences.
        """
        if number >= len(self.records):
            return False
        if self.records[number]["inputs"] != inputs_checksum(sequences):
            raise ResultError(
                f"{str(self.path)!r}, whose part {number} is of other sequences than {sequences[0].place} to "
                f"{sequences[-1].place}",
                "a capture of the same sequences in the same order",
                "Choose another folder, or pass resume=False to replace it.",
            )
        return True

    def note(self, number: int, sequences: Sequence[CapturedSequence], n_tokens: int, file: Path | None) -> None:
        """A part is finished."""
        self.begin()
        record = {
            "sequences": [one.id for one in sequences],
            "tokens": n_tokens,
            "inputs": inputs_checksum(sequences),
            **({} if file is None else {"file": file.name, "bytes": file.stat().st_size}),
        }
        write_json(self.path / f"{part_name(number)}.json", record)
        self.records[number : number + 1] = [record]

    def begin(self) -> None:
        """The folder and its manifest are there from here on, and say that more is being recorded."""
        if self.is_complete or not self._is_begun:
            self.is_complete = False
            if self._is_replaced:
                self._clear()
                self._is_replaced = False
            self._write_manifest()

    def forget(self, number: int) -> None:
        """This part, and those after it, are to be recorded again."""
        for later in reversed(range(number, len(self.records))):
            (self.path / f"{part_name(later)}.json").unlink(missing_ok=True)
        del self.records[number:]
        self.is_complete = False
        self._write_manifest()

    def complete(self, n_parts: int) -> None:
        """All sequences are recorded.

        Raises:
            ResultError: the folder holds more of them.
        """
        if len(self.records) > n_parts:
            ids = self.records[n_parts]["sequences"]
            raise ResultError(
                f"{str(self.path)!r}, which holds {len(self.records)} parts where these sequences make {n_parts} "
                f"(sequence {ids[0]!r} is not among them)",
                "a capture of the same sequences",
                "Choose another folder, or pass resume=False to replace it.",
            )
        if not self.is_complete:
            self.is_complete = True
            self._write_manifest()
        for file in self.path.glob(".*.part"):  # of a process that was killed
            with suppress(OSError):
                file.unlink()

    def _write_manifest(self) -> None:
        totals = {"sequences": sum(len(r["sequences"]) for r in self.records), "parts": len(self.records)}
        totals["tokens"] = sum(r["tokens"] for r in self.records)
        known = {"totals": totals} if self.is_complete else {}
        write_json(self.path / MANIFEST, {**self.content, **known, "is_complete": self.is_complete})
        self._is_begun = True

    def _clear(self) -> None:
        try:
            for pattern in OURS:
                for file in self.path.glob(pattern):
                    file.unlink()
        except OSError as error:
            given = f"{str(self.path)!r} could not be cleared: {error.strerror or error}"
            raise ResultError(given, "permission to delete its files", "Choose another folder.") from error


def inputs_checksum(sequences: Sequence[CapturedSequence]) -> str:
    return checksum([one.content for one in sequences])
