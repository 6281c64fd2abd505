"""Items: a prompt, its right answer, and the domain it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.checks import check_name
from moe_interp.engine.rerun import TargetPredictions
from moe_interp.errors import DataError
from moe_interp.jsonlines import read_json_lines
from moe_interp.tokenization import Messages, TextReader, check_context, id_row, prompt_of


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: Unique name.
        domain: Label of its domain.
        prompt, answer: Texts, tokenised apart, their ids concatenated. Lists of ids are taken as they are.
        line, source: Where it was read: the line, and the file's name.
        messages: A conversation in the place of the prompt, which is then empty: the tokenizer's chat template renders
            it and opens the assistant's turn, which the answer begins.
    """

    id: str
    domain: str
    prompt: str | tuple[int, ...]
    answer: str | tuple[int, ...]
    line: int | None = None
    source: str | None = None
    messages: Messages | None = field(default=None, hash=False)

    @property
    def place(self) -> str:
        """The item's id, and the line it stands on."""
        line = None if self.line is None else f"line {self.line}"
        where = ", ".join(part for part in (self.source, line) if part)
        return f"item {self.id!r}" + (f" ({where})" if where else "")

    @property
    def content(self) -> tuple[Any, ...]:
        """What the item is, wherever it was read: what a checksum is taken of."""
        given = (self.id, self.domain, self.prompt, self.answer)
        return given if self.messages is None else (*given, self.messages)


def load_items(
    *paths: str | Path,
    domains: Sequence[str] | None = None,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    domain_field: str = "domain",
    id_field: str = "id",
) -> list[Item]:
    """Read JSON-lines files with the fields id, domain, prompt and answer; further fields are ignored.

    A line may have ``messages`` (a list of ``{"role": ..., "content": ...}``) in the place of the prompt. Where it has
    no answer and its last message is the assistant's, that message's content is the answer.

    Args:
        paths: One or more files.
        domains: Keep these domains only.
        prompt_field, answer_field, domain_field, id_field: What the fields are called in the files.

    Raises:
        DataError: a file that does not exist, a line that is not such an item, ids that occur twice, or a domain that
            no item has. The message names the file, the line, the item and the field.
    """
    names = {"id": id_field, "domain": domain_field, "prompt": prompt_field, "answer": answer_field}
    items = [item for path in paths for item in _read(Path(path), names)]
    return check_items(items, domains)


def check_items(items: Iterable[Any], domains: Sequence[str] | None = None) -> list[Item]:
    """Items from items, or from mappings with the same fields (or with ``messages``: see :func:`load_items`).

    Raises:
        DataError: no items, missing or malformed fields, ids that occur twice, or an unknown domain.
    """
    found = [
        _named(item) if isinstance(item, Item) else _item(_fields(item), f"entry {number} of the items")
        for number, item in enumerate(items)
    ]
    twice = [name for name, count in Counter(item.id for item in found).items() if count > 1]
    if twice:
        places = ", ".join(item.place for item in found if item.id == twice[0])
        raise DataError(f"id {twice[0]!r} more than once: {places}", "unique ids", "Rename one of them.")
    if domains is not None:
        known = sorted({item.domain for item in found})
        unknown = sorted(set(domains) - set(known))
        if unknown:
            raise DataError(f"domain {unknown[0]!r}", f"domains among {known}", "Correct the name.")
        found = [item for item in found if item.domain in domains]
    if not found:
        raise DataError("no items", "at least one item with id, domain, prompt and answer", "Check the file.")
    return found


NAMES = {name: name for name in ("id", "domain", "prompt", "answer")}


def _fields(item: Any) -> Any:
    """Any object with the four fields counts as an item."""
    return {name: getattr(item, name) for name in NAMES} if all(hasattr(item, name) for name in NAMES) else item


def _named(item: Item) -> Item:
    """An item whose names can be stored and shown."""
    name, domain = check_name(item.id, "item id"), check_name(item.domain, f"{item.place}: domain")
    return item if (name, domain) == (item.id, item.domain) else replace(item, id=name, domain=domain)


def _read(path: Path, names: Mapping[str, str]) -> list[Item]:
    lines = read_json_lines(path, "a JSON-lines file of items: one JSON object a line")
    return [_item(fields, f"{path}, line {number}", number, path.name, names) for number, fields in lines]


def _item(
    fields: Any, where: str, line: int | None = None, source: str | None = None, names: Mapping[str, str] = NAMES
) -> Item:
    if not isinstance(fields, Mapping):
        expected = f"an object with {', '.join(names.values())}"
        raise DataError(f"{where}: {type(fields).__name__}", expected, "Mend the line.")
    given = {name: fields.get(field_name) for name, field_name in names.items()}
    if given["id"] is not None:
        given["id"] = check_name(given["id"], f"{where}: {names['id']}")
        where = f"{where} (item {given['id']!r})"
    given["prompt"], messages = prompt_of(fields, where, names["prompt"])
    if messages:
        messages, given["answer"] = _question_and_answer(messages, given["answer"], where, names["answer"])
        given["prompt"] = "in messages"
    if missing := [names[name] for name, value in given.items() if value is None or _is_empty(value)]:
        raise DataError(
            f"{where}: no {' and no '.join(missing)} among its fields {', '.join(map(str, fields))}",
            f"an item with {names['id']}, {names['domain']}, {names['prompt']} (or messages) and {names['answer']}",
            "Complete the item, leave it out, or name the fields that it has (prompt_field, answer_field, ...).",
        )
    domain = check_name(given["domain"], f"{where}: {names['domain']}")
    prompt, answer = (_text(given[name], f"{where}: {names[name]}") for name in ("prompt", "answer"))
    return Item(str(given["id"]), domain, "" if messages else prompt, answer, line, source, messages)


def _question_and_answer(messages: Messages, answer: Any, where: str, name: str) -> tuple[Messages, Any]:
    """A conversation up to the answer, and the answer: the one given, or else the assistant's last message."""
    if messages[-1]["role"] != "assistant":
        return messages, answer
    if answer is not None:
        raise DataError(
            f"{where}: {name} beside messages that end with the assistant's",
            "messages up to the question, and the answer; or messages that end with the answer",
            "Leave one of them out.",
        )
    question, last = messages[:-1], messages[-1].get("content")
    if not question or not isinstance(last, str):
        given = f"{where}: a last message without a text, or without a message before it"
        raise DataError(given, "a question and its answer", "Give the answer as text.")
    return question, last


def _is_empty(value: Any) -> bool:
    return value == "" if isinstance(value, str) else hasattr(value, "__len__") and not len(value)


def _text(value: Any, where: str) -> str | tuple[int, ...]:
    text = value if isinstance(value, str) else id_row(value)
    if text is None:
        given = f"{where} {str(value)[:40]} of type {type(value).__name__}"
        raise DataError(given, "text, or a list of token ids", "Put quotation marks around it.")
    return text


@dataclass(frozen=True, eq=False)
class TokenizedItem:
    """An item's ids: ``prompt`` (with BOS first, where the model expects it), then ``answer``."""

    item: Item
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def tokenize_items(bridge: TransformerBridge, items: Sequence[Item]) -> list[TokenizedItem]:
    """Tokenise prompts and answers apart; answers without special tokens before or after them.

    A prompt begins with BOS exactly once, where the model expects it, whatever the text or the chat template writes.

    Raises:
        DataError: an answer that is empty after tokenising or begins with a special token, an item longer than the
            model's context, ids that the vocabulary does not have, text without a tokenizer, or messages that the
            chat template refuses.

    Warns:
        RepeatedBOSWarning: prompts that begin with BOS themselves, or ids that begin with two; once, naming the items.
    """
    reader = TextReader(bridge)
    special = set(getattr(bridge.tokenizer, "all_special_ids", ()) or ())
    tokenized = []
    for item in items:
        if item.messages is None:
            prompt = reader.start(item.prompt, item.place, "prompt") if item.prompt else ()
        else:
            prompt = reader.messages(item.messages, item.place, is_prompt=True)
        answer = reader.rest(item.answer, item.place) if item.answer else ()
        if not prompt or not answer:
            raise DataError(
                f"{item.place}: an empty {'prompt' if not prompt else 'answer'} after tokenising",
                "at least one token each",
                "Correct the item, or leave it out.",
            )
        if isinstance(item.answer, str) and answer[0] in special:
            raise DataError(
                f"{item.place}: an answer that begins with the special token {answer[0]}",
                "an answer of ordinary tokens",
                "Leave it out; if the tokenizer adds it although told not to, give the answer as a list of ids.",
            )
        tokenized.append(TokenizedItem(item, prompt, answer))
    check_context(bridge, ((one.item.place, len(one)) for one in tokenized))
    reader.warn("item")
    return tokenized


@dataclass(frozen=True, eq=False)
class ItemBatch:
    """Tokenised items of like length, padded on the right.

    Attributes:
        index: Position of each row's item in the list that was batched.
        tokens: ``[row, pos]``.
        predictions: Where the answers' tokens are predicted, row by row.
        prompt_length, length: ``[row]`` tokens of the prompt and of the whole.
    """

    index: list[int]
    tokens: Tensor
    predictions: TargetPredictions
    prompt_length: Tensor
    length: Tensor

    @classmethod
    def build(cls, index: Sequence[int], items: Sequence[TokenizedItem], device: Any) -> ItemBatch:
        rows = [torch.tensor(items[i].prompt + items[i].answer) for i in index]
        # the padding id is never attended to and never read; the row's own last token is always a legal id
        width = max(len(row) for row in rows)
        tokens = torch.stack([torch.cat([row, row[-1:].expand(width - len(row))]) for row in rows])
        places = []
        for r, i in enumerate(index):
            start = len(items[i].prompt)
            for k, token in enumerate(items[i].answer):
                places.append((r, start + k - 1, token))
        predictions = TargetPredictions(*torch.tensor(places, device=device).T)
        prompts = torch.tensor([len(items[i].prompt) for i in index], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return cls(list(index), tokens.to(device), predictions, prompts, lengths)


def predictions_per_token(items: Sequence[TokenizedItem]) -> float:
    """The largest share of an item's tokens whose prediction is read."""
    return max(len(item.answer) / len(item) for item in items)
