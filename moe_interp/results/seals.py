"""A checksum over a file's bytes, inside the file, which is checked before any library parses the format.

The record is the line ``moe_interp sha256 <64 hexadecimal digits>`` in a place that the format's readers pass over:
behind the end of netCDF, in the comment of a zip archive, before the footer of parquet. Other programs read the files
as before. It guards against damage, not against somebody who writes a new checksum.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from moe_interp.disk import opened
from moe_interp.errors import ResultError

MARK = b"\nmoe_interp sha256 "
LENGTH = len(MARK) + 64 + 1
END_OF_ZIP = b"PK\x05\x06"


def sealed(content: bytes, at: int | None = None) -> bytes:
    """The content with its record, at the end or at the offset ``at``."""
    at = len(content) if at is None else at
    digest = hashlib.sha256(content).hexdigest().encode()
    return b"".join((content[:at], MARK, digest, b"\n", content[at:]))


def sealed_zip(content: bytes) -> bytes:
    """A zip archive without a comment, with its record as the comment."""
    if content[-22:-18] != END_OF_ZIP:
        raise ValueError("not a zip archive without a comment")
    return sealed(content[:-2] + LENGTH.to_bytes(2, "little"))


def is_sealed(content: bytes, at: int | None = None) -> bool | None:
    """Whether the content is as its record says; None where there is no record at its place."""
    at = len(content) - LENGTH if at is None else at
    record = content[max(at, 0) : at + LENGTH] if at >= 0 else b""
    if len(record) < LENGTH or not record.startswith(MARK) or not record.endswith(b"\n"):
        return None
    view = memoryview(content)
    digest = hashlib.sha256(view[:at])
    digest.update(view[at + LENGTH :])
    return digest.hexdigest().encode() == record[len(MARK) : -1]


def read_sealed(path: str | Path, what: str, remedy: str) -> bytes:
    """The bytes of a file that ends in its record, which is there and right; the record is among them.

    Args:
        path: The file.
        what: What it should be, for the errors: "a result".
        remedy: What to do, for the errors.

    Raises:
        ResultError: no such file, not a regular file, too large, without a record, or changed since it was written.
    """
    with opened(path, f"{what} that moe_interp wrote", remedy, ResultError) as file:
        # a large file that is not ours is not read
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LENGTH))
        if size > LENGTH and file.read(len(MARK)) != MARK:
            check_seal(b"", path, what, remedy)
        file.seek(0)
        content = file.read(size)
    check_seal(content, path, what, remedy)
    return content


def check_seal(content: bytes, path: str | Path, what: str, remedy: str, at: int | None = None) -> None:
    """Refuse content whose record is not there or not right.

    Raises:
        ResultError: it was cut short or changed, or was written without a checksum.
    """
    whole = is_sealed(content, at)
    if whole is None:
        raise ResultError(
            f"{str(path)!r} cannot be read as {what}: it has no checksum where one belongs, so it was cut short, "
            "changed, or written by another program or an earlier moe_interp",
            f"a whole file that moe_interp wrote ({what})",
            remedy,
        )
    if not whole:
        raise ResultError(
            f"{str(path)!r} cannot be read as {what}: its bytes were changed or damaged after it was written",
            "bytes of the checksum that was written with them",
            remedy,
        )
