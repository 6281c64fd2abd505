"""Reading JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_interp.errors import DataError


def read_json_lines(path: Path, expected: str) -> Iterator[tuple[int, Any]]:
    """``(line number, value)`` of each line that is not blank. UTF-8; a byte-order mark is passed over.

    Args:
        path: The file.
        expected: What it should hold, for the errors.

    Raises:
        DataError: No such file, not UTF-8, or a line that is not JSON (its number is named).
    """
    if path.is_dir() or not path.exists():
        raise DataError(f"{path}, which is not a file", expected, "Check the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error}", expected, "Check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}", f"{expected}, in UTF-8", "Convert the file.") from error
    # at line feeds only: JSON strings may hold the other separators that splitlines() cuts at
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                remedy = ONE_A_LINE if _is_json(text) else "Correct the line."
                raise DataError(f"{path}, line {number}: {error}", expected, remedy) from error
            yield number, value


ONE_A_LINE = "The file is one JSON document: write one object a line instead (jq -c '.[]' does so for a list)."


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
