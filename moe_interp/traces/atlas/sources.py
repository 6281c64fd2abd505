"""What an atlas is made of: traces, counts, files and folders of either, or one of them a domain."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.traces.counts import VERSION_KEY, RoutingCounts
from moe_interp.traces.part_files import COUNTS, is_recorded
from moe_interp.traces.parts import read_parts
from moe_interp.traces.trace import RoutingTrace

Source = RoutingTrace | RoutingCounts | str | Path


@dataclass(frozen=True)
class Unlabelled:
    """A source that is labelled by its name only where it has no labels of its own.

    Attributes:
        source: A path, a trace or counts.
        name: The label of its parts without labels.
    """

    source: Source
    name: str


def collect(
    source: Source | Mapping[str, Source | Unlabelled],
    tables: Any,
    path_length: int,
    reading: Mapping[str, Any],
    side_by_side: bool = False,
) -> tuple[RoutingCounts, RoutingTrace | None]:
    """The counts of a source, and its trace where it is in memory or is wanted.

    Args:
        source: A trace, counts, a path, or any of these by domain.
        tables, path_length: Of the counts.
        reading: Further arguments of ``RoutingTrace.read``.
        side_by_side: Keep the routes of all parts, without weights and vectors, as one trace.

    Raises:
        DataError, ResultError: nothing in it, or a file that is neither.
        ConfigError: something else.
    """
    if isinstance(source, RoutingTrace):
        return _filled(RoutingCounts.of(source, tables, path_length)), source
    whole: RoutingCounts | None = None
    kept: list[RoutingTrace] | None = [] if side_by_side else None
    for part in _labelled_parts(source, reading):
        whole = _added(whole, part, tables, path_length)
        if kept is not None:
            kept = [*kept, _routes_alone(part)] if isinstance(part, RoutingTrace) else None
    if whole is None:
        raise DataError(f"{str(source)[:200]!r} without any routes", "at least one part", "Check the path.")
    return _filled(whole), RoutingTrace.concatenate(kept) if kept else None


def _labelled_parts(
    source: Source | Mapping[str, Source | Unlabelled], reading: Mapping[str, Any]
) -> Iterator[RoutingTrace | RoutingCounts]:
    """The parts of a source under the names of its domains."""
    if not isinstance(source, Mapping):
        yield from parts_of(source, reading)
        return
    if not source:
        raise DataError("no domains", "at least one trace", "Pass {domain: trace}.")
    named: dict[str, str] = {}
    for domain, each in source.items():
        by_name = isinstance(each, Unlabelled)
        name = each.name if isinstance(each, Unlabelled) else domain
        for part in parts_of(each.source if isinstance(each, Unlabelled) else each, reading):
            if by_name and part.domains:
                yield part
                continue
            if named.setdefault(name, domain) != domain:
                raise DataError(f"two paths of the name {name!r}", "a name for each", "Name them: law=path.")
            yield part.with_domain(name) if isinstance(part, RoutingTrace) else part.labelled(name)


def _routes_alone(part: RoutingTrace) -> RoutingTrace:
    """What a comparison token by token needs."""
    unused = ("expert_weights", "expert_norms", "router_logits", "router_inputs", "predicted_ids", "phase", "domain")
    without: dict[str, Any] = dict.fromkeys(unused)
    return replace(part, **without)


def _filled(counts: RoutingCounts) -> RoutingCounts:
    """Refuse routes that use no expert anywhere."""
    if counts.fields is None or not counts.slots.any():
        raise DataError(
            f"{counts!r}, which use no expert at all",
            "routes with an expert in at least one slot",
            "Check how they were recorded: all slots are empty or not covered.",
        )
    return counts


def parts_of(source: Any, reading: Mapping[str, Any]) -> Iterator[RoutingTrace | RoutingCounts]:
    """The parts of a source, one after the other."""
    if isinstance(source, RoutingTrace | RoutingCounts):
        yield source
    elif isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            raise ResultError(f"{str(source)[:200]!r}, which does not exist", "a file or folder of routes", "Check it.")
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
