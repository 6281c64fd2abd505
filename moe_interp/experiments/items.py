"""Items: a prompt, its right answer, and the domain it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.errors import DataError
from moe_interp.hooks.prefix import Reads
from moe_interp.jsonlines import read_json_lines


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: Unique name.
        domain: Label of its domain.
        prompt, answer: Texts, tokenised apart, their ids concatenated. Lists of ids are taken as they are.
        line, source: Where it was read: the line, and the file's name.
    """

    id: str
    domain: str
    prompt: str | tuple[int, ...]
    answer: str | tuple[int, ...]
    line: int | None = None
    source: str | None = None

    @property
    def place(self) -> str:
        """The item's id, and the line it stands on."""
        line = None if self.line is None else f"line {self.line}"
        where = ", ".join(part for part in (self.source, line) if part)
        return f"item {self.id!r}" + (f" ({where})" if where else "")

    @property
    def content(self) -> tuple[Any, ...]:
        """What the item is, wherever it was read: what a checksum is taken of."""
        return self.id, self.domain, self.prompt, self.answer


def load_items(*paths: str | Path, domains: Sequence[str] | None = None) -> list[Item]:
    """Read JSON-lines files with the fields id, domain, prompt and answer; further fields are ignored.

    Args:
        paths: One or more files.
        domains: Keep these domains only.

    Raises:
        DataError: a file that does not exist, a line that is not such an item, ids that occur twice, or a domain that
            no item has. The message names the item and its line.
    """
    items = [item for path in paths for item in _read(Path(path))]
    return check_items(items, domains)


def check_items(items: Iterable[Any], domains: Sequence[str] | None = None) -> list[Item]:
    """Items from items, or from mappings with the same fields.

    Raises:
        DataError: no items, missing or malformed fields, ids that occur twice, or an unknown domain.
    """
    found = [
        item if isinstance(item, Item) else _item(_fields(item), f"entry {number} of the items")
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


def _fields(item: Any) -> Any:
    """Any object with the four fields counts as an item."""
    names = ("id", "domain", "prompt", "answer")
    return {name: getattr(item, name) for name in names} if all(hasattr(item, name) for name in names) else item


def _read(path: Path) -> list[Item]:
    lines = read_json_lines(path, "a JSON-lines file of items: one JSON object a line")
    return [_item(fields, f"{path}, line {number}", number, path.name) for number, fields in lines]


def _item(fields: Any, where: str, line: int | None = None, source: str | None = None) -> Item:
    if not isinstance(fields, Mapping):
        raise DataError(
            f"{where}: {type(fields).__name__}", "an object with id, domain, prompt, answer", "Mend the line."
        )
    names = ("id", "domain", "prompt", "answer")
    missing = [name for name in names if fields.get(name) is None or len(str(fields[name])) == 0 or fields[name] == []]
    name = f" (item {fields['id']!r})" if "id" not in missing else ""
    if missing:
        raise DataError(
            f"{where}{name}: no {' and no '.join(missing)}",
            "an item with id, domain, prompt and answer",
            "Complete the item, or leave it out.",
        )
    for field in ("prompt", "answer"):
        if not isinstance(fields[field], str) and not _is_ids(fields[field]):
            raise DataError(
                f"{where}{name}: {field} {str(fields[field])[:40]} of type {type(fields[field]).__name__}",
                "text, or a list of token ids",
                "Put quotation marks around it.",
            )
    texts = [
        fields[field] if isinstance(fields[field], str) else tuple(fields[field]) for field in ("prompt", "answer")
    ]
    return Item(str(fields["id"]), str(fields["domain"]), texts[0], texts[1], line, source)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in value)


@dataclass(frozen=True, eq=False)
class TokenizedItem:
    """An item's ids: ``prompt`` (with the leading special token the model expects), then ``answer``."""

    item: Item
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def tokenize_items(bridge: TransformerBridge, items: Sequence[Item]) -> list[TokenizedItem]:
    """Tokenise prompts and answers apart; answers without special tokens.

    Raises:
        DataError: an answer that is empty after tokenising or begins with a special token, an item longer than the
            model's context, ids that the vocabulary does not have, or text without a tokenizer.
    """
    tokenizer, context = bridge.tokenizer, int(getattr(bridge.cfg, "n_ctx", 0) or 0)
    vocabulary = int(bridge.cfg.d_vocab)
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    tokenized = []
    for item in items:
        prompt, answer = _ids(bridge, item.prompt, item, True), _ids(bridge, item.answer, item, False)
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
                "The tokenizer adds it although told not to: give the answer as a list of ids.",
            )
        if strange := [i for i in (*prompt, *answer) if not 0 <= i < vocabulary]:
            raise DataError(
                f"{item.place}: token id {strange[0]}", f"ids from 0 to {vocabulary - 1}", "Correct the item's ids."
            )
        if context and len(prompt) + len(answer) > context:
            raise DataError(
                f"{item.place}: {len(prompt)} + {len(answer)} tokens",
                f"at most the model's context of {context}",
                "Shorten the item, or leave it out.",
            )
        tokenized.append(TokenizedItem(item, prompt, answer))
    return tokenized


def _ids(bridge: TransformerBridge, text: str | tuple[int, ...], item: Item, is_prompt: bool) -> tuple[int, ...]:
    if not isinstance(text, str):
        return tuple(int(i) for i in text)
    if bridge.tokenizer is None:
        raise DataError(f"{item.place}: text, but the model has no tokenizer", "ids", "Give prompt and answer as ids.")
    if is_prompt:
        # not truncated: an item that does not fit is refused, not cut
        return tuple(bridge.to_tokens(text, truncate=False)[0].tolist())
    return tuple(bridge.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, eq=False)
class ItemBatch:
    """Tokenised items of like length, padded on the right.

    Attributes:
        index: Position of each row's item in the list that was batched.
        tokens: ``[row, pos]``.
        reads: The answers' predictions, row by row.
        prompt_length, length: ``[row]`` tokens of the prompt and of the whole.
    """

    index: list[int]
    tokens: Tensor
    reads: Reads
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
        reads = Reads(*torch.tensor(places, device=device).T)
        prompts = torch.tensor([len(items[i].prompt) for i in index], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return cls(list(index), tokens.to(device), reads, prompts, lengths)


def reads_per_token(items: Sequence[TokenizedItem]) -> float:
    """The largest share of an item's tokens whose prediction is read."""
    return max(len(item.answer) / len(item) for item in items)


def batches_of_like_length(items: Sequence[TokenizedItem], tokens_per_batch: int) -> list[list[int]]:
    """Item indices, longest first, cut so that rows x width stays within the budget (at least one item each)."""
    order = sorted(range(len(items)), key=lambda i: (-len(items[i]), i))
    batches: list[list[int]] = []
    for i in order:
        if batches and len(items[batches[-1][0]]) * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
