"""Rows ``[token, column, slot]`` as inference engines return them, made into the arguments of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError, DataError
from moe_interp.slots import EMPTY, NATIVE
from moe_interp.traces.checks import as_array
from moe_interp.traces.readers.columns import Layers, experts_of, never_ran, unlabelled

Uncaptured = Literal["refuse", "native"]
LONGEST = 2**24  # tokens that may have been left out
UNLIKELY = 10**6  # rows of a single slot: of so many routes there must be one before zeros throughout are no route


@dataclass(frozen=True, eq=False)
class EngineRows:
    """What an engine returned for one sequence.

    Attributes:
        rows: ``[row, column, slot]`` integers.
        where: The sequence, for errors.
        n_tokens: Tokens of the sequence, prompt and generation; the rows' number where it is not known.
        n_prompt: Tokens of the prompt, or None.
        token_ids: ``[token]``, or None.
        start: Leading tokens that the engine left out.
    """

    rows: Any
    where: str
    n_tokens: int | None = None
    n_prompt: int | None = None
    token_ids: Sequence[int] | None = None
    start: int = 0


def trace_arguments(
    sequences: Sequence[EngineRows],
    n_experts: int | None,
    layers: Layers,
    moe: Any,
    sentinel: int | None,
    uncaptured: Uncaptured,
) -> dict[str, Any]:
    """The arguments of ``RoutingTrace.from_arrays``, one sequence after the other.

    - n tokens have n rows, or n - 1: the last sampled token was never an input, and is not covered (-2).
    - A row that holds a fill value in all slots (-1, the dtype's largest number or ``n_experts``, outside of the range)
      is not covered: a prefix that was cached before. ``sentinel`` names another; where it fills some slots, these are
      empty.
    - A last row of zeros in all columns is a dummy: not covered.
    - Any other row of zeros is what a buffer holds before a capture: refused, or not covered where ``uncaptured`` is
      "native". With one slot a token, zeros are expert 0 unless they fill all rows, or so many columns and rows one
      after the other that they are no routes (one in 10^6 and more).

    Raises:
        DataError: anything else that is no route, named by sequence, token and layer.
    """
    if uncaptured not in ("refuse", "native"):
        raise ConfigError(f"uncaptured={uncaptured!r}", '"refuse" or "native"', "Choose one.")
    if not sequences:
        raise DataError("no sequences", "at least one with routed experts", "Look at what the engine returned.")
    count = experts_of(n_experts, moe)
    parts = [_filled(sequence, count, sentinel) for sequence in sequences]
    widths = {part.shape[1:] for part in parts}
    if len(widths) > 1:
        raise DataError(f"rows of shapes {sorted(widths)}", "one number of columns and slots", "Read them apart.")
    rows = np.concatenate(parts)
    if not (rows > 0).any():
        raise never_ran("every row")
    native = (rows == NATIVE).all(axis=2)
    unused = ((rows == 0).all(axis=2) | native).all(axis=0)
    # one slot a token: a column of zeros may be expert 0
    blank = unused if rows.shape[2] > 1 else native.all(axis=0)
    labels, columns = unlabelled(layers, blank, unused, moe)
    kept = [
        _covered(replace(sequence, rows=part[:, columns]), labels, count, uncaptured)
        for sequence, part in zip(sequences, parts, strict=True)
    ]
    lengths = [len(part) for part in kept]
    known = all(sequence.n_prompt is not None for sequence in sequences)
    phases = [_phases(sequence, n) for sequence, n in zip(sequences, lengths, strict=True)] if known else None
    ids = [sequence.token_ids for sequence in sequences]
    return {
        "expert_indices": np.concatenate(kept),
        "sequence_lengths": lengths,
        "n_experts": count,
        "layers": labels,
        "phase": None if phases is None else np.concatenate(phases),
        "token_ids": None if any(i is None for i in ids) else np.concatenate([np.asarray(i) for i in ids]),
    }


def file_arguments(
    sequences: Sequence[EngineRows],
    n_experts: int | None,
    layers: Layers,
    moe: Any,
    sentinel: int | None,
    uncaptured: Uncaptured,
    lengths: Any,
    token_ids: Any,
) -> dict[str, Any]:
    """:func:`trace_arguments` of what a file holds, with the lengths or ids that its reader was given beside it.

    Raises:
        DataError: not one length a sequence, or ids that contradict them.
    """
    found = trace_arguments(_with_lengths(sequences, lengths, token_ids), n_experts, layers, moe, sentinel, uncaptured)
    return found | ({} if token_ids is None else {"token_ids": token_ids})


def _with_lengths(sequences: Sequence[EngineRows], lengths: Any, token_ids: Any) -> list[EngineRows]:
    """The sequences with their numbers of tokens; of a single one, also by its ids."""
    if lengths is None and token_ids is not None and len(sequences) == 1:
        lengths = [np.size(as_array(token_ids))]
    if lengths is None:
        return list(sequences)
    numbers = [check_whole(n, "a sequence's length", 1, error=DataError) for n in np.atleast_1d(lengths).tolist()]
    if len(numbers) != len(sequences):
        raise DataError(f"{len(numbers)} sequence_lengths", f"{len(sequences)}, one a sequence", "Correct them.")
    return [replace(sequence, n_tokens=n) for sequence, n in zip(sequences, numbers, strict=True)]


def _filled(sequence: EngineRows, n_experts: int, sentinel: int | None) -> NDArray[np.int32]:
    """``[row, column, slot]`` with -2 in rows of a fill value, and -1 in empty slots."""
    rows = as_array(sequence.rows)
    if rows.ndim != 3 or 0 in rows.shape or rows.dtype.kind not in "iu":
        raise DataError(
            f"{sequence.where}: an array of shape {rows.shape} and type {rows.dtype}",
            "integers [row, column, slot]",
            "Pass what the engine returned for one sequence.",
        )
    most = int(np.iinfo(rows.dtype).max)
    if n_experts - 1 > most:
        raise DataError(
            f"{sequence.where}: expert ids of type {rows.dtype} for {n_experts} experts",
            f"at most {most + 1} experts, or a wider type",
            "Ids above have wrapped around: record again with a wider type.",
        )
    fills = [fill for fill in (-1, most, n_experts) if not 0 <= fill < n_experts]
    wide = rows.astype(np.int64)
    empty = wide == -1
    native = np.zeros(rows.shape[:2], bool)
    for fill in fills:
        native |= (wide == fill).all(axis=2)
    if sentinel is not None:
        sentinel = check_whole(sentinel, "sentinel", error=DataError)
        is_expert = 0 <= sentinel < n_experts
        if is_expert and rows.shape[2] == 1:
            raise DataError(
                f"sentinel={sentinel} among {n_experts} experts with one slot a token",
                "a number that is no expert",
                "Pass another sentinel.",
            )
        native |= (wide == sentinel).all(axis=2)
        empty |= (wide == sentinel) & (not is_expert)
    wide = np.where(empty, EMPTY, wide)
    wide[native] = NATIVE
    _refuse_outside(wide, native, n_experts, sequence)
    return wide.astype(np.int32)


def _refuse_outside(wide: NDArray[np.int64], native: NDArray[np.bool_], n_experts: int, sequence: EngineRows) -> None:
    outside = ((wide < EMPTY) | (wide >= n_experts)) & ~native[..., None]
    if outside.any():
        row, column, slot = np.argwhere(outside)[0]
        raise DataError(
            f"{sequence.where}: expert {wide[row, column, slot]} at token {row + sequence.start}, column {column}, "
            f"slot {slot}",
            f"an id from 0 to {n_experts - 1}",
            "Check n_experts; if it is a fill value, pass it as sentinel=.",
        )


def _covered(
    sequence: EngineRows, labels: tuple[int, ...], n_experts: int, uncaptured: Uncaptured
) -> NDArray[np.int32]:
    """One sequence's routes ``[token, layer, slot]``, with the tokens that have no row."""
    rows = sequence.rows.copy()
    n_rows, n_columns, n_slots = rows.shape
    zeros = (rows == 0).all(axis=2)
    if n_slots == 1:
        zeros[:] = no_routes(zeros.all(axis=1), n_columns, n_experts)[:, None]
    if zeros.all() and (n_slots > 1 or n_rows > 1):
        raise never_ran(f"every row of {sequence.where}")
    if zeros[-1].all():
        rows[-1], zeros[-1] = NATIVE, False
    if zeros.any() and uncaptured == "refuse":
        row, column = np.argwhere(zeros)[0]
        raise DataError(
            f"{sequence.where}: zeros at token {row + sequence.start}, layer {labels[column]}, and at "
            f"{int(zeros.sum()) - 1} more",
            "expert ids of a capture that ran",
            'Record again; or pass uncaptured="native", to leave such tokens out.',
        )
    rows[zeros] = NATIVE
    total = n_rows + sequence.start if sequence.n_tokens is None else sequence.n_tokens
    missing = total - sequence.start - n_rows
    if missing not in (0, 1):
        raise DataError(
            f"{sequence.where}: {n_rows} rows from token {sequence.start} for {total} tokens",
            f"{total - sequence.start} rows, or {total - sequence.start - 1} without the last sampled token",
            "Pass start= where the engine left leading tokens out, and the tokens of prompt and generation together.",
        )
    return np.pad(rows, ((sequence.start, missing), (0, 0), (0, 0)), constant_values=NATIVE)


def no_routes(zeros: NDArray[np.bool_], n_columns: int, n_experts: int) -> NDArray[np.bool_]:
    """``[row]``: which rows of zeros, of one slot, are too many routes to expert 0 one after the other."""
    edges = np.flatnonzero(np.diff(zeros, prepend=False, append=False))
    found = np.zeros_like(zeros)
    for start, end in edges.reshape(-1, 2).tolist():
        # one column of zeros may be a router that has collapsed
        n = n_columns * (end - start) if n_columns > 1 else 1
        found[start:end] = n * np.log(n_experts) >= np.log(UNLIKELY)
    return found


def _phases(sequence: EngineRows, n_tokens: int) -> NDArray[np.str_]:
    assert sequence.n_prompt is not None
    return np.where(np.arange(n_tokens) < sequence.n_prompt, "prefill", "generation")
