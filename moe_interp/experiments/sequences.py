"""Sequences whose tokens are scored: text or ids, which of their tokens count, and batches of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.errors import DataError

FIELDS = ("id", "text", "tokens", "prompt", "answer", "mask", "score_from")


@dataclass(frozen=True, eq=False)
class ScoredSequence:
    """A tokenised sequence.

    Attributes:
        id: Unique name.
        tokens: Ids, with the leading special token that the model expects where text was given.
        is_scored: ``[pos]`` bool, by the position that predicts: True where the *next* token is one to score.
    """

    id: str
    tokens: tuple[int, ...]
    is_scored: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def key(self) -> int:
        """What the sequence's random numbers are fixed by: its tokens, so neither its place nor its name."""
        digest = hashlib.sha256(repr(self.tokens).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def read_sequences(bridge: TransformerBridge, sequences: Any) -> list[ScoredSequence]:
    """Tokenised sequences from texts, lists of ids, or mappings; those that are read already stay as they are.

    A mapping (or an item of :func:`moe_interp.load_items`) has ``text``, ``tokens`` or ``prompt`` and ``answer``, each
    a text or ids, an ``id`` (its number by default), and which tokens' predictions are scored: ``mask``, one flag a
    token of the sequence, or ``score_from``, the index of the first one; the answer, where there is a prompt; else all
    but the first token, which nothing predicts. Further fields are ignored: :func:`unread_fields` names them.

    Raises:
        DataError: no sequence, ids that occur twice, fields that do not fit, text without a tokenizer,
            a sequence longer than the model's context, or one without a token to score. The message names the id.
    """
    sequences = list(sequences) if isinstance(sequences, Iterator) else sequences
    if problem := _no_list(sequences):
        raise DataError(problem[0], "a list of texts, of lists of ids, or of mappings", problem[1])
    read = [_read(bridge, entry, number) for number, entry in enumerate(sequences)]
    twice = [name for name, count in Counter(sequence.id for sequence in read).items() if count > 1]
    if twice:
        raise DataError(f"sequence id {twice[0]!r} more than once", "unique ids", "Rename one of them.")
    _check_context(bridge, read)
    return read


def unread_fields(sequences: Iterable[Any]) -> dict[str, int]:
    """The fields of mappings that are not read, and how many mappings have each."""
    entries = [entry for entry in sequences if isinstance(entry, Mapping)]
    return dict(Counter(str(name) for entry in entries for name in entry if name not in FIELDS))


def batches_of_sequences(sequences: Sequence[ScoredSequence], tokens_per_batch: int) -> list[list[int]]:
    """Indices of sequences, longest first, cut so that rows x width stays within the budget (at least one each)."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), sequences[i].id))
    batches: list[list[int]] = []
    for i in order:
        if batches and len(sequences[batches[-1][0]]) * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """Sequences padded on the right, so that a position counts from the sequence's own start.

    Attributes:
        names: ``[row]`` ids.
        tokens, mask: ``[row, pos]``; the mask is 0 at padding.
        wanted: ``[row, pos]`` bool, where the next token is scored.
        keys: ``[row]``, what the sequences' random numbers are fixed by.
    """

    names: list[str]
    tokens: Tensor
    mask: Tensor
    wanted: Tensor
    keys: Tensor

    @classmethod
    def build(cls, sequences: Sequence[ScoredSequence], device: torch.device) -> SequenceBatch:
        width = max(len(sequence) for sequence in sequences)
        tokens = torch.zeros(len(sequences), width, dtype=torch.long)
        mask, wanted = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            n = len(sequence)
            tokens[row] = torch.tensor([*sequence.tokens, *[sequence.tokens[-1]] * (width - n)])  # always a legal id
            mask[row, :n] = 1
            wanted[row, :n] = torch.from_numpy(sequence.is_scored)
        keys = torch.tensor([sequence.key for sequence in sequences])
        return cls([s.id for s in sequences], tokens.to(device), mask.to(device), wanted.to(device), keys.to(device))


def _no_list(sequences: Any) -> tuple[str, str] | None:
    """Why this is not a list of sequences, and what to do; None where it is."""
    wrap = "Wrap it in a list."
    if isinstance(sequences, str):
        return "one text", wrap
    if isinstance(sequences, Mapping | ScoredSequence):
        return f"one {type(sequences).__name__}", wrap + " Of sequences by name, give each its id."
    if not isinstance(sequences, Sequence | Tensor | np.ndarray):
        return f"a {type(sequences).__name__}", "Pass a list."
    if getattr(sequences, "ndim", 1) == 0 or not len(sequences):
        return "no sequence", "Pass at least one."
    if all(isinstance(entry, Integral) or getattr(entry, "ndim", 1) == 0 for entry in sequences):
        return f"ids {str(list(map(int, sequences[:4])))[:-1]}, ...], one sequence", wrap
    return None


def _read(bridge: TransformerBridge, entry: Any, number: int) -> ScoredSequence:
    if isinstance(entry, ScoredSequence):
        return entry
    fields = _fields(entry, number)
    name = str(fields.get("id", number))
    _check_text(name, repr(name), "id")
    if "prompt" in fields:
        prompt = _ids(bridge, fields["prompt"], name, is_start=True)
        tokens, start = prompt + _ids(bridge, fields["answer"], name, is_start=False), len(prompt)
    else:
        tokens, start = _ids(bridge, fields.get("text", fields.get("tokens")), name, is_start=True), 1
    start = fields.get("score_from", start)
    if "mask" in fields:
        predicted = _flags(fields["mask"], name, len(tokens))
    else:
        if isinstance(start, bool) or not isinstance(start, int | np.integer) or start < 0:
            raise DataError(f"sequence {name!r}: score_from={start!r}", "an index, from 0", "Correct the index.")
        predicted = np.arange(len(tokens)) >= start
    # by the position that predicts: the next token's flag; the last position predicts nothing
    is_scored = np.append(predicted[1:], False)
    if not is_scored.any():
        raise DataError(
            f"sequence {name!r}: no token to score among {len(tokens)}",
            "at least one token with a token before it",
            "Lengthen it, widen its mask, or leave it out.",
        )
    return ScoredSequence(name, tokens, is_scored)


def _fields(entry: Any, number: int) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"text": entry}
    if hasattr(entry, "prompt") and hasattr(entry, "answer"):
        return {name: getattr(entry, name) for name in ("id", "prompt", "answer") if hasattr(entry, name)}
    if not isinstance(entry, Mapping):
        return {"tokens": entry}
    fields = {name: value for name, value in entry.items() if name in FIELDS and value is not None}
    sources = [n for n in ("text", "tokens", "prompt") if n in fields]
    if len(sources) != 1 or ("prompt" in fields) != ("answer" in fields) or {"mask", "score_from"} <= fields.keys():
        raise DataError(
            f"sequence {entry.get('id', number)!r} with the fields {sorted(map(str, entry))}",
            "text, tokens, or prompt and answer; and at most one of mask and score_from",
            "Correct the fields.",
        )
    return fields


def _ids(bridge: TransformerBridge, value: Any, name: str, is_start: bool) -> tuple[int, ...]:
    if isinstance(value, str):
        _check_text(value, repr(name), "text")
        if bridge.tokenizer is None:
            raise DataError(f"sequence {name!r}: text, but the model has no tokenizer", "ids", "Give ids.")
        if is_start:
            return tuple(bridge.to_tokens(value, truncate=False)[0].tolist())
        return tuple(bridge.tokenizer(value, add_special_tokens=False)["input_ids"])
    try:
        ids = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    except ValueError:
        ids = np.empty(0, dtype=object)
    vocabulary = int(getattr(bridge.cfg, "d_vocab", 0) or 0)
    is_out = ids.dtype.kind in "iu" and ids.size and (ids.min() < 0 or (vocabulary and ids.max() >= vocabulary))
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or not ids.size or is_out:
        found = f"ids from {ids.min()} to {ids.max()}" if is_out else f"{type(value).__name__} of shape {ids.shape}"
        expected = "a text, or a list of ids" + (f" below {vocabulary}" if vocabulary else "")
        raise DataError(f"sequence {name!r}: {found}", expected, "Tokenise it for this model.")
    return tuple(ids.tolist())


def _check_text(text: str, name: str, what: str) -> None:
    """Refuse what a result file cannot hold: half of a surrogate pair, and in an id the character NUL."""
    odd = [c for c in text if "\ud800" <= c <= "\udfff" or (c == "\0" and what == "id")]
    if odd:
        raise DataError(f"sequence {name}: {what} with the character {odd[0]!r}", "whole characters", "Remove it.")


def _flags(mask: Any, name: str, n_tokens: int) -> NDArray[np.bool_]:
    try:
        flags = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    except ValueError:  # rows of different lengths
        flags = np.empty(0, dtype=object)
    expected = f"one flag (0 or 1) for each of its {n_tokens} tokens"
    if flags.dtype.kind not in "biuf":
        raise DataError(f"sequence {name!r}: mask={str(mask)[:60]}", expected, "Write it as a list of 0 and 1.")
    if flags.shape != (n_tokens,) or not np.isin(flags, (0, 1)).all():
        raise DataError(
            f"sequence {name!r}: a mask of shape {flags.shape} and values {sorted(set(flags.ravel().tolist()))[:4]}",
            expected,
            "Tokenise the text first and mark its tokens, or give score_from.",
        )
    return flags.astype(bool)


def _check_context(bridge: TransformerBridge, sequences: list[ScoredSequence]) -> None:
    model: Any = bridge.original_model
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    long = [sequence for sequence in sequences if context is not None and len(sequence) > context]
    if long:
        named = "; ".join(f"sequence {sequence.id!r}: {len(sequence)} tokens" for sequence in long[:5])
        raise DataError(
            named + (f"; and {len(long) - 5} more" if len(long) > 5 else ""),
            f"at most the model's context of {context}",
            "Shorten what is longer, or leave it out.",
        )
