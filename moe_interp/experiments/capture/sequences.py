"""The sequences whose routing is recorded: texts, messages, ids or batches of ids, read one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from moe_interp.checks import check_name
from moe_interp.engine.pass_inputs import check_tokens
from moe_interp.errors import DataError
from moe_interp.experiments.inputs.sequence_texts import SequenceText, as_sequence_text
from moe_interp.hooks.attach import MoEHooks
from moe_interp.tokenization import TextReader, check_context, check_messages, prompt_of

EXPECTED = "a list of texts, of lists of ids, of mappings or of items; or token ids [batch, pos]"


@dataclass(frozen=True, eq=False)
class CapturedSequence:
    """A sequence as the model is given it.

    Attributes:
        id: Unique name.
        tokens: Its real tokens.
        domain: Its label, if it has one.
        place: The id, and the line it was read from.
        answer: What the decoder of an encoder-decoder reads after its start token; empty otherwise.
        columns: Of a row that was given with its padding: the column of each token; and the padded row.
        row: See ``columns``.
    """

    id: str
    tokens: tuple[int, ...]
    domain: str | None = None
    place: str = ""
    answer: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    row: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def content(self) -> list[Any]:
        """What a checksum is taken of."""
        return [self.id, list(self.tokens), list(self.answer), self.domain]


class SequenceReader:
    """Reads sequences of one model.

    Args:
        moe: Attached hooks.
        sequences: See :func:`moe_interp.capture_routing`.
        attention_mask: Of token ids ``[batch, pos]``.
        domain: One label, or one a sequence.
        room: Tokens that each sequence needs in the context beside its own.
        reads_prompt: Of prompt and answer, only the prompt is read (it is to be gone on from).
        has_two_stacks: Prompt and answer are apart: the encoder's and the decoder's.

    Attributes:
        total: How many there are, where that is known.
    """

    def __init__(
        self,
        moe: MoEHooks,
        sequences: Any,
        attention_mask: Tensor | None = None,
        domain: Any = None,
        room: int = 0,
        reads_prompt: bool = False,
        has_two_stacks: bool = False,
    ) -> None:
        self.moe, self.room = moe, room
        self.reads_prompt, self.has_two_stacks = reads_prompt, has_two_stacks
        self._reader = TextReader(moe.bridge)
        self._ids: set[str] = set()
        self._has_domain: tuple[bool, str] | None = None
        given = _by_domain(sequences) if _is_by_domain(sequences) else sequences
        self._domains = _domains(domain, given)
        if attention_mask is not None or (isinstance(given, Tensor | np.ndarray) and given.ndim == 2):
            self._found: Iterable[CapturedSequence] = self._rows(given, attention_mask)
        elif isinstance(given, Iterator):
            self._found = (self._read(entry, number) for number, entry in enumerate(given))
        else:
            _refuse_no_list(given)
            self._found = [self._read(entry, number) for number, entry in enumerate(given)]
        self.total = len(self._found) if isinstance(self._found, list) else None
        if self.total is not None:
            self._reader.warn("sequence")

    def __iter__(self) -> Iterator[CapturedSequence]:
        number = -1
        for number, sequence in enumerate(self._found):
            yield self._checked(sequence, number)
        if number < 0:
            raise DataError("no sequence", EXPECTED, "Pass at least one.")
        if self.total is None:
            self._reader.warn("sequence")

    def _checked(self, sequence: CapturedSequence, number: int) -> CapturedSequence:
        """A sequence with its label, refused where its id or its want of a label does not fit the others."""
        if sequence.id in self._ids:
            raise DataError(f"sequence id {sequence.id!r} more than once", "unique ids", "Rename one of them.")
        self._ids.add(sequence.id)
        if self._domains is not None:
            sequence = replace(sequence, domain=self._domains[number % len(self._domains)])
        has_domain = sequence.domain is not None
        if self._has_domain is not None and self._has_domain[0] != has_domain:
            with_one, without = (sequence.place, self._has_domain[1])[:: 1 if has_domain else -1]
            raise DataError(
                f"{without} without a domain, and {with_one} with one", "a domain for all or for none", "Complete them."
            )
        self._has_domain = self._has_domain or (has_domain, sequence.place)
        return sequence

    def _rows(self, tokens: Any, mask: Tensor | None) -> list[CapturedSequence]:
        """The rows of a batch of ids, with their padding."""
        ids, mask = check_tokens(self.moe, tokens, mask)
        rows = ids.tolist()
        real = [[1] * len(row) for row in rows] if mask is None else mask.bool().tolist()
        found = []
        for number, (row, flags) in enumerate(zip(rows, real)):
            columns = tuple(column for column, flag in enumerate(flags) if flag)
            if not columns:
                raise DataError(f"row {number} of padding alone", "a real token in each row", "Leave the row out.")
            one = CapturedSequence(str(number), tuple(row[c] for c in columns), place=f"row {number}")
            # what is generated after needs no padding: the prompt is run by itself
            is_padded = len(columns) < len(row) and not self.reads_prompt
            found.append(replace(one, columns=columns, row=tuple(row)) if is_padded else one)
        check_context(self.moe.bridge, ((one.place, len(one) + self.room) for one in found))
        return found

    def _read(self, given: Any, number: int) -> CapturedSequence:
        if isinstance(given, CapturedSequence):
            return given
        entry, label = _entry(given, number)
        prompt_alone = self.reads_prompt or self.has_two_stacks
        if isinstance(entry.start, list | tuple) and len(entry.start) and isinstance(entry.start[0], Mapping):
            messages = check_messages(entry.start, entry.place)
            tokens = self._reader.messages(messages, entry.place, is_prompt=entry.answer is not None or prompt_alone)
        else:
            tokens = self._reader.start(entry.start, entry.place, entry.start_field)
        answer: tuple[int, ...] = ()
        if entry.answer is not None and not self.reads_prompt:
            answer = self._reader.rest(entry.answer, entry.place, entry.answer_field)
            if not self.has_two_stacks:
                tokens, answer = tokens + answer, ()
        if not tokens:
            raise DataError(f"{entry.place}: no token", "at least one", "Lengthen it, or leave it out.")
        check_context(self.moe.bridge, [(entry.place, len(tokens) + self.room)])
        label = None if label is None else check_name(label, f"{entry.place}: domain")
        return CapturedSequence(entry.id, tokens, label, entry.place, answer)


def _entry(given: Any, number: int) -> tuple[SequenceText, Any]:
    """An entry of a list, and its label; a prompt may stand alone."""
    label = getattr(given, "domain", None)
    if isinstance(given, Mapping):
        place = f"entry {number} of the sequences"
        prompt, _ = prompt_of(given, place)
        if given.get("answer") is None and prompt is not None and given.get("text") is None:
            given = {**{k: v for k, v in given.items() if k not in ("prompt", "answer")}, "text": prompt}
    entry = as_sequence_text(given, number)
    return entry, label if label is not None else entry.fields.get("domain")


def _is_by_domain(sequences: Any) -> bool:
    return isinstance(sequences, Mapping) and bool(sequences) and all(_is_list(v) for v in sequences.values())


def _is_list(value: Any) -> bool:
    """A list of sequences, not of ids or messages."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and not isinstance(value[0], int | np.integer)
        and not (isinstance(value[0], Mapping) and "role" in value[0])
    )


def _by_domain(groups: Mapping[Any, Sequence[Any]]) -> list[Any]:
    """The sequences of each domain, labelled by it."""
    found: list[Any] = []
    for domain, entries in groups.items():
        for entry in entries:
            number = str(len(found))
            if isinstance(entry, str):
                found.append({"id": number, "text": entry, "domain": domain})
            elif isinstance(entry, Mapping):
                found.append({"id": number, **entry, "domain": domain})
            elif hasattr(entry, "prompt") and hasattr(entry, "answer"):
                found.append(replace(entry, domain=domain))
            else:
                found.append({"id": number, "tokens": entry, "domain": domain})
    return found


def _domains(domain: Any, sequences: Any) -> list[str] | None:
    """One label a sequence, or one for all."""
    if domain is None:
        return None
    if isinstance(domain, str) or not hasattr(domain, "__len__"):
        return [check_name(domain, "domain")]
    labels = [check_name(label, "domain") for label in domain]
    n = len(sequences) if hasattr(sequences, "__len__") else None
    if len(labels) != n:
        given = f"{len(labels)} labels for {'a stream' if n is None else n} of sequences"
        raise DataError(given, "one label, or one for each of a list of sequences", "Correct domain=.")
    return labels


def _refuse_no_list(sequences: Any) -> None:
    """Refuse what is one sequence, or none."""
    wrap = "Wrap it in a list."
    if isinstance(sequences, str):
        raise DataError("one text", EXPECTED, wrap)
    if isinstance(sequences, Mapping | CapturedSequence):
        raise DataError(f"one {type(sequences).__name__}", EXPECTED, f"{wrap} By domain, give each a list.")
    if not isinstance(sequences, Sequence | Tensor | np.ndarray):
        raise DataError(f"a {type(sequences).__name__}", EXPECTED, "Pass a list.")
    if not len(sequences):
        raise DataError("no sequence", EXPECTED, "Pass at least one.")
    if all(isinstance(entry, int | np.integer) or getattr(entry, "ndim", 1) == 0 for entry in sequences):
        raise DataError(f"ids {str(list(map(int, sequences[:4])))[:-1]}, ...], one sequence", EXPECTED, wrap)
