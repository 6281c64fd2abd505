"""Arrays in an npz archive, written with a checksum and read within bounds."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from moe_interp.results.seals import sealed_zip

MOST_ARRAYS = 1000
FREELY = 2**30  # bytes of arrays that any archive may hold
RATIO = 16  # beyond that, as many times the archive's own size


def npz_bytes(arrays: Mapping[str, Any], compressed: bool = False) -> bytes:
    """An archive of arrays, one a name, that ``numpy.load`` reads as well; its comment is a checksum of its bytes."""
    content = _archive(arrays, compressed)
    if compressed and sum(np.asarray(a).nbytes for a in arrays.values()) > _bound(content):
        content = _archive(arrays, False)  # what is compressed any further is not read back
    return sealed_zip(content)


def npz_arrays(content: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of an archive; numpy's and zipfile's errors pass.

    Raises:
        ValueError: too many arrays, Python objects, or arrays of more values than the archive has room for.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if len(members) > MOST_ARRAYS or total > _bound(content):
            raise ValueError(f"{len(members)} arrays of {total} bytes in a file of {len(content)} bytes")
        for member in members:
            _check_header(archive, member)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def npy_array(content: bytes) -> NDArray[Any]:
    """The array of an npy file; numpy's errors pass.

    Raises:
        ValueError: Python objects, or an array of more or fewer values than follow its header.
    """
    stream = io.BytesIO(content)
    _check_claim(stream, len(content), "the array")
    return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))


def _archive(arrays: Mapping[str, Any], compressed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _bound(content: bytes) -> int:
    return max(FREELY, RATIO * len(content))


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse an array whose header claims other than what follows it."""
    with archive.open(member) as stream:
        _check_claim(stream, member.file_size, repr(member.filename))


def _check_claim(stream: IO[bytes], size: int, name: str) -> None:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    n = 1
    for length in shape:
        n *= length
    if dtype.hasobject or min(shape, default=0) < 0 or n * dtype.itemsize != size - stream.tell():
        raise ValueError(f"{name} claims {shape} values of {dtype}")
