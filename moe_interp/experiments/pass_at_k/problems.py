"""Problems: a prompt and its answer, read from JSON lines or a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.inputs.items import Item, check_items
from moe_interp.experiments.inputs.repeats import Merged, merge_repeats
from moe_interp.jsonlines import read_json_lines
from moe_interp.tokenization import TextReader

DOMAIN = "all"
"""The domain of problems that name none."""
HUB = "hub:"
FIELDS = ("id", "domain", "prompt", "answer", "messages")


@dataclass(frozen=True)
class Problem(Item):
    """An item with all that its line holds, for checkers.

    Attributes:
        fields: The line's further fields.
    """

    fields: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def place(self) -> str:
        return super().place.replace("item", "problem", 1)


def load_problems(
    *sources: str | Path,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    domain_field: str = "domain",
    id_field: str = "id",
    first: int | None = None,
) -> list[Problem]:
    """Problems of JSON-lines files, or of data sets named ``hub:NAME`` or ``hub:NAME:SPLIT`` ("test" by default).

    A line has a prompt (or ``messages``, for the chat template) and an answer, a text or a number. Where it has no id,
    that is the line's number, counted from 1 (in later sources with the source's name before it); where it has no
    domain, "all". Its further fields stay in ``problem.fields``.

    Args:
        sources: Files and data sets; a data set's name may also be a folder of its files.
        prompt_field, answer_field, domain_field, id_field: What the fields are called.
        first: Read so many of each source only.

    Raises:
        DataError: a file or a data set that cannot be read, a line without a prompt or an answer (with its number), or
            ids that occur twice.
        ConfigError: a data set without the library ``datasets``.
    """
    names = {"prompt": prompt_field, "answer": answer_field, "domain": domain_field, "id": id_field}
    found: list[Problem] = []
    for number, source in enumerate(sources):
        prefix = f"{Path(str(source).removeprefix(HUB)).stem}-" if number else ""
        rows = (
            _rows(str(source))
            if str(source).startswith(HUB)
            else read_json_lines(Path(source), "JSON lines of problems")
        )
        for line, record in islice(rows, first):
            found.append(_problem(record, f"{source}, line {line}", line, prefix, names))
    return check_problems(found)


def check_problems(problems: Iterable[Any]) -> list[Problem]:
    """Problems from problems, items, or mappings with the same fields; id and domain may be missing.

    Raises:
        DataError: none, one without a prompt or an answer, or ids that occur twice.
    """
    names = {name: name for name in ("prompt", "answer", "domain", "id")}
    if not isinstance(problems, Iterable):
        raise DataError(f"problems of type {type(problems).__name__}", "a list of problems", "See load_problems.")
    found = []
    for number, given in enumerate(problems, 1):
        if isinstance(given, Problem):
            found.append(given)
            continue
        record = given
        if not isinstance(given, Mapping) and hasattr(given, "prompt"):
            record = {name: getattr(given, name, None) for name in FIELDS} | dict(getattr(given, "fields", None) or {})
        found.append(_problem(record, f"problem {number}", None, "", names, number))
    if not found:
        raise DataError("no problems", "at least one, with prompt and answer", "Check the file.")
    check_items(found)
    return found


def _problem(
    record: Any, where: str, line: int | None, prefix: str, names: Mapping[str, str], number: int | None = None
) -> Problem:
    if not isinstance(record, Mapping):
        expected = f"an object with {names['prompt']} and {names['answer']}"
        raise DataError(f"{where}: {type(record).__name__}", expected, "Mend the line.")
    given: dict[str, Any] = {name: record.get(called) for name, called in names.items()}
    given["id"] = f"{prefix}{line or number}" if given["id"] is None else given["id"]
    given["domain"] = DOMAIN if given["domain"] is None else given["domain"]
    given["answer"] = _number_as_text(given["answer"])
    if record.get("messages") is not None:
        given["messages"] = record["messages"]
    missing = [names[name] for name in ("prompt", "answer") if _is_missing(given[name])]
    if "messages" in given and names["prompt"] in missing:
        missing.remove(names["prompt"])
        given.pop("prompt")
    if names["answer"] in missing and _ends_with_answer(given.get("messages")):
        missing.remove(names["answer"])
        given.pop("answer")
    if missing:
        raise DataError(
            f"{where}: no {' and no '.join(missing)} among its fields {', '.join(map(str, record))}",
            f"a problem with {names['prompt']} (or messages) and {names['answer']}",
            "Complete it, leave it out, or name the fields that it has (prompt_field, answer_field, ...).",
        )
    (item,) = check_items([given])
    used = {*names.values(), "messages"}
    rest = {key: value for key, value in record.items() if key not in used}
    place = {"line": line, "source": Path(where.rpartition(", line")[0]).name} if line else {}
    return Problem(item.id, item.domain, item.prompt, item.answer, messages=item.messages, fields=rest, **place)  # type: ignore[arg-type]


def _number_as_text(value: Any) -> Any:
    """A number of Python, numpy or a tensor as text; one that stands for a missing value as None."""
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _is_missing(value: Any) -> bool:
    """Whether a prompt or an answer is none: nothing, a missing number, blank text, or no ids."""
    if isinstance(value, str):
        return not value.strip()
    if pd.api.types.is_scalar(value):
        return bool(pd.isna(value))
    return hasattr(value, "__len__") and len(value) == 0


def _ends_with_answer(messages: Any) -> bool:
    """Whether a conversation's last message is the assistant's, which is the answer then."""
    last = messages[-1] if isinstance(messages, list | tuple) and messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def _rows(name: str) -> Iterable[tuple[int, Any]]:
    """``(number, record)`` of a data set's split, from 1."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"{name} without the library datasets", "that library", "Install it: pip install 'moe-interp[data]'."
        ) from error
    dataset, _, split = name.removeprefix(HUB).partition(":")
    try:
        rows = load_dataset(dataset, split=split or "test")
    except Exception as error:  # the hub's, the network's, the file system's and the formats' own
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        given = f"data set {dataset!r}, split {split or 'test'!r}, which cannot be read ({said})"
        raise DataError(given, "a data set on the hub or in a folder", "Check name, split and network.") from error
    return enumerate(rows, 1)


@dataclass(frozen=True, eq=False)
class TokenizedProblem:
    """A problem and the ids of its prompt, BOS first where the model expects it."""

    problem: Problem
    prompt: tuple[int, ...]


def tokenize_problems(bridge: TransformerBridge, problems: Sequence[Problem]) -> list[TokenizedProblem]:
    """Tokenise prompts, or conversations by the tokenizer's chat template.

    Raises:
        DataError: an empty prompt, text without a tokenizer, messages without a chat template or that it refuses, or
            ids outside of the vocabulary.

    Warns:
        RepeatedBOSWarning: prompts that begin with BOS themselves; once, naming the problems.
    """
    reader, found = TextReader(bridge), []
    for problem in problems:
        if problem.messages is None:
            ids = reader.start(problem.prompt, problem.place, "prompt")
        else:
            ids = reader.messages(problem.messages, problem.place, is_prompt=True)
        if not ids:
            raise DataError(f"{problem.place}: an empty prompt after tokenising", "at least one token", "Correct it.")
        found.append(TokenizedProblem(problem, ids))
    reader.warn("problem")
    return found


def distinct_problems(problems: Sequence[TokenizedProblem]) -> tuple[list[TokenizedProblem], Merged]:
    """Problems of one prompt and answer counted once, under the first one's id.

    Warns:
        RepeatedContentWarning: where there are some.
    """
    contents = [(problem.prompt, problem.problem.answer) for problem in problems]
    kept, merged = merge_repeats(contents, [problem.problem.id for problem in problems], "problems")
    return [problems[i] for i in kept], merged
