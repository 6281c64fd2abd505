"""Reading files that may hold anything: regular files only, within a size, as bytes or JSON; refused in words."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from moe_interp.errors import DataError, MoEInterpError

LARGEST = 2**36  # bytes of any file that is read whole
LARGEST_JSON = 2**28  # bytes of one JSON document


@contextmanager
def opened(
    path: str | Path,
    expected: str,
    remedy: str = "Check the path.",
    error: type[MoEInterpError] = DataError,
    limit: int = LARGEST,
) -> Iterator[BinaryIO]:
    """A regular file, open for reading. Folders, pipes, sockets and devices are refused and never waited for.

    Args:
        path: The file; links are followed.
        expected: What it should hold, for the errors.
        remedy: What to do, for the errors.
        error: The class of the errors.
        limit: Most bytes that it may have.

    Raises:
        MoEInterpError: of the class ``error``: no such file, not a regular file, larger than the limit or than the
            memory, or the system refuses.
    """

    def refuse(what: str, cause: Exception | None = None) -> NoReturn:
        raise error(f"{str(path)!r} {what}", expected, remedy) from cause

    try:
        # without O_NONBLOCK, opening a pipe waits for somebody to write to it
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as cause:
        refuse("does not exist", cause)
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        refuse(f"cannot be opened: {getattr(cause, 'strerror', None) or cause}", cause)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            refuse("is not a regular file")
        if found.st_size > limit:
            refuse(f"has {found.st_size} bytes; at most {limit} are read")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    except (OSError, MemoryError) as cause:
        refuse(f"cannot be read: {getattr(cause, 'strerror', None) or type(cause).__name__}", cause)
    finally:
        os.close(descriptor)


def read_bytes(
    path: str | Path,
    expected: str,
    remedy: str = "Check the path.",
    error: type[MoEInterpError] = DataError,
    limit: int = LARGEST,
) -> bytes:
    """The content of a regular file; arguments and errors are those of :func:`opened`."""
    with opened(path, expected, remedy, error, limit) as file:
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document in UTF-8; the constants NaN and Infinity, which are not JSON, are refused.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, or with a number too long to be read.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(
    path: str | Path, expected: str, remedy: str = "Check the path.", error: type[MoEInterpError] = DataError
) -> Any:
    """The value of a JSON file.

    Raises:
        MoEInterpError: as :func:`read_bytes`; or the file is not JSON.
    """
    content = read_bytes(path, expected, remedy, error, LARGEST_JSON)
    try:
        return parse_json(content)
    except ValueError as cause:
        raise error(f"{str(path)!r} is not JSON: {cause}", expected, remedy) from cause


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
