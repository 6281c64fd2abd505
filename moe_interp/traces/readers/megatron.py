"""The router trace of Megatron-Core (``--moe-routing-trace-path``), as moe/router_trace.py writes it.

``router_trace_rank{r}.jsonl``: a line a step, block and layer, with ``step, block, layer, rank, num_tokens, topk``, and
``top_indices`` ``[token, slot]``; slots in the order of the expert ids where the router gives a map. Beside it, where
asked for, ``logits_rank{r}.bin`` and ``hidden_states_rank{r}.bin``: bfloat16 ``[token, expert]`` and ``[token,
d_model]`` at the offsets that the lines name. Weights and token ids are not among it.

- Layers are those of the module's name, counted from 0 and within a pipeline stage; indices handed over by
  ``record_indices`` count the MoE layers unless the caller named them. ``layers`` says which they are.
- Tokens of a batch lie position by position: token t is of sequence t mod batch size.
- Records of multi-token prediction (block "mtp") are left out.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.disk import opened
from moe_interp.errors import ConfigError, DataError
from moe_interp.jsonlines import read_json_lines
from moe_interp.traces.readers.columns import Layers, experts_of, labelled
from moe_interp.traces.readers.engine_rows import no_routes

EXPECTED = "a router trace of Megatron-Core, router_trace_rank*.jsonl"
_NAME = re.compile(r"router_trace_rank\d{1,9}\.jsonl")
SIDES = {"router_logits": ("logit", "logits"), "router_inputs": ("hs", "hidden_states")}


@dataclass(frozen=True, eq=False)
class Record:
    """One line: the routes of a layer in a step.

    Attributes:
        where: File and line.
        step, layer: As the line says.
        rows: ``[token, slot]``.
        line: The line, for the side files.
    """

    where: str
    step: int
    layer: int
    rows: NDArray[np.int64]
    line: Mapping[str, Any]


def read_megatron(
    path: str | Path,
    n_experts: int | None = None,
    layers: Layers = None,
    *,
    moe: Any = None,
    batch_size: int = 1,
    steps: Literal["sequences", "decoding"] | None = None,
    side_files: bool = True,
) -> dict[str, Any]:
    """The arguments of a trace from the lines of one rank.

    Args:
        path: The file, or a folder with the file of one rank. Ranks hold other tokens, other layers or the same, which
            only the run's configuration tells: read them one by one.
        n_experts, layers, moe: see ``RoutingTrace.read``.
        batch_size: Sequences of a record (the micro-batch), all of one length.
        steps: "sequences": each record holds whole sequences, as in training. "decoding": the first step is a prompt,
            and each later one its next token. Needed where steps are of different lengths.
        side_files: Whether to read logits and hidden states, where the lines name them.
    """
    if steps not in (None, "sequences", "decoding"):
        raise ConfigError(f"steps={steps!r}", '"sequences" or "decoding"', "Choose one.")
    count, source = experts_of(n_experts, moe), _file(Path(path))
    batch = check_whole(batch_size, "batch_size", 1, error=DataError)
    by_layer: dict[int, list[Record]] = defaultdict(list)
    for number, line in read_json_lines(source, EXPECTED):
        record = _record(f"{source}, line {number}", line, count)
        if record is not None:
            by_layer[record.layer].append(record)
    if not by_layer:
        raise DataError(f"{source} without records of the decoder", EXPECTED, "Check the file.")
    found = sorted(by_layer)
    labels, columns = labelled(found, layers, moe)
    chosen = [by_layer[found[column]] for column in columns]
    _refuse_uneven(chosen)
    lengths = [len(record.rows) for record in chosen[0]]
    is_decoding = _is_decoding(chosen[0], steps, batch, source)
    order = np.concatenate([start + _order(n, batch) for n, start in zip(lengths, np.cumsum([0, *lengths]))])
    indices = _stacked([[r.rows for r in records] for records in chosen], source)[order]
    _refuse_zeros(indices, count, source)
    arguments = {
        "expert_indices": indices,
        "sequence_lengths": [sum(lengths)] if is_decoding else [n // batch for n in lengths for _ in range(batch)],
        "n_experts": count,
        "layers": labels,
        "phase": np.where(np.arange(sum(lengths)) < lengths[0], "prefill", "generation") if is_decoding else None,
    }
    for name, (key, stem) in SIDES.items() if side_files else ():
        if all(f"{key}_offset" in r.line for records in chosen for r in records):
            width = count if name == "router_logits" else None
            parts = [[_side(r, key, stem, source.parent, width) for r in records] for records in chosen]
            arguments[name] = _stacked(parts, source)[order]
    return arguments


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(place for place in path.iterdir() if _NAME.fullmatch(place.name))
    if len(files) != 1:
        raise DataError(
            f"{str(path)!r} with {len(files)} files router_trace_rank*.jsonl",
            "one, of one rank",
            "Pass one file. Ranks of other tokens are joined by RoutingTrace.concatenate.",
        )
    return files[0]


def _record(where: str, line: Any, n_experts: int) -> Record | None:
    if not isinstance(line, Mapping) or "top_indices" not in line:
        raise DataError(f"{where}: {str(line)[:40]!r}", f"{EXPECTED}, with top_indices", "Check the file.")
    if line.get("block", "decoder") != "decoder":
        return None
    step, layer = (check_whole(line.get(n), f"{where}: {n}", 0, 2**31, error=DataError) for n in ("step", "layer"))
    try:
        rows = np.array(line["top_indices"])
    except ValueError:
        raise DataError(f"{where}: ragged top_indices", "[token, slot]", "Trace again.") from None
    if rows.ndim != 2 or 0 in rows.shape or rows.dtype.kind not in "iu":
        raise DataError(f"{where}: top_indices of shape {rows.shape}", "integers [token, slot]", "Trace again.")
    stated = (line.get("num_tokens", len(rows)), line.get("topk", rows.shape[1]))
    if stated != rows.shape:
        raise DataError(f"{where}: top_indices of shape {rows.shape}", f"{stated}, as the line says", "Trace again.")
    if (outside := np.argwhere((rows < -1) | (rows >= n_experts))).size:
        token, slot = outside[0]
        raise DataError(
            f"{where}: expert {rows[token, slot]} at token {token}, layer {layer}, slot {slot}",
            f"an id from 0 to {n_experts - 1}",
            "Check n_experts.",
        )
    if rows.shape[1] > 1 and (rows == 0).all(axis=1).any():
        token = int(np.argmax((rows == 0).all(axis=1)))
        raise DataError(
            f"{where}: zeros at token {token}, layer {layer}",
            "expert ids of a router that ran",
            "Trace again; under CUDA graphs, hooks do not fire (--cuda-graph-impl none).",
        )
    return Record(where, step, layer, rows.astype(np.int64), line)


def _refuse_uneven(chosen: list[list[Record]]) -> None:
    first = chosen[0]
    for records in chosen:
        for record, other in zip(records, first, strict=False):
            if (record.step, len(record.rows)) != (other.step, len(other.rows)):
                raise DataError(
                    f"{record.where}: {len(record.rows)} tokens of layer {record.layer} in step {record.step}",
                    f"{len(other.rows)} in step {other.step}, as {other.where}",
                    "A record is missing: trace again, or remove the step from all layers.",
                )
        if len(records) != len(first):
            longer = max(records, first, key=len)
            raise DataError(
                f"{len(records)} records of layer {records[0].layer} against {len(first)} of layer {first[0].layer}; "
                f"{longer[min(len(records), len(first))].where} has no counterpart",
                "as many records of every layer",
                "The file was cut short: remove the last step, or trace again.",
            )
    if not any((record.rows > 0).any() for records in chosen for record in records):
        raise DataError(
            f"{first[0].where} and all others: zeros for all tokens", "expert ids of a router that ran", "Trace again."
        )


def _is_decoding(records: list[Record], steps: str | None, batch: int, source: Path) -> bool:
    lengths = [len(record.rows) for record in records]
    if steps == "decoding":
        if back := [b for a, b in itertools.pairwise(records) if b.step <= a.step]:
            raise DataError(
                f"{back[0].where}: step {back[0].step} after a later one",
                "the steps of one request, in order",
                "Trace one request at a time, or remove the lines of another run.",
            )
        if batch != 1 or any(n != 1 for n in lengths[1:]):
            raise DataError(
                f"{source}: steps of {lengths[:5]} tokens and batch_size={batch}",
                "one sequence, whose later steps have one token",
                "Trace one request at a time.",
            )
        return True
    if steps is None and len(lengths) > 1 and (len(set(lengths)) > 1 or lengths[0] == batch):
        raise DataError(
            f"{source}: steps of {lengths[:5]} tokens",
            "to know whether a step is a batch of whole sequences or the next token of one",
            'Pass steps="sequences" or steps="decoding".',
        )
    if odd := [record for record in records if len(record.rows) % batch]:
        raise DataError(
            f"{odd[0].where}: {len(odd[0].rows)} tokens", f"a multiple of batch_size={batch}", "Correct batch_size."
        )
    return False


def _order(n: int, batch: int) -> NDArray[np.int64]:
    """The place in a record of each token, sequence after sequence."""
    return np.arange(n).reshape(-1, batch).T.ravel()


def _stacked(parts: list[list[NDArray[Any]]], source: Path) -> NDArray[Any]:
    """``[token, layer, width]`` of the records of each layer."""
    widths = {part.shape[1] for records in parts for part in records}
    if len(widths) > 1:
        raise DataError(f"{source}: rows of widths {sorted(widths)}", "one", "Read the layers of each apart.")
    return np.stack([np.concatenate(records) for records in parts], axis=1)


def _refuse_zeros(indices: NDArray[np.int64], n_experts: int, source: Path) -> None:
    """Refuse zeros of one slot through so many layers and tokens that they are no routes."""
    n_layers, n_slots = indices.shape[1:]
    zeros = no_routes((indices == 0).all(axis=(1, 2)), n_layers, n_experts)
    if n_slots == 1 and zeros.any():
        raise DataError(
            f"{source}: zeros in all layers at token {int(np.argmax(zeros))}, and at {int(zeros.sum()) - 1} more",
            "expert ids of a router that ran",
            "Trace again; under CUDA graphs, hooks do not fire (--cuda-graph-impl none).",
        )


def _side(record: Record, key: str, stem: str, folder: Path, width: int | None) -> NDArray[np.float32]:
    """Float32 ``[token, width]`` of the bfloat16 numbers that a line names."""
    line, where = record.line, record.where
    rank = check_whole(line.get("rank"), f"{where}: rank", 0, 2**31, error=DataError)
    offset, size = (
        check_whole(line.get(f"{key}_{n}"), f"{where}: {key}_{n}", 0, 2**48, error=DataError)
        for n in ("offset", "bytes")
    )
    shape = line.get(f"{key}_shape")
    n_tokens = len(record.rows)
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or shape[0] != n_tokens
        or width not in (None, shape[1])
        or size != 2 * n_tokens * check_whole(shape[1], f"{where}: {key}_shape", 1, 2**31, error=DataError)
    ):
        raise DataError(
            f"{where}: {key}_shape {shape} in {size} bytes",
            f"[{n_tokens}, {width or 'd_model'}] of 2 bytes",
            "Trace again.",
        )
    path = folder / f"{stem}_rank{rank}.bin"
    with opened(path, f"the {stem} that {where} names", "Copy it beside the trace, or pass side_files=False.") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise DataError(f"{path}: {len(content)} bytes from {offset} on", f"{size}, as {where} says", "Trace again.")
    # bfloat16 is the upper half of float32
    values = (np.frombuffer(content, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return values.reshape(n_tokens, -1)
