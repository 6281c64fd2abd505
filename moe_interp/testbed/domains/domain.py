"""Domains: named sources of documents, split into training, validation and question-answer items without overlap."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from moe_interp.checks import check_name, check_text
from moe_interp.errors import ConfigError, DataError
from moe_interp.jsonlines import read_json_lines

Split = Literal["train", "validation", "items"]


@dataclass(frozen=True)
class Item:
    """A question with a short answer. ``prompt + answer`` is the text; ``fields`` grade it (such as steps, size)."""

    id: str
    domain: str
    prompt: str
    answer: str
    fields: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One JSONL line with the fields beside the four names; a field never hides one of them."""
        record = asdict(self)
        return json.dumps({**record.pop("fields"), **record}, ensure_ascii=False)


@dataclass(frozen=True)
class Domain:
    """Documents of one kind. No document is in two splits; no item's text is in a training or validation document.

    Args:
        name: The label that every token of the domain carries.
        train: Training documents.
        validation: Held-out documents, for the loss.
        items: Held-out questions with short answers.
        split_by: What is held out, in words (whole documents, questions, facts never asked in training).
    """

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    items: tuple[Item, ...] = ()
    split_by: str = "document"

    def __post_init__(self) -> None:
        check_name(self.name, "domain")
        for split in ("train", "validation"):
            if not getattr(self, split):
                raise DataError(
                    f"domain {self.name!r} has no {split} documents",
                    "at least one document in train and one in validation",
                    "Give more text, or a larger validation share.",
                )
        train = set(self.train)
        shared = train.intersection(self.validation)
        shared |= (train | set(self.validation)).intersection(i.prompt + i.answer for i in self.items)
        if shared:
            raise DataError(
                f"domain {self.name!r} has {len(shared)} texts in more than one split, such as {min(shared)[:60]!r}",
                "splits without overlap",
                "Drop the copies, or split by a key that they share.",
            )
        ids = [check_name(item.id, f"domain {self.name!r}: item id") for item in self.items]
        if len(set(ids)) < len(ids):
            raise DataError(
                f"domain {self.name!r} has items of the same id",
                "one id an item",
                "Number the items within the domain.",
            )


def check_domains(domains: Sequence[Domain], shares: Sequence[float] | None = None) -> tuple[float, ...]:
    """Shares of the domains, normalised to sum to 1 (equal without ``shares``).

    Raises:
        DataError: No domains, a name given twice, or a document found in two domains.
        ConfigError: Shares of another length, or one that is not positive and finite.
    """
    names = [d.name for d in domains]
    if not names or len(set(names)) < len(names):
        raise DataError(f"domains {names}", "at least one domain, each name once", "Rename or drop a domain.")
    home: dict[str, str] = {}
    for domain in domains:
        for text in {*domain.train, *domain.validation}:
            if home.setdefault(text, domain.name) != domain.name:
                raise DataError(
                    f"domains {home[text]!r} and {domain.name!r} share the document {text[:60]!r}",
                    "domains without overlap, or the label of a token would mean nothing",
                    "Drop the document from one of them.",
                )
    weights = [1.0] * len(names) if shares is None else list(shares)
    if len(weights) != len(names) or not all(0 < w < float("inf") for w in weights):
        raise ConfigError(
            f"shares {weights} for {len(names)} domains", "one positive share a domain", "Fix the shares."
        )
    return tuple(w / sum(weights) for w in weights)


def words(text: str) -> tuple[str, ...]:
    """The words of a line: a compact way to write a vocabulary."""
    return tuple(text.split())


def split_of(key: str, validation: float = 0.05, items: float = 0.05) -> Split:
    """The split of everything that shares ``key``, decided by its hash: the same in every run, whatever the sizes."""
    u = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    if u < validation:
        return "validation"
    return "items" if u < validation + items else "train"


@dataclass(frozen=True)
class Example:
    """One generated example: the document, and the same as a question (``fields`` grade it)."""

    key: str
    text: str
    prompt: str
    answer: str
    fields: dict[str, Any] = field(default_factory=dict)


def generated_domain(
    name: str,
    draw: Callable[[random.Random, Split, int], Example],
    *,
    n_train: int,
    n_validation: int,
    n_items: int,
    seed: int,
    split_by: str,
) -> Domain:
    """A domain of generated examples, each kept only in the split that the hash of its key names.

    Args:
        draw: (random stream, split, number so far) -> an example. The number lets items go round the grades evenly.
        n_train, n_validation, n_items: Distinct examples a split.
        seed: The stream is derived from seed, name and split.
        split_by: What the key is, in words.

    Raises:
        DataError: The generator cannot produce so many distinct examples.
    """

    def collect(split: Split, n: int) -> list[Example]:
        rng, tries = random.Random(f"{seed}/{name}/{split}"), 0
        found: dict[str, Example] = {}
        while len(found) < n:
            example = draw(rng, split, len(found))
            if split_of(example.key) == split:
                found.setdefault(example.text, example)
            tries += 1
            if tries > 400 * n + 4000:
                raise DataError(
                    f"domain {name!r} gave {len(found)} distinct {split} examples in {tries} draws",
                    f"{n} distinct examples",
                    "Ask for fewer, or widen the generator.",
                )
        return list(found.values())

    items = tuple(
        Item(f"{name}-{i:04d}", name, e.prompt, e.answer, e.fields) for i, e in enumerate(collect("items", n_items))
    )
    train = tuple(e.text for e in collect("train", n_train))
    validation = tuple(e.text for e in collect("validation", n_validation))
    return Domain(name, train, validation, items, split_by)


def write_items(items: Iterable[Item], path: Path) -> None:
    """Write items as JSONL: id, domain, prompt, answer and the item's own fields."""
    path.write_text("".join(item.to_json() + "\n" for item in items), encoding="utf-8")


def read_items(path: Path) -> tuple[Item, ...]:
    """Read what :func:`write_items` wrote; names beyond the four go to ``fields``.

    Raises:
        DataError: A line that is not JSON or lacks one of the four names, or holds something else than texts there.
    """
    items, expected = [], "a JSON object with id, domain, prompt, answer, each a text"
    for number, record in read_json_lines(path, expected):
        try:
            core = {k: record.pop(k) for k in ("id", "domain", "prompt", "answer")}
        except (KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{path}, line {number}: {error}", expected, "Fix the line.") from None
        place = f"{path}, line {number}"
        for name, value in core.items():
            if not isinstance(value, str):
                given = f"{place}: {name} {str(value)[:40]} of type {type(value).__name__}"
                raise DataError(given, expected, "Fix the line.")
            check_text(value, f"{place}: {name}") if name in ("prompt", "answer") else check_name(
                value, f"{place}: {name}"
            )
        items.append(Item(**core, fields=record))
    return tuple(items)
