"""Routed experts as SGLang returns them.

With ``--enable-return-routed-experts`` and ``return_routed_experts`` in the request: the base64 of int32 values
``[n - 1, layer, slot]``, flat and without their shape, prompt and generation but for the last sampled token, from
``routed_experts_start_len`` on. ``/generate`` puts it into ``meta_info["routed_experts"]``, the OpenAI endpoints into
``choices[i]["sgl_ext"]["routed_experts"]``. There is a column for every hidden layer, of zeros where it is dense.

Weights, logits, shape and layer numbers are not among it. A prompt without generation lacks its last token as well
(sgl-project/sglang#20964). Sources: SGLang's routed_experts_capturer.py and its documentation of the endpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.disk import read_bytes
from moe_interp.errors import DataError
from moe_interp.traces.checks import as_array
from moe_interp.traces.readers.columns import Layers, checked_layers
from moe_interp.traces.readers.engine_rows import LONGEST, EngineRows, Uncaptured, file_arguments, trace_arguments
from moe_interp.traces.readers.responses import field, read_responses
from moe_interp.traces.readers.vllm import decoded_base64, decoded_npy

EXPECTED = "routed experts of SGLang: responses as .json or .jsonl, their base64 text, or .npy"
SWITCH = "Start the server with --enable-return-routed-experts and ask with return_routed_experts=true."


def read_sglang(
    path: str | Path,
    n_experts: int | None = None,
    layers: Layers = None,
    *,
    moe: Any = None,
    top_k: int | None = None,
    n_columns: int | None = None,
    sequence_lengths: Any = None,
    token_ids: Any = None,
    start: int = 0,
    sentinel: int | None = None,
    uncaptured: Uncaptured = "refuse",
) -> dict[str, Any]:
    """The arguments of a trace from a file: responses (``.json``, ``.jsonl``), ``.npy``, or else base64 text.

    Args:
        path: The file.
        n_experts, layers, moe, sentinel, uncaptured: see ``RoutingTrace.read``.
        top_k: Slots a token, which the text does not tell; the attached model's by default.
        n_columns: Columns likewise; as many as ``layers``, or those of the attached model that fit, by default.
        sequence_lengths: Tokens of each sequence, prompt and generation.
        token_ids: ``[token]``.
        start: Leading tokens without a row (``routed_experts_start_len``).
    """
    source, shape = Path(path), _shape(layers, moe, top_k, n_columns)
    skipped = check_whole(start, "start", 0, LONGEST, error=DataError)
    if source.suffix in (".json", ".jsonl"):
        found = [of_response(value, shape, where, skipped) for where, value in read_responses(source, EXPECTED)]
        sequences = [part for parts in found for part in parts]
    elif source.suffix == ".npy":
        sequences = [EngineRows(decoded_npy(read_bytes(source, EXPECTED), str(source)), str(source), start=skipped)]
    else:
        text = read_bytes(source, EXPECTED).strip()
        n_tokens = np.size(as_array(token_ids)) if token_ids is not None else None
        n_tokens = int(np.sum(sequence_lengths)) if sequence_lengths is not None else n_tokens
        rows = decoded_flat(text, shape, str(source), n_tokens, skipped)
        sequences = [EngineRows(rows, str(source), start=skipped)]
    return file_arguments(sequences, n_experts, layers, moe, sentinel, uncaptured, sequence_lengths, token_ids)


def sglang_arguments(
    responses: Any,
    n_experts: int | None,
    layers: Layers,
    moe: Any,
    top_k: int | None,
    n_columns: int | None,
    sentinel: int | None,
    uncaptured: Uncaptured,
) -> dict[str, Any]:
    """The arguments of a trace from responses, base64 texts or arrays, one a sequence."""
    shape = _shape(layers, moe, top_k, n_columns)
    is_one = isinstance(responses, str | bytes | Mapping | np.ndarray) or not isinstance(responses, Iterable)
    sequences: list[EngineRows] = []
    for number, response in enumerate([responses] if is_one else responses):
        where = f"response {number}"
        if isinstance(response, str | bytes):
            sequences.append(EngineRows(decoded_flat(response, shape, where), where))
        elif isinstance(response, np.ndarray) or hasattr(response, "detach"):
            sequences.append(EngineRows(as_array(response), where))
        else:
            sequences += of_response(response, shape, where)
    return trace_arguments(sequences, n_experts, layers, moe, sentinel, uncaptured)


Shape = tuple[Sequence[int], int | None]  # numbers of columns that may be, slots


def of_response(response: Any, shape: Shape, where: str, start: int = 0) -> list[EngineRows]:
    """A sequence for each text of a response, prompt included."""
    choices = field(response, "choices")
    if choices is not None:
        if not isinstance(choices, list | tuple) or not choices:
            raise DataError(f"{where}: no choices", EXPECTED, SWITCH)
        usage, sequences = field(response, "usage"), []
        for number, choice in enumerate(choices):
            place = where if len(choices) == 1 else f"{where}, choice {number}"
            extra = field(choice, "sgl_ext") or field(choice, "sglext") or field(response, "sglext") or choice
            sequences.append(_sequence(extra, usage if len(choices) == 1 else None, shape, place, start))
        return sequences
    info = field(response, "meta_info")
    return [_sequence(response if info is None else info, info, shape, where, start)]


def _sequence(holder: Any, usage: Any, shape: Shape, where: str, start: int) -> EngineRows:
    text = field(holder, "routed_experts")
    if text is None:
        raise DataError(f"{where}: no routed_experts", EXPECTED, SWITCH)
    counts = [
        None if value is None else check_whole(value, f"{where}: {name}", 0, 2**31, error=DataError)
        for name in ("prompt_tokens", "completion_tokens")
        for value in [None if usage is None else field(usage, name)]
    ]
    total = counts[0] + counts[1] if counts[0] is not None and counts[1] is not None else None
    rows = decoded_flat(text, shape, where, total, start) if isinstance(text, str | bytes) else as_array(text)
    return EngineRows(rows, where, total, counts[0], None, start)


def decoded_flat(
    text: str | bytes, shape: Shape, where: str, n_tokens: int | None = None, start: int = 0
) -> NDArray[np.int32]:
    """``[row, column, slot]`` of the base64 of int32 values; of several numbers of columns, the one that fits."""
    content = decoded_base64(text, where)
    columns, top_k = shape
    if not columns or top_k is None:
        raise DataError(
            f"{where}: {len(content)} bytes without their shape",
            "the number of columns and of slots",
            "Pass top_k= and n_columns= (or layers=[...]), or the attached model as moe=.",
        )
    fitting = [n for n in columns if content and len(content) % (4 * n * top_k) == 0]
    if len(fitting) > 1 and n_tokens is not None:
        fitting = [n for n in fitting if n_tokens - start - len(content) // (4 * n * top_k) in (0, 1)]
    if len(fitting) != 1:
        raise DataError(
            f"{where}: {len(content)} bytes of int32, which "
            + ("may be" if fitting else "are no multiple of")
            + f" {' or '.join(str(n) for n in (fitting or columns))} columns of {top_k} slots",
            "one number of columns that divides them",
            "Pass n_columns= and top_k=." if fitting else "Check them, and whether the text is whole.",
        )
    return np.frombuffer(content, dtype="<i4").reshape(-1, fitting[0], top_k)


def _shape(layers: Layers, moe: Any, top_k: int | None, n_columns: int | None) -> Shape:
    if top_k is not None:
        top_k = check_whole(top_k, "top_k", 1, 2**15, error=DataError)
    elif moe is not None:
        top_k = int(moe.spec(moe.layers[0]).top_k)
    if n_columns is not None:
        return [check_whole(n_columns, "n_columns", 1, 2**20, error=DataError)], top_k
    layers = checked_layers(layers)
    if layers is not None and not isinstance(layers, str):
        listed = [int(layer) for layer in layers]
        return sorted({len(listed), max(listed, default=0) + 1}), top_k
    if moe is None:
        return [], top_k
    sizes = {"moe": {len(moe.layers)}, "all": {int(moe.bridge.cfg.n_layers)}}
    return sorted(sizes[layers] if layers in sizes else sizes["moe"] | sizes["all"]), top_k
