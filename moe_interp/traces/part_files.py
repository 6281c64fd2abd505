"""Folders of recorded routing: a manifest, and parts of whole sequences, each in a file of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_interp.disk import read_json
from moe_interp.errors import ResultError, warn
from moe_interp.results import checksum
from moe_interp.results.files import replacing

MANIFEST = "manifest.json"
FORMAT_KEY = "moe_interp_capture"
FORMAT = 1
COUNTS = "counts.npz"
AGAIN = "Delete the part's two files; the same capture with resume=True records it again."


class IncompleteCaptureWarning(UserWarning):
    """A recorded folder that was not finished: its parts are whole, and there would be more of them."""


def part_name(number: int) -> str:
    """``part-00012``: the name of a part's files, without their suffix."""
    return f"part-{number:05d}"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object with its checksum, whole or not at all."""
    with replacing(path) as out:
        out.write(json.dumps({**content, "checksum": checksum([content])}, indent=1).encode())


def read_checked_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """What :func:`write_json` wrote.

    Raises:
        ResultError: no such file, or it was changed.
    """
    content = read_json(path, what, remedy, ResultError)
    if not isinstance(content, dict) or content.pop("checksum", None) != checksum([content]):
        raise ResultError(f"{str(path)!r}, which was changed since it was written", what, remedy)
    return content


def is_recorded(path: str | Path) -> bool:
    """Whether a path is a folder that a capture wrote."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a recorded folder.

    Raises:
        ResultError: a folder without one, or of another version.
    """
    path = Path(folder) / MANIFEST
    what = "a folder that capture_routing(out=...) wrote"
    if not path.is_file():
        raise ResultError(f"{str(folder)!r} without a {MANIFEST}", what, "Name that folder, or one of its parts.")
    manifest = read_checked_json(path, "the manifest of a capture", "Restore it from a copy, or capture again.")
    if manifest.get(FORMAT_KEY) != FORMAT:
        raise ResultError(
            f"{str(path)!r} of format {manifest.get(FORMAT_KEY)!r}",
            f"format {FORMAT}",
            "Read it with the version of moe_interp that wrote it.",
        )
    return manifest


def part_records(folder: str | Path) -> list[dict[str, Any]]:
    """What is noted of each finished part, in order, up to the first that is not there.

    Raises:
        ResultError: a note that cannot be read.
    """
    found: list[dict[str, Any]] = []
    while os.path.lexists(path := Path(folder) / f"{part_name(len(found))}.json"):
        found.append(read_checked_json(path, "the note of a part", AGAIN))
    return found


def part_files(folder: str | Path) -> list[Path]:
    """The files of a recorded folder's parts, in the order of the sequences.

    Raises:
        ResultError: no such folder, one of something else or of counts, without a finished part, or a part that is
            missing.

    Warns:
        IncompleteCaptureWarning: a capture that was interrupted, or still runs.
    """
    manifest, folder = read_manifest(folder), Path(folder)
    if manifest["plan"].get("accumulate") is not None:
        raise ResultError(
            f"{str(folder)!r}, which holds counts",
            "a folder of parts",
            f"Load them: RoutingCounts.load({str(folder / COUNTS)!r}).",
        )
    files = [folder / str(record["file"]) for record in part_records(folder)]
    if not files:
        raise ResultError(f"{str(folder)!r} without a finished part", "at least one", "Let the capture go on.")
    for file in files:
        if not file.is_file():
            raise ResultError(f"{str(file)!r}, a part that is missing", "all parts of the capture", AGAIN)
    if not manifest["is_complete"]:
        warn(f"{folder}: the capture is not finished; {len(files)} parts are read", IncompleteCaptureWarning)
    return files


@contextmanager
def reading_a_part() -> Iterator[None]:
    """Inside the ``with``, the remedy for a damaged file is to record it again."""
    try:
        yield
    except ResultError as error:
        raise ResultError(error.given, error.expected, AGAIN) from error
