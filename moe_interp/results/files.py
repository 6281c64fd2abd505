"""Writing a file so that a full disk or Ctrl-C leaves the earlier file as it was."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moe_interp.errors import ResultError


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` only once it is written in full.

    The bytes go to a hidden file in the same folder, are flushed to the disk, and ``os.replace`` then renames it in
    one step. On any exception, ``KeyboardInterrupt`` included, the hidden file is removed. Missing folders are made.

    Raises:
        ResultError: The system refused a write (full disk, no permission, a folder of that name).
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        kept = "The earlier file of that name is unchanged. " if target.is_file() else ""
        raise ResultError(
            f"{str(target)!r} could not be written: {_blocked(target) or error.strerror or error}",
            "a folder with room for it and permission to write",
            f"{kept}Free space or choose another path, and save again.",
        ) from error
    finally:
        with suppress(OSError):  # it would hide the error above
            part.unlink(missing_ok=True)


def check_folder(path: str | os.PathLike[str], what: str) -> Path:
    """The path of a folder that is there, or could be made.

    Raises:
        ResultError: it is a file, would lie in one, or is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ResultError(f"{path!r} of type {type(path).__name__}", what, "Pass a path.")
    folder = Path(path)
    if os.path.isfile(folder) or _blocked(folder):
        given = _blocked(folder) or f"{str(folder)!r} is a file"
        raise ResultError(given, what, "Choose another folder, or move the file away.")
    return folder


def _blocked(path: Path) -> str | None:
    """Which of the folders above is a file, in words."""
    return next((f"{str(parent)!r} is a file" for parent in path.parents if os.path.isfile(parent)), None)
