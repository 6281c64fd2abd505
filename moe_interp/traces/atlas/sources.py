"""What an atlas is made of: traces, counts, files and folders of either, or one of them a domain."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_interp.errors import ConfigError, DataError
from moe_interp.traces.counts import VERSION_KEY, RoutingCounts
from moe_interp.traces.part_files import COUNTS, is_recorded
from moe_interp.traces.parts import read_parts
from moe_interp.traces.trace import RoutingTrace

Source = RoutingTrace | RoutingCounts | str | Path


def collect(
    source: Source | Mapping[str, Source], tables: Any, path_length: int, reading: Mapping[str, Any]
) -> tuple[RoutingCounts, RoutingTrace | None]:
    """The counts of a source, and its trace where it is a single one in memory.

    Args:
        source: A trace, counts, a path, or any of these by domain.
        tables, path_length: Of the counts.
        reading: Further arguments of ``RoutingTrace.read``.

    Raises:
        DataError, ResultError: nothing in it, or a file that is neither.
        ConfigError: something else.
    """
    if isinstance(source, Mapping):
        if not source:
            raise DataError("no domains", "at least one trace", "Pass {domain: trace}.")
        whole: RoutingCounts | None = None
        for domain, each in source.items():
            for part in parts_of(each, reading):
                named = part.with_domain(str(domain)) if isinstance(part, RoutingTrace) else part.labelled(str(domain))
                whole = _added(whole, named, tables, path_length)
        assert whole is not None
        return whole, None
    if isinstance(source, RoutingTrace):
        return RoutingCounts.of(source, tables, path_length), source
    whole = None
    for part in parts_of(source, reading):
        whole = _added(whole, part, tables, path_length)
    if whole is None:
        raise DataError(f"{str(source)!r} without any routes", "at least one part", "Check the path.")
    return whole, None


def parts_of(source: Any, reading: Mapping[str, Any]) -> Iterator[RoutingTrace | RoutingCounts]:
    """The parts of a source, one after the other."""
    if isinstance(source, RoutingTrace | RoutingCounts):
        yield source
    elif isinstance(source, str | Path):
        path = Path(source)
        if path.is_file() and is_counts_file(path):
            yield RoutingCounts.load(path)
        elif path.is_dir() and (path / COUNTS).is_file():
            yield RoutingCounts.load(path / COUNTS)
        elif path.is_dir() and not reading.get("format"):
            yield from read_parts(path) if is_recorded(path) else _files_of(path)
        else:
            yield RoutingTrace.read(path, **reading)
    else:
        raise ConfigError(
            f"routing of type {type(source).__name__}",
            "a RoutingTrace, RoutingCounts, a path, or {domain: any of these}",
            "Pass one of these.",
        )


def _files_of(path: Path) -> Iterator[RoutingTrace]:
    """The trace files in a folder that no capture wrote, in order of their names."""
    files = sorted(file for file in path.iterdir() if file.suffix in (".parquet", ".npz"))
    for file in files:
        yield RoutingTrace.read(file)


def is_counts_file(path: Path) -> bool:
    """Whether an npz archive holds counts, by the names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{VERSION_KEY}.npy" in archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False


def _added(
    whole: RoutingCounts | None, part: RoutingTrace | RoutingCounts, tables: Any, path_length: int
) -> RoutingCounts:
    if isinstance(part, RoutingTrace):
        whole = RoutingCounts(part.layers, part.n_experts, tables, path_length) if whole is None else whole
        return whole.update(part)
    if whole is None:  # a copy: what was passed stays as it is
        whole = RoutingCounts(part.layers, part.n_experts, part.tables, part.path_length)
    return whole.merge(part)
