"""The content of a dataset: its checksum, what a netCDF file can hold of it, and reading it back within bounds."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

import h5netcdf
import h5py
import numpy as np
import xarray as xr
from xarray.backends import H5NetCDFStore

from moe_interp.errors import ResultError
from moe_interp.results.manifest import plain


def content_checksum(data: xr.Dataset) -> str:
    """SHA-256 over a dataset: attributes, and each variable's name, role, type, axes, values and attributes.

    Variables count in the order of their names. Byte order, and the widths of text, do not count.
    """
    digest = hashlib.sha256()
    digest.update(_json(data.attrs))
    for name in sorted(map(str, data.variables)):
        variable = data.variables[name]
        values = np.asarray(variable.values)
        is_number = values.dtype.kind in "biufc"
        kind = f"{values.dtype.kind}{values.dtype.itemsize}" if is_number else "text"
        role = "coordinate" if name in data.coords else "variable"
        digest.update(_json([name, role, kind, list(variable.dims), list(values.shape), variable.attrs]))
        if is_number:
            digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes())
        else:
            digest.update(_json([str(value) for value in values.ravel().tolist()]))
    return digest.hexdigest()


def refuse_unstorable(data: xr.Dataset) -> None:
    """Refuse texts that netCDF would cut short or cannot encode.

    Raises:
        ResultError: a value with a NUL or half of a surrogate pair.
    """
    for name, variable in data.variables.items():
        if variable.dtype.kind not in "UOT":
            continue
        for value in np.asarray(variable.values).ravel().tolist():
            if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
                raise ResultError(
                    f"the text {value[:40]!r} in {name!r}",
                    "texts without a NUL and without halves of surrogate pairs, which netCDF cannot hold",
                    "Rename it, and save again.",
                )


def write_netcdf(data: xr.Dataset) -> bytes:
    """A netCDF 4 file, made in memory: HDF5 does not survive a failed write on the disk itself.

    In HDF5's latest layout, which keeps a checksum with everything but the values themselves.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest", track_order=True) as file, h5netcdf.File(file, "w") as layout:
        data.dump_to_store(H5NetCDFStore(layout))
    return buffer.getvalue()


def read_netcdf(content: bytes) -> xr.Dataset:
    """All of a netCDF 4 file, in memory; HDF5's and xarray's errors pass.

    Raises:
        ValueError: variables of more values than the file has room for (results are not compressed, so a file that
            claims more would fill the memory), or a heap of texts that HDF5 would read for ever.
    """
    _check_heaps(content)
    with xr.open_dataset(io.BytesIO(content), engine="h5netcdf", decode_timedelta=False) as opened:
        claimed = sum(v.size * (v.dtype.itemsize if v.dtype.kind in "biufc" else 1) for v in opened.variables.values())
        if claimed > len(content):
            raise ValueError(f"{claimed} bytes of values in a file of {len(content)} bytes")
        return opened.load()


def _check_heaps(content: bytes) -> None:
    """Refuse a global heap, where HDF5 keeps texts, with an object that leads nowhere: HDF5 does not come back."""
    for found in re.finditer(rb"GCOL\x01\0\0\0", content):
        start = found.start()
        end = start + int.from_bytes(content[start + 8 : start + 16], "little")
        at = start + 16
        while at + 16 <= min(end, len(content)):
            index, size = (int.from_bytes(content[i : i + n], "little") for i, n in ((at, 2), (at + 8, 8)))
            # index 0 is the free space at the end, whose size counts its own header
            step = size if index == 0 else 16 + -(-size // 8) * 8
            if step < 16 or at + step > end:
                raise ValueError(f"a heap of texts with an object of {size} bytes at byte {at}")
            at = end if index == 0 else at + step


def _json(value: Any) -> bytes:
    return json.dumps(_stored(value), sort_keys=True).encode()


def _stored(value: Any) -> Any:
    """A value as JSON and netCDF give it back: tuples are lists, a list of one is that one, numbers are plain."""
    if isinstance(value, Mapping):
        return {str(key): _stored(entry) for key, entry in value.items()}
    if isinstance(value, str | bool | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return _stored(value[0]) if len(value) == 1 else [_stored(entry) for entry in value]
    return _stored(plain(value))
