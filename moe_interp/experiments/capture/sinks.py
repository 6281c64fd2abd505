"""What takes the parts of a capture: memory, a folder of parts, or counts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_interp.errors import DataError, ResultError, warn
from moe_interp.experiments.capture.folder import CaptureFolder
from moe_interp.experiments.capture.options import CaptureOptions
from moe_interp.experiments.capture.sequences import CapturedSequence
from moe_interp.traces import RoutingCounts, RoutingTrace
from moe_interp.traces.part_files import COUNTS, part_name

UNFINISHED = "counts-" + "[0-9]" * 5 + ".npz"
SECONDS = 30.0  # between two writes of counts, which are written whole each time


class DamagedPartWarning(UserWarning):
    """A finished part that is missing or cut short, and is recorded again."""


class Sink(ABC):
    """Takes the parts of a capture."""

    @abstractmethod
    def has(self, number: int, sequences: Sequence[CapturedSequence]) -> bool:
        """Whether a part is there already."""

    @abstractmethod
    def add(self, number: int, sequences: Sequence[CapturedSequence], trace: RoutingTrace) -> None:
        """Keep a part."""

    def flush(self) -> None:  # noqa: B027 - most have nothing to write late
        """Write what was kept for later; also after an interruption."""

    @abstractmethod
    def finish(self, n_parts: int) -> Any:
        """All parts are there: what the capture returns."""


class TraceInMemory(Sink):
    """One trace of all parts."""

    def __init__(self) -> None:
        self.parts: list[RoutingTrace] = []

    def has(self, number: int, sequences: Sequence[CapturedSequence]) -> bool:
        return False

    def add(self, number: int, sequences: Sequence[CapturedSequence], trace: RoutingTrace) -> None:
        self.parts.append(trace)

    def finish(self, n_parts: int) -> RoutingTrace:
        return self.parts[0] if len(self.parts) == 1 else RoutingTrace.concatenate(self.parts)


class PartsOnDisk(Sink):
    """A file a part."""

    def __init__(self, folder: CaptureFolder, format: str) -> None:
        self.folder, self.format = folder, format

    def has(self, number: int, sequences: Sequence[CapturedSequence]) -> bool:
        if not self.folder.has(number, sequences):
            return False
        record = self.folder.records[number]
        file = self.folder.path / str(record["file"])
        if file.is_file() and file.stat().st_size == record["bytes"]:
            return True
        # a part is recorded again by itself: those after it stay
        warn(f"{file} is missing or was cut short: it is recorded again", DamagedPartWarning)
        return False

    def add(self, number: int, sequences: Sequence[CapturedSequence], trace: RoutingTrace) -> None:
        self.folder.begin()
        file = trace.save(self.folder.path / f"{part_name(number)}.{self.format}")
        self.folder.note(number, sequences, trace.n_tokens, file)

    def finish(self, n_parts: int) -> Path:
        self.folder.complete(n_parts)
        return self.folder.path


class CountsOnly(Sink):
    """Counts of all parts; with a folder, written there every so often and when the run ends, however it ends.

    Counts of the first n parts are in ``counts-{n}.npz`` until the capture is complete, then in ``counts.npz``.
    """

    def __init__(self, options: CaptureOptions, n_experts: int, folder: CaptureFolder | None) -> None:
        self.folder, self.options = folder, options
        self.tables = None if options.all_tables else options.tables
        self.counts = RoutingCounts(options.numbers, n_experts, self.tables)
        self._pending: list[tuple[int, Sequence[CapturedSequence], int]] = []
        self._written = time.monotonic()
        self._is_whole = True  # false where an update was interrupted
        if folder is not None and folder.records:
            self._load(folder)

    def _load(self, folder: CaptureFolder) -> None:
        n, name = len(folder.records), COUNTS
        if not folder.is_complete:
            written = sorted(int(file.stem[7:]) for file in folder.path.glob(UNFINISHED))
            before = [m for m in written if m <= n]
            if written and n not in written:  # a write was cut short between the counts and the notes of their parts
                folder.forget(before[-1] if before else 0)
            if written and not before:
                return
            name = _counts_of(len(folder.records))
        try:
            self.counts = RoutingCounts.load(folder.path / name)
        except (ResultError, DataError) as error:
            warn(f"{error.given}: counting begins again", DamagedPartWarning)
            folder.forget(0)

    def has(self, number: int, sequences: Sequence[CapturedSequence]) -> bool:
        return self.folder is not None and self.folder.has(number, sequences)

    def add(self, number: int, sequences: Sequence[CapturedSequence], trace: RoutingTrace) -> None:
        self._is_whole = False
        self.counts.update(trace)
        self._is_whole = True
        if self.folder is None:
            return
        self._pending.append((number, sequences, trace.n_tokens))
        if time.monotonic() > self._written + SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.folder is None or not self._pending or not self._is_whole:
            return
        folder, before = self.folder, len(self.folder.records)
        folder.begin()
        self.counts.save(folder.path / _counts_of(before + len(self._pending)))
        for number, sequences, n_tokens in self._pending:
            folder.note(number, sequences, n_tokens, None)
        self._pending, self._written = [], time.monotonic()
        with suppress(OSError):
            (folder.path / _counts_of(before)).unlink(missing_ok=True)

    def finish(self, n_parts: int) -> RoutingCounts:
        if self.folder is not None:
            self.flush()
            if not self.folder.is_complete:
                self.counts.save(self.folder.path / COUNTS)
            self.folder.complete(n_parts)
            for file in self.folder.path.glob(UNFINISHED):
                with suppress(OSError):
                    file.unlink()
        return self.counts


def _counts_of(n_parts: int) -> str:
    return f"counts-{n_parts:05d}.npz"
