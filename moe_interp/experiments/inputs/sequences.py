"""Sequences whose tokens are scored: text, messages or ids, which of their tokens count, and batches of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.checks import check_whole
from moe_interp.errors import DataError
from moe_interp.experiments.inputs.sequence_texts import as_sequence_text
from moe_interp.tokenization import TextReader, check_context, check_messages


@dataclass(frozen=True, eq=False)
class ScoredSequence:
    """A tokenised sequence.

    Attributes:
        id: Unique name.
        tokens: Ids, with BOS first where text was given and the model expects it.
        is_scored: ``[pos]`` bool, by the position that predicts: True where the *next* token is one to score.
        place: The id, and the line it was read from.
    """

    id: str
    tokens: tuple[int, ...]
    is_scored: NDArray[np.bool_]
    place: str = ""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def key(self) -> int:
        """What the sequence's random numbers are fixed by: its tokens, so neither its place nor its name."""
        digest = hashlib.sha256(repr(self.tokens).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def read_sequences(bridge: TransformerBridge, sequences: Any) -> list[ScoredSequence]:
    """Tokenised sequences from texts, lists of ids, mappings or lines of files; those that are read stay as they are.

    A mapping (or an item of :func:`moe_interp.load_items`) has ``text``, ``tokens``, ``messages`` or ``prompt`` and
    ``answer``, an ``id`` (its number by default), and which tokens' predictions are scored: ``mask``, one flag a
    token of the sequence, or ``score_from``, the index of the first one; the answer, where there is one; else all
    but the first token, which nothing predicts. Text, tokens, prompt and answer are texts or ids.

    ``messages`` go through the tokenizer's chat template: with an ``answer``, as its prompt (the assistant's turn is
    opened); without, whole, with the EOS that the template writes. Texts and messages begin with BOS exactly once,
    where the model expects it. Further fields are ignored (:func:`unread_fields` counts them).

    Raises:
        DataError: no sequence, ids that occur twice, fields that do not fit, text without a tokenizer, messages without
            a chat template, a sequence longer than the model's context, or one without a token to score. The message
            names the id, and the line of a file.

    Warns:
        RepeatedBOSWarning: texts that begin with BOS themselves, or ids that begin with two; once, naming them.
    """
    sequences = list(sequences) if isinstance(sequences, Iterator) else sequences
    if problem := _no_list(sequences):
        raise DataError(problem[0], "a list of texts, of lists of ids, or of mappings", problem[1])
    reader = TextReader(bridge)
    read = [_read(reader, entry, number) for number, entry in enumerate(sequences)]
    twice = [name for name, count in Counter(sequence.id for sequence in read).items() if count > 1]
    if twice:
        places = [one.place for one in read if one.id == twice[0] and one.place != f"sequence {one.id!r}"]
        given = f"sequence id {twice[0]!r} more than once" + (f": {', '.join(places)}" if places else "")
        raise DataError(given, "unique ids", "Rename one of them.")
    check_context(bridge, ((one.place or f"sequence {one.id!r}", len(one)) for one in read))
    reader.warn("sequence")
    return read


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


def _read(reader: TextReader, given: Any, number: int) -> ScoredSequence:
    if isinstance(given, ScoredSequence):
        return given
    entry = as_sequence_text(given, number)
    if isinstance(entry.start, list | tuple) and len(entry.start) and isinstance(entry.start[0], Mapping):
        messages = check_messages(entry.start, entry.place)
        tokens = reader.messages(messages, entry.place, is_prompt=entry.answer is not None)
    else:
        tokens = reader.start(entry.start, entry.place, entry.start_field)
    start = 1
    if entry.answer is not None:
        start, tokens = len(tokens), tokens + reader.rest(entry.answer, entry.place, entry.answer_field)
    if entry.mask is not None:
        predicted = _flags(entry.mask, entry.place, len(tokens))
    else:
        if entry.score_from is not None:
            start = check_whole(entry.score_from, f"{entry.place}: score_from", 0, error=DataError)
        predicted = np.arange(len(tokens)) >= start
    # by the position that predicts: the next token's flag; the last position predicts nothing
    is_scored = np.append(predicted[1:], False)
    if not is_scored.any():
        raise DataError(
            f"{entry.place}: no token to score among {len(tokens)}",
            "at least one token with a token before it",
            "Lengthen it, widen its mask, or leave it out.",
        )
    return ScoredSequence(entry.id, tokens, is_scored, entry.place)


def _flags(mask: Any, place: str, n_tokens: int) -> NDArray[np.bool_]:
    try:
        flags = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    except ValueError:  # rows of different lengths
        flags = np.empty(0, dtype=object)
    expected = f"one flag (0 or 1) for each of its {n_tokens} tokens"
    if flags.dtype.kind not in "biuf":
        raise DataError(f"{place}: mask={str(mask)[:60]}", expected, "Write it as a list of 0 and 1.")
    if flags.shape != (n_tokens,) or not np.isin(flags, (0, 1)).all():
        raise DataError(
            f"{place}: a mask of shape {flags.shape} and values {sorted(set(flags.ravel().tolist()))[:4]}",
            expected,
            "Tokenise the text first and mark its tokens, or give score_from.",
        )
    return flags.astype(bool)
