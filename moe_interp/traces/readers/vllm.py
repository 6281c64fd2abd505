"""Routed experts as vLLM returns them.

From vLLM 0.14, with ``enable_return_routed_experts=True`` (``--enable-return-routed-experts``):

- to 0.20, ``CompletionOutput.routed_experts``: int32 ``[n - 1, layer, slot]``, prompt and generation, with a column for
  every hidden layer, of zeros where it is dense;
- in 0.21, int16 ``[token, MoE layer, slot]`` apart: ``RequestOutput.prompt_routed_experts`` and
  ``CompletionOutput.routed_experts``, -1 where the prefix was cached; lists in the JSON of the server;
- from 0.22, in the server's JSON, a base64 npy file ``[n - 1, layer, slot]`` of uint8 or uint16 per choice, and with
  ``routed_experts_prompt_start`` without its first rows.

Weights, logits and layer numbers are not among it. Sources: vLLM's routed_experts_capturer.py,
docs/training/routed_experts_replay.md (0.21), vllm-project/router#184.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.disk import read_bytes
from moe_interp.errors import DataError
from moe_interp.results.npz import npy_array
from moe_interp.traces.checks import as_array
from moe_interp.traces.readers.columns import Layers
from moe_interp.traces.readers.engine_rows import LONGEST, EngineRows, Uncaptured, file_arguments, trace_arguments
from moe_interp.traces.readers.responses import field, read_responses

EXPECTED = "routed experts of vLLM: .npy, or responses as .json or .jsonl"
SWITCH = "Start the engine with enable_return_routed_experts=True."


def read_vllm(
    path: str | Path,
    n_experts: int | None = None,
    layers: Layers = None,
    *,
    moe: Any = None,
    sequence_lengths: Any = None,
    token_ids: Any = None,
    start: int = 0,
    sentinel: int | None = None,
    uncaptured: Uncaptured = "refuse",
) -> dict[str, Any]:
    """The arguments of a trace from a file: ``.npy`` of one sequence, or responses as ``.json`` or ``.jsonl``.

    Args:
        path: The file.
        n_experts, layers, moe, sentinel, uncaptured: see ``RoutingTrace.read``.
        sequence_lengths: Tokens of each sequence, prompt and generation; its rows are as many, or one fewer.
        token_ids: ``[token]``.
        start: Leading tokens without a row (``routed_experts_prompt_start``).
    """
    source = Path(path)
    if source.suffix in (".json", ".jsonl"):
        sequences = [
            part for where, value in read_responses(source, EXPECTED) for part in of_output(value, where, start)
        ]
    else:
        rows = decoded_npy(read_bytes(source, EXPECTED), str(source))
        sequences = [EngineRows(rows, str(source), start=check_whole(start, "start", 0, LONGEST, error=DataError))]
    return file_arguments(sequences, n_experts, layers, moe, sentinel, uncaptured, sequence_lengths, token_ids)


def vllm_arguments(
    outputs: Any,
    n_experts: int | None,
    layers: Layers,
    moe: Any,
    sentinel: int | None,
    uncaptured: Uncaptured,
) -> dict[str, Any]:
    """The arguments of a trace from ``RequestOutput`` objects, the JSON of responses, or arrays, one a sequence."""
    several = outputs if isinstance(outputs, Iterable) and not _is_one(outputs) else [outputs]
    sequences: list[EngineRows] = []
    for number, output in enumerate(several):
        where = f"output {number}"
        if isinstance(output, np.ndarray) or hasattr(output, "detach"):
            sequences.append(EngineRows(output, where))
        else:
            sequences += of_output(output, where)
    return trace_arguments(sequences, n_experts, layers, moe, sentinel, uncaptured)


def of_output(output: Any, where: str, start: int = 0) -> list[EngineRows]:
    """A sequence for each completion of an output, prompt included."""
    choices = field(output, "outputs")
    choices = field(output, "choices") if choices is None else choices
    if choices is None:
        choices = [output]
    if not isinstance(choices, list | tuple) or not choices:
        raise DataError(f"{where}: no completions", EXPECTED, SWITCH)
    prompt = field(output, "prompt_routed_experts")
    prompt_rows = None if prompt is None else decoded(prompt, where)
    prompt_ids = _ids(field(output, "prompt_token_ids"), where)
    usage = field(output, "usage")
    n_prompt = len(prompt_ids) if prompt_ids is not None else _count(usage, "prompt_tokens", where)
    sequences = []
    for number, choice in enumerate(choices):
        place = where if len(choices) == 1 else f"{where}, completion {number}"
        given = field(choice, "routed_experts")
        if given is None:
            raise DataError(f"{place}: no routed_experts", EXPECTED, SWITCH)
        rows, skipped = decoded(given, place), _start(given, start, place)
        new_ids = _ids(field(choice, "token_ids"), place)
        if prompt_rows is not None:
            rows = _joined(prompt_rows, rows, place)
        ids = [*prompt_ids, *new_ids] if prompt_ids is not None and new_ids is not None else None
        n_tokens = len(ids) if ids is not None else None
        if ids is None and n_prompt is not None and len(choices) == 1:
            new = _count(usage, "completion_tokens", place)
            n_tokens = None if new is None else n_prompt + new
        sequences.append(EngineRows(rows, place, n_tokens, n_prompt, ids, skipped))
    return sequences


def decoded(given: Any, where: str) -> NDArray[Any]:
    """An array from an array, nested lists, a base64 npy file, or ``{"data", "shape", "dtype"}`` in base64."""
    if isinstance(given, str):
        return decoded_npy(decoded_base64(given, where), where)
    try:
        if isinstance(given, Mapping):
            data = decoded_base64(given["data"], where)
            return np.frombuffer(data, dtype=np.dtype(given["dtype"])).reshape(given["shape"])
        return as_array(given)
    except DataError:
        raise
    except Exception as error:  # numpy raises errors of any class
        raise DataError(f"{where}: routed experts that are no array ({error})", EXPECTED, "Save it again.") from error


def decoded_base64(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: a text that is not base64 ({error})", EXPECTED, "Save the whole response."
        ) from error


def decoded_npy(content: bytes, where: str) -> NDArray[Any]:
    try:
        return npy_array(content)
    except Exception as error:  # numpy raises errors of any class
        raise DataError(
            f"{where}: not an npy file, or not a whole one ({type(error).__name__}: {error})",
            EXPECTED,
            "Save it again with numpy.save.",
        ) from error


def _is_one(outputs: Any) -> bool:
    is_array = isinstance(outputs, np.ndarray) or hasattr(outputs, "detach")
    return is_array or isinstance(outputs, Mapping) or hasattr(outputs, "outputs")


def _joined(prompt: NDArray[Any], rows: NDArray[Any], where: str) -> NDArray[Any]:
    if rows.size == 0:  # nothing was generated beyond the first token
        return prompt
    if prompt.ndim != 3 or rows.ndim != 3 or prompt.shape[1:] != rows.shape[1:] or prompt.dtype != rows.dtype:
        raise DataError(
            f"{where}: {prompt.dtype} {prompt.shape} for the prompt, {rows.dtype} {rows.shape} for the completion",
            "integers [token, column, slot] of the same columns, slots and type",
            "Save both from one response.",
        )
    return np.concatenate([prompt, rows])


def _start(given: Any, start: int, where: str) -> int:
    stated = given.get("start", start) if isinstance(given, Mapping) else start
    try:
        return check_whole(stated, "start", 0, LONGEST, error=DataError)
    except DataError as error:
        raise DataError(f"{where}: {error.given}", error.expected, error.remedy) from None


def _ids(given: Any, where: str) -> list[int] | None:
    if given is None:
        return None
    try:
        return [check_whole(value, "a token id", error=DataError) for value in given]
    except TypeError:
        raise DataError(f"{where}: token ids {str(given)[:40]!r}", "a list of integers", "Correct it.") from None


def _count(usage: Any, name: str, where: str) -> int | None:
    value = None if usage is None else field(usage, name)
    return None if value is None else check_whole(value, f"{where}: {name}", 0, 2**31, error=DataError)
