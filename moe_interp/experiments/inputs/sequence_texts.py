"""Sequences as they are handed in, before they are tokenised: lines of files, mappings, texts, ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_interp.checks import check_name
from moe_interp.errors import DataError
from moe_interp.jsonlines import read_json_lines
from moe_interp.tokenization import prompt_of

FIELDS = ("id", "text", "tokens", "prompt", "messages", "answer", "mask", "score_from")


@dataclass(frozen=True, eq=False)
class SequenceText:
    """A sequence before it is tokenised, as a line of a file or a mapping gives it.

    Attributes:
        id: Unique name.
        start: What it begins with: a text, ids, or messages for the chat template.
        start_field: The field that this stood in.
        answer: A text or ids that go on it, tokenised apart; None where ``start`` is all of it.
        answer_field: The field that the answer stood in.
        mask, score_from: Which tokens are scored, if given.
        fields: The other fields, which are not read.
        line, source: Where it was read: the line, and the file's name.
    """

    id: str
    start: Any
    start_field: str = "text"
    answer: Any = None
    answer_field: str = "answer"
    mask: Any = None
    score_from: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = None
    source: str | None = None

    @property
    def place(self) -> str:
        """The sequence's id, and the line it stands on."""
        return f"sequence {self.id!r}" + ("" if self.line is None else f" ({self.source}, line {self.line})")


def load_sequences(
    *paths: str | Path,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    text_field: str = "text",
    id_field: str = "id",
) -> list[SequenceText]:
    """Sequences of JSON-lines files, for :func:`moe_interp.counterfactual_routes`.

    A line is a text, a list of ids, or an object with ``text``, ``tokens``, ``messages``, or ``prompt`` and ``answer``,
    as :func:`.sequences.read_sequences` takes them. Its other fields are kept in ``fields``, to
    choose by. To score the worked solutions of a file with the fields prompt, solution and answer, give
    ``answer_field="solution"``.

    Args:
        paths: One or more files.
        prompt_field, answer_field, text_field, id_field: What the fields are called in the files. Lines without an id
            are numbered, as ``FILE-LINE``.

    Raises:
        DataError: a file that cannot be read or holds no sequence, or a line that is none. The message names the file,
            the line, the id and the field.
    """
    names = {"prompt": prompt_field, "answer": answer_field, "text": text_field, "id": id_field}
    found: list[SequenceText] = []
    for path in map(Path, paths):
        expected = "a file of JSON lines, each a sequence"
        read = [_line(record, path, number, names) for number, record in read_json_lines(path, expected)]
        if not read:
            raise DataError(f"{path} without a sequence", expected, "Add lines, or name another file.")
        found += read
    return found


def unread_fields(sequences: Iterable[Any]) -> dict[str, int]:
    """The fields of mappings and of lines that are not read, and how many have each."""
    found: Counter[str] = Counter()
    for entry in sequences:
        if isinstance(entry, SequenceText):
            found.update(map(str, entry.fields))
        elif isinstance(entry, Mapping):
            found.update(str(name) for name in entry if name not in FIELDS)
    return dict(found)


def as_sequence_text(given: Any, number: int) -> SequenceText:
    """An entry of a list of sequences, named by its number where it has no id.

    Raises:
        DataError: fields that do not fit, or an id that is no name.
    """
    if isinstance(given, SequenceText):
        check_name(given.id, "sequence id")
        return given
    if isinstance(given, str):
        return SequenceText(str(number), given)
    if not isinstance(given, Mapping) and hasattr(given, "prompt") and hasattr(given, "answer"):
        # an item
        messages = getattr(given, "messages", None)
        start = {"prompt": given.prompt} if messages is None else {"messages": messages}
        given = {"id": getattr(given, "id", None), **start, "answer": given.answer}
    if not isinstance(given, Mapping):
        return SequenceText(str(number), given, "tokens")
    name = given.get("id")
    name = str(number) if name is None else check_name(name, f"entry {number} of the sequences: id")
    return _entry(given, name, f"sequence {name!r}")


_NAMES = {name: name for name in ("prompt", "answer", "text", "id")}


def _line(record: Any, path: Path, line: int, names: Mapping[str, str]) -> SequenceText:
    """A line of a file."""
    if not isinstance(record, Mapping):
        record, names = {"text" if isinstance(record, str) else "tokens": record}, _NAMES
    where = f"{path}, line {line}"
    given = record.get(names["id"])
    name = f"{path.stem}-{line}" if given is None else check_name(given, f"{where}: {names['id']}")
    return _entry(record, name, f"{where} (sequence {name!r})", names, line, path.name)


def _entry(
    record: Mapping[str, Any],
    name: str,
    place: str,
    names: Mapping[str, str] = _NAMES,
    line: int | None = None,
    source: str | None = None,
) -> SequenceText:
    """A mapping's fields, of which those that are None count as absent."""
    fields = {key: value for key, value in record.items() if value is not None}
    prompt, messages = prompt_of(fields, place, names["prompt"])
    starts = {names["text"]: fields.get(names["text"]), "tokens": fields.get("tokens")}
    starts |= {names["prompt"]: prompt, "messages": messages}
    starts = {key: value for key, value in starts.items() if value is not None}
    answer = fields.get(names["answer"])
    is_chosen = names["answer"] != "answer"  # a field that is asked for has to be there
    has_prompt, fits = not starts.keys() & {names["text"], "tokens"}, len(starts) == 1
    fits &= (answer is not None or (messages is not None and not is_chosen)) if has_prompt else answer is None
    if answer is None and (is_chosen or (starts.keys() == {names["prompt"]} and not messages)):
        raise DataError(
            f"{place}: no {names['answer']} among its fields {', '.join(map(str, record))}",
            f"{names['prompt']} (or messages) and {names['answer']}",
            "Complete the line, leave it out, or name the field that it has (answer_field).",
        )
    if not fits or {"mask", "score_from"} <= fields.keys():
        both = f"{names['prompt']} (or messages) and {names['answer']}"
        raise DataError(
            f"{place} with the fields {sorted(map(str, record))}",
            f"{names['text']}, tokens, messages, or {both}; and at most one of mask and score_from",
            "Correct the fields, or name those that it has (prompt_field, answer_field, text_field).",
        )
    used = {*names.values(), "tokens", "messages", "mask", "score_from"}
    others = {str(key): value for key, value in record.items() if key not in used}
    ((start_field, start),) = starts.items()
    if messages and answer is not None and messages[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: {names['answer']} beside messages that end with the assistant's",
            "messages up to the question, and the answer; or messages alone",
            "Leave one of them out.",
        )
    scored = fields.get("mask"), fields.get("score_from")
    return SequenceText(name, start, start_field, answer, names["answer"], *scored, others, line, source)
