"""Reading items: what is kept, and what is refused with its file, line and id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moe_interp as mi
from moe_interp.errors import DataError
from moe_interp.experiments.items import check_items

GOOD = {"id": "a", "domain": "d", "prompt": "p", "answer": "q"}


def written(folder: Path, *lines: Any, name: str = "items.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines), "utf-8")
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
