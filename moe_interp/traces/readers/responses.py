"""Responses of a server, saved as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_interp.disk import read_json
from moe_interp.errors import DataError
from moe_interp.jsonlines import read_json_lines


def read_responses(path: Path, expected: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``(where, response)`` of a ``.json`` file, which holds one or a list of them, or of each line of a ``.jsonl``.

    Raises:
        DataError: not JSON, or no objects; names the line.
    """
    if path.suffix == ".jsonl":
        found = [(f"{path}, line {number}", value) for number, value in read_json_lines(path, expected)]
    else:
        whole = read_json(path, expected)
        several = whole if isinstance(whole, list) else [whole]
        found = [(f"{path}, response {number}", value) for number, value in enumerate(several)]
    if not found:
        raise DataError(f"{path}, without a response", expected, "Check the file.")
    for where, value in found:
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: {str(value)[:40]!r}", expected, "Save the server's responses as they are.")
        yield where, value


def field(value: Any, name: str) -> Any:
    """A key of a mapping, or an attribute of an object; None where it has none."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
