"""Writing a file so that a full disk or Ctrl-C leaves the earlier file as it was."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
            f"{str(target)!r} could not be written: {error.strerror or error}",
            "a folder with room for it and permission to write",
            f"{kept}Free space or choose another path, and save again.",
        ) from error
    finally:
        part.unlink(missing_ok=True)
