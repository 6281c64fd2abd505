"""Reading items: what is kept, and what is refused with its file, line and id."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moe_interp as mi
from moe_interp.errors import DataError
from moe_interp.experiments.inputs.items import Item, check_items

ASKED = [{"role": "user", "content": "p"}]
ANSWERED = {"role": "assistant", "content": "q"}
CHAT = {"id": "b", "domain": "d", "messages": ASKED, "answer": "q"}
GOOD = {"id": "a", "domain": "d", "prompt": "p", "answer": "q"}


def written(folder: Path, *lines: Any, name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


def test_items_are_read_as_they_stand(tmp_path: Path) -> None:
    odd = {**GOOD, "id": 0, "prompt": "first\u2028second", "answer": [3, 0], "further": 1}
    first, second = mi.load_items(written(tmp_path, "\ufeff" + json.dumps(GOOD), "", odd))
    assert (first.id, first.domain, first.prompt, first.answer, first.line) == ("a", "d", "p", "q", 1)
    assert (second.id, second.prompt, second.answer) == ("0", "first\u2028second", (3, 0))
    assert second.place == "item '0' (items.jsonl, line 3)"
    assert check_items([GOOD])[0].place == "item 'a'"


BAD = [
    ({"id": "b", "domain": "d", "prompt": "p"}, r"items.jsonl, line 2 \(item 'b'\): no answer"),
    ({**GOOD, "id": "b", "answer": None}, r"line 2 \(item 'b'\): no answer"),
    ({**GOOD, "id": "b", "answer": [], "prompt": ""}, r"line 2 \(item 'b'\): no prompt and no answer"),
    ({**GOOD, "id": None}, "line 2: no id"),
    ({**GOOD, "id": "b", "answer": 18}, r"line 2 \(item 'b'\): answer 18 of type int. Expected: text, or a list"),
    ({**GOOD, "id": "b", "answer": True}, "answer True of type bool"),
    ({**GOOD, "id": "b", "prompt": [1.5]}, r"prompt \[1.5\] of type list"),
    ({**GOOD, "id": "b", "prompt": {"a": 1}}, "prompt {'a': 1} of type dict"),
    ("[1, 2]", "line 2: list. Expected: an object"),
    ("{broken", "line 2: Expecting property name"),
    ({**GOOD, "id": "b\0"}, r"line 2: id 'b\\x00' with the control character"),
    ({**GOOD, "id": "\ud800"}, "line 2: id .* with the half of a surrogate pair"),
    ({**GOOD, "id": "b", "domain": "d\x1b[2J"}, r"line 2 \(item 'b'\): domain .* control character '\\x1b'"),
    ({**GOOD, "id": "b", "domain": ["d"]}, r"line 2 \(item 'b'\): domain \"\['d'\]\" of type list"),
    ({**GOOD, "id": True}, "line 2: id 'True' of type bool"),
    ({**GOOD, "id": "b", "messages": [{"role": "user", "content": "p"}]}, r"\(item 'b'\): messages beside prompt"),
    ({**CHAT, "messages": "p"}, r"line 2 \(item 'b'\): messages of type str"),
    ({**CHAT, "messages": [{"role": "user"}]}, r"line 2 \(item 'b'\): message 0 is"),
    ({**CHAT, "messages": [*ASKED, ANSWERED]}, "answer beside messages that end with the assistant's"),
    ({**CHAT, "answer": None}, r"\(item 'b'\): no answer among its fields id, domain, messages, answer"),
    ({**CHAT, "answer": None, "messages": [ANSWERED]}, "a last message without a text, or without a message before it"),
    (GOOD, r"id 'a' more than once: item 'a' \(items.jsonl, line 1\), item 'a' \(items.jsonl, line 2\)"),
]


@pytest.mark.parametrize(("line", "text"), BAD, ids=[text[-24:] for _, text in BAD])
def test_a_bad_line_is_refused_with_its_place(tmp_path: Path, line: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        mi.load_items(written(tmp_path, GOOD, line))


def test_bad_files_and_domains_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    other = written(tmp_path, "", GOOD, name="more.jsonl")
    with pytest.raises(DataError, match=r"item 'a' \(items.jsonl, line 1\), item 'a' \(more.jsonl, line 2\)"):
        mi.load_items(path, other)
    with pytest.raises(DataError, match=r"domain 'e'. Expected: domains among \['d'\]"):
        mi.load_items(path, domains=["e"])
    with pytest.raises(DataError, match="not a file"):
        mi.load_items(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no items"):
        mi.load_items(written(tmp_path, ""))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"'utf-8' codec can't decode.*in UTF-8"):
        mi.load_items(path)
    with pytest.raises(DataError, match="entry 1 of the items: str"):
        check_items([GOOD, "text"])


def test_conversations_with_their_answer_apart_or_at_their_end(tmp_path: Path) -> None:
    whole = {"id": "c", "domain": "d", "messages": [*ASKED, ANSWERED]}
    as_prompt = {"id": "e", "domain": "d", "prompt": ASKED, "answer": "q"}
    apart, together, prompt = mi.load_items(written(tmp_path, CHAT, whole, as_prompt))
    for item in (apart, together, prompt):
        assert (item.messages, item.answer, item.prompt) == (tuple(ASKED), "q", "")
    assert [item.content[1:] for item in check_items([CHAT])] == [apart.content[1:]]
    assert check_items([apart]) == [apart]
    assert len({apart, together, prompt}) == 3
    assert check_items([Item(7, "d", "p", "q")])[0].id == "7"  # type: ignore[arg-type]


def test_fields_of_other_names(tmp_path: Path) -> None:
    lines = [
        {"name": 1, "topic": "d", "question": "p", "solution": "q", "answer": "r", "prompt": "s"},
        {"name": 2, "topic": "d", "question": "p", "answer": "r"},
    ]
    names = {"id_field": "name", "domain_field": "topic", "prompt_field": "question", "answer_field": "solution"}
    (item,) = mi.load_items(written(tmp_path, lines[0]), **names)
    assert (item.id, item.domain, item.prompt, item.answer) == ("1", "d", "p", "q")
    said = (
        r"line 2 \(item '2'\): no solution among its fields name, topic, question, answer\. Expected: an item with name"
    )
    with pytest.raises(DataError, match=said):
        mi.load_items(written(tmp_path, *lines), **names)
    (chat,) = mi.load_items(written(tmp_path, CHAT), prompt_field="messages")
    assert chat.messages == tuple(ASKED)


@pytest.mark.parametrize("odd", ["b\0", "b\ud800", "b\nc", "\x1b[0m"])
def test_names_that_no_file_holds_are_refused_in_python_too(odd: str) -> None:
    for entry in ({**GOOD, "id": odd}, Item(odd, "d", "p", "q"), SimpleNamespace(**{**GOOD, "id": odd})):
        with pytest.raises(DataError, match=r"id .* with the (control|half)"):
            check_items([entry])
    for entry in ({**GOOD, "domain": odd}, Item("a", odd, "p", "q")):
        with pytest.raises(DataError, match=r"domain .* with the (control|half)"):
            check_items([entry])


def test_ids_of_any_library(tmp_path: Path) -> None:
    given = {**GOOD, "id": np.int64(7), "prompt": np.array([3, 4]), "answer": torch.tensor([5])}
    (item,) = check_items([given])
    assert (item.id, item.prompt, item.answer) == ("7", (3, 4), (5,))
