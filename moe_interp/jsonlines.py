"""Reading JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_interp.disk import parse_json, read_bytes
from moe_interp.errors import DataError

LARGEST_LINES = 2**32  # bytes of a file of lines


def read_json_lines(path: Path, expected: str) -> Iterator[tuple[int, Any]]:
    """``(line number, value)`` of each line that is not blank. UTF-8; a byte-order mark is passed over.

    Args:
        path: The file.
        expected: What it should hold, for the errors.

    Raises:
        DataError: No such file, not UTF-8, or a line that is not JSON (its number is named).
    """
    if not path.is_file():
        raise DataError(f"{path}, which is not a file", expected, "Check the path.")
    try:
        text = read_bytes(path, expected, limit=LARGEST_LINES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}", f"{expected}, in UTF-8", "Convert the file.") from error
    # at line feeds only: JSON strings may hold the other separators that splitlines() cuts at
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                remedy = ONE_A_LINE if _is_json(text) else "Correct the line."
                raise DataError(f"{path}, line {number}: {error}", expected, remedy) from error
            yield number, value


ONE_A_LINE = "The file is one JSON document: write one object a line instead (jq -c '.[]' does so for a list)."


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True
