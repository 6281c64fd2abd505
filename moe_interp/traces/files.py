"""Trace files: npz and parquet, both with a format version."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_interp.disk import parse_json, read_bytes
from moe_interp.errors import ConfigError, DataError, MoEInterpError, ResultError
from moe_interp.results.files import replacing
from moe_interp.results.npz import FREELY, RATIO, npz_arrays, npz_bytes
from moe_interp.results.seals import LENGTH, check_seal, read_sealed, sealed

VERSION = 2  # 1 had no checksum
VERSION_KEY = "moe_interp_trace_version"
BY_SLOT = ("expert_weights", "expert_norms")
VECTORS = ("router_logits", "router_inputs")
BY_TOKEN = ("domain", "token_ids", "predicted_ids", "phase")
OPTIONAL = (*BY_SLOT, *VECTORS, *BY_TOKEN)
COLUMNS = {"expert_indices": "expert", "expert_weights": "weight", "expert_norms": "norm"}
FIELDS = ("expert_indices", "sequence_lengths", "n_experts", "layers", *OPTIONAL)
AGAIN = "Save the trace again; for arrays of another origin use RoutingTrace.from_arrays."


def write_trace_file(path: str | Path, format: str | None, arrays: dict[str, Any]) -> Path:
    """Write the arguments of ``RoutingTrace.from_arrays`` to one file, whole or not at all."""
    target = Path(path)
    writer = WRITERS[known_format(target, format)]
    content = writer({name: value for name, value in arrays.items() if value is not None})
    with replacing(target) as file:
        file.write(content)
    return target


def read_trace_file(path: str | Path, format: str | None) -> dict[str, Any]:
    """The arguments of ``RoutingTrace.from_arrays`` that a file holds.

    Raises:
        ResultError: No such file, unknown format, another version, without a checksum, or damaged.
    """
    source = Path(path)
    reader = READERS[known_format(source, format)]
    try:
        version, arrays = reader(source)
    except MoEInterpError:
        raise
    except Exception as error:  # zipfile, numpy and pyarrow raise errors of any class
        raise ResultError(
            f"{str(source)!r} cannot be read as a trace ({type(error).__name__}: {error})",
            "a whole file written by trace.save(path)",
            AGAIN,
        ) from error
    if version != VERSION:
        raise ResultError(
            f"{str(source)!r} has trace format version {version}",
            f"version {VERSION}",
            "Read it with the version of moe_interp that wrote it, or save the trace again.",
        )
    return arrays


def halved(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arguments with router logits and inputs in float16.

    Raises:
        DataError: A number that float16 cannot hold.
    """
    short = {}
    for name in VECTORS:
        if (values := arrays[name]) is not None:
            with np.errstate(over="ignore"):
                short[name] = values.astype(np.float16)
            if np.isinf(short[name]).any():
                raise DataError(
                    f"{name} of up to {np.nanmax(np.abs(values)):g}",
                    "numbers up to 65504, the largest of float16",
                    "Save the trace without half.",
                )
    return arrays | short


def known_format(path: Path, format: str | None) -> str:
    """The format given, or that of the suffix."""
    name = path.suffix.removeprefix(".") if format is None else format
    if name not in WRITERS:
        raise ResultError(
            f"Trace format {name!r} for {str(path)!r}",
            f"one of {', '.join(WRITERS)}",
            "Use one of these as the suffix, or pass format=...",
        )
    return name


def trace_npz(arrays: dict[str, Any]) -> bytes:
    """One compressed array a field; readable by ``numpy.load``."""
    return npz_bytes({VERSION_KEY: VERSION} | arrays, compressed=True)


def read_npz(path: Path) -> tuple[int, dict[str, Any]]:
    """Version and fields of an npz file."""
    arrays: dict[str, Any] = dict(npz_arrays(read_sealed(path, "a trace", AGAIN)))
    version = int(arrays.pop(VERSION_KEY))
    if version == VERSION:
        arrays["n_experts"] = int(arrays["n_experts"])
        arrays["layers"] = arrays["layers"].tolist()
        if unknown := arrays.keys() - set(FIELDS):
            raise KeyError(sorted(unknown)[0])
    return version, arrays


def parquet_bytes(arrays: dict[str, Any]) -> bytes:
    """One row per token and layer, one column per slot, with version and sizes in the schema's metadata."""
    pa, parquet = pyarrow_modules()
    indices = arrays["expert_indices"]
    n_tokens, n_layers, n_slots = indices.shape
    lengths = arrays["sequence_lengths"]
    starts = np.cumsum(lengths) - lengths
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    columns = {"sequence": sequence, "position": np.arange(n_tokens) - starts[sequence]}
    columns |= {name: arrays[name] for name in BY_TOKEN if name in arrays}
    table = pd.DataFrame({name: np.repeat(values, n_layers) for name, values in columns.items()})
    table.insert(2, "layer", np.tile(arrays["layers"], n_tokens))
    for name, column in COLUMNS.items():
        # shape: (token, layer, slot) -> (token layer, slot)
        for slot, values in enumerate(arrays[name].reshape(-1, n_slots).T if name in arrays else ()):
            table[f"{column}_{slot}"] = values
    layout = {VERSION_KEY: VERSION, "n_experts": int(arrays["n_experts"]), "n_slots": n_slots}
    typed = pa.Table.from_pandas(table, preserve_index=False)
    for name in VECTORS:
        if name in arrays:  # shape: (token, layer, width) -> (token layer, width)
            width = arrays[name].shape[2]
            typed = typed.append_column(name, pa.FixedSizeListArray.from_arrays(pa.array(arrays[name].ravel()), width))
    buffer = io.BytesIO()
    parquet.write_table(typed.replace_schema_metadata({"moe_interp": json.dumps(layout)}), buffer)
    content = buffer.getvalue()
    # readers find the footer from the end of the file, and the pages by its offsets
    return sealed(content, at=len(content) - footer_bytes(content))


def footer_bytes(content: bytes) -> int:
    """Length of a parquet file's footer, its own length and the closing mark included."""
    return int.from_bytes(content[-8:-4], "little") + 8


def read_parquet(path: Path) -> tuple[int, dict[str, Any]]:
    """Version and fields of a parquet file."""
    _, parquet = pyarrow_modules()
    content = read_bytes(path, "a trace that moe_interp wrote", AGAIN, ResultError)
    check_seal(content, path, "a trace", AGAIN, at=len(content) - footer_bytes(content) - LENGTH)
    described = parquet.read_metadata(io.BytesIO(content))
    groups = [described.row_group(i) for i in range(described.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    if max(sum(c.total_uncompressed_size for c in columns), described.num_rows) > max(FREELY, RATIO * len(content)):
        raise ValueError(f"{described.num_rows} rows in a file of {len(content)} bytes")
    stored = parquet.read_table(io.BytesIO(content))
    layout = parse_json(stored.schema.metadata[b"moe_interp"])
    if layout[VERSION_KEY] != VERSION:
        return layout[VERSION_KEY], {}
    vectors = [name for name in VECTORS if name in stored.column_names]
    table = stored.drop_columns(vectors).to_pandas()
    n_layers, n_slots = table["layer"].nunique(), layout["n_slots"]
    tokens = table.iloc[::n_layers]
    _refuse_moved_rows(table, n_layers)

    def by_slot(name: str) -> np.ndarray:
        # shape: (token layer, slot) -> (token, layer, slot)
        return table[[f"{name}_{slot}" for slot in range(n_slots)]].to_numpy().reshape(-1, n_layers, n_slots)

    arrays = {
        "expert_indices": by_slot("expert"),
        "sequence_lengths": np.bincount(tokens["sequence"]),
        "n_experts": layout["n_experts"],
        "layers": table["layer"].iloc[:n_layers].tolist(),
    }
    arrays |= {name: tokens[name].to_numpy() for name in BY_TOKEN if name in table}
    arrays |= {name: by_slot(COLUMNS[name]) for name in BY_SLOT if f"{COLUMNS[name]}_0" in table}
    for name in vectors:
        # shape: (token layer width) -> (token, layer, width)
        flat = stored[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        arrays[name] = flat.reshape(len(tokens), n_layers, -1)
    return VERSION, arrays


def _refuse_moved_rows(table: pd.DataFrame, n_layers: int) -> None:
    """Rows are read by their place, so refuse a table that was filtered, sorted or joined since it was written."""
    n_tokens, rest = divmod(len(table), n_layers)
    if rest or n_tokens == 0:
        raise ValueError(f"{len(table)} rows for {n_layers} layers")
    # shape: (token layer) -> (token, layer)
    labels, sequence, position = (
        table[n].to_numpy().reshape(n_tokens, n_layers) for n in ("layer", "sequence", "position")
    )
    starts = np.flatnonzero(np.diff(sequence[:, 0], prepend=-1))
    counted = np.arange(n_tokens) - np.repeat(starts, np.diff([*starts, n_tokens]))
    for values, expected in ((labels, labels[:1]), (sequence, sequence[:, :1]), (position, counted[:, None])):
        if not (values == expected).all() or (np.diff(sequence[:, 0]) < 0).any():
            raise ValueError("its rows are not one a token and layer, in the order they were written")


def pyarrow_modules() -> tuple[Any, Any]:
    """pyarrow and its parquet module, which only this format needs."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            "A parquet trace without pyarrow", "pyarrow", "Run `pip install pyarrow`, or use .npz."
        ) from error
    return pyarrow, parquet


WRITERS: dict[str, Callable[[dict[str, Any]], bytes]] = {"npz": trace_npz, "parquet": parquet_bytes}
READERS: dict[str, Callable[[Path], tuple[int, dict[str, Any]]]] = {"npz": read_npz, "parquet": read_parquet}
