"""Reading recorded routing part by part, so that a corpus of any size can be measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_interp.traces.part_files import part_files, reading_a_part
from moe_interp.traces.trace import RoutingTrace


def read_parts(path: str | Path) -> Iterator[RoutingTrace]:
    """The parts of a recorded folder, each of whole sequences, one in memory at a time; a single file gives itself.

    Args:
        path: A folder that ``capture_routing(out=...)`` wrote, or a trace file (npz or parquet).

    Yields:
        Traces in the order of the sequences. Each counts its own sequences from 0.

    Raises:
        ResultError: no such file or folder, a folder of something else or of counts, or a part that is missing or
            damaged (it is named).

    Warns:
        IncompleteCaptureWarning: a capture that was not finished.
    """
    if not Path(path).is_dir():
        return iter([RoutingTrace.read(path)])
    files = part_files(path)
    return (_read(file) for file in files)


def _read(file: Path) -> RoutingTrace:
    with reading_a_part():
        return RoutingTrace.read(file)
