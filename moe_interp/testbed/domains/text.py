"""Domains of real text: the running Python's standard library, JSONL or text files, and `datasets` by name."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from moe_interp.checks import check_text
from moe_interp.errors import DataError
from moe_interp.jsonlines import read_json_lines
from moe_interp.testbed.domains.domain import Domain, Item, split_of

# Tests, generated tables and grammar files: long lists of numbers and names rather than code.
_SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "encodings",
    "pydoc_data",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


def text_domain(
    name: str,
    documents: Mapping[str, str],
    *,
    validation: float = 0.05,
    items: float = 0.05,
    n_items: int = 200,
    prompt_lines: int = 6,
    max_characters: int = 260,
    seed: int = 0,
) -> Domain:
    """A domain of whole documents, split by the hash of their keys; a copy of a document is dropped.

    An item is a run of ``prompt_lines`` non-empty lines of a held-out document and, as its answer, the next line;
    together at most ``max_characters`` long.

    Args:
        documents: key (path, say) -> text.
        validation, items: Shares of documents held out for the loss and for items.

    Raises:
        DataError: A split is left without documents.
    """
    splits: dict[str, dict[str, None]] = {"train": {}, "validation": {}, "items": {}}
    seen: set[str] = set()
    for key in sorted(documents):
        text = documents[key].strip()
        if text and text not in seen:
            seen.add(text)
            splits[split_of(key, validation, items)][text] = None
    rng = random.Random(f"{seed}/{name}/items")
    found: dict[str, Item] = {}
    candidates = [run for text in splits["items"] for run in _runs(text, prompt_lines)]
    rng.shuffle(candidates)
    short = [(prompt, answer) for prompt, answer in candidates if len(prompt) + len(answer) <= max_characters]
    for prompt, answer in short[:n_items]:
        found.setdefault(prompt + answer, Item(f"{name}-{len(found):04d}", name, prompt, answer))
    train = list(splits["train"])
    rng.shuffle(train)  # neighbours in a folder are alike, and the tokenizer reads from the front
    return Domain(name, tuple(train), tuple(splits["validation"]), tuple(found.values()), "document")


def _runs(text: str, n_lines: int) -> list[tuple[str, str]]:
    """(n lines with the next line's indentation left to the answer, the next line) of each place that can hold one."""
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    return [
        ("\n".join(lines[i : i + n_lines]), "\n" + lines[i + n_lines])
        for i in range(0, len(lines) - n_lines, n_lines)
        if 8 <= len(lines[i + n_lines].strip()) <= 60
    ]


def python_standard_library(*, n_items: int = 300, seed: int = 0) -> Domain:
    """Source files of the running Python's standard library (PSF-2.0), without tests and generated tables.

    Held out by file. Other Python versions give other text, so a run records the version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED.intersection(relative.parts) and not any("-" in part for part in relative.parts[:-1]):
            documents[relative.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return text_domain("code", documents, validation=0.06, items=0.06, n_items=n_items, seed=seed)


def read_documents(path: Path, name: str | None = None) -> dict[str, str]:
    """Documents of a ``.jsonl`` file (``text``, optional ``path`` and ``domain``) or of a folder of text files.

    Args:
        name: Keep only lines of this ``domain``.

    Raises:
        DataError: Nothing there, or a line without ``text``.
    """
    documents: dict[str, str] = {}
    if path.is_dir():
        documents = {
            f.relative_to(path).as_posix(): f.read_text(encoding="utf-8", errors="replace")
            for f in sorted(path.rglob("*"))
            if f.is_file() and not f.name.startswith(".")
        }
    elif path.is_file():
        expected = "a JSON object with a string 'text'"
        for number, record in read_json_lines(path, expected):
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise DataError(f"{path}, line {number} is {str(record)[:40]}", expected, "Fix or drop the line.")
            check_text(record["text"], f"{path}, line {number}: text")
            if name is None or record.get("domain", name) == name:
                documents[f"{record.get('path', '')}#{number - 1}"] = record["text"]
    if not documents:
        raise DataError(f"{path} holds no documents", "a .jsonl file or a folder of text files", "Check the path.")
    return documents


def dataset_domain(
    name: str,
    dataset: str,
    *,
    split: str = "train",
    column: str = "text",
    n_documents: int = 2000,
    subset: str | None = None,
) -> Domain:
    """A domain from a dataset, streamed (needs the ``data`` extra and, for the hub, a network).

    Args:
        dataset: A name on the Hugging Face hub, or a folder of parquet, JSON-lines, CSV or text files.

    Raises:
        DataError: `datasets` is not installed, there is no such dataset, or no such column of text.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"dataset {dataset!r} was asked for, but `datasets` is not installed",
            "the optional dependency `datasets`",
            "Install it with `pip install 'moe-interp[data]'`, or give a JSONL file.",
        ) from None
    documents: dict[str, str] = {}
    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(dataset, subset, split=split, streaming=True)
        for number, row in enumerate(islice(rows, n_documents)):
            if not isinstance(row.get(column), str):
                raise DataError(
                    f"dataset {dataset!r}, row {number}, has columns {sorted(row)}",
                    f"text in a column {column!r}",
                    "Name the text column with `column=`.",
                )
            documents[f"{dataset}#{number}"] = row[column]
    except (OSError, ValueError) as error:
        raise DataError(
            f"dataset {dataset!r} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})",
            f"a dataset with a split {split!r}, on the hub or in a folder",
            "Check name, split and network.",
        ) from error
    return text_domain(name, documents)
