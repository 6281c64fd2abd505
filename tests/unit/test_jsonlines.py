"""JSON lines: numbered, cut at line feeds only, refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_interp.errors import DataError
from moe_interp.jsonlines import read_json_lines


def test_lines_end_at_line_feeds_and_blank_ones_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('\ufeff{"a": "one\u2028two"}\r\n\n[1]\n'.encode())
    assert list(read_json_lines(file, "lines")) == [(1, {"a": "one\u2028two"}), (3, [1])]


def test_one_document_over_several_lines_is_told_from_a_bad_line(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('[\n {"a": 1},\n {"a": 2}\n]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: .*The file is one JSON document: write one object a line"):
        list(read_json_lines(file, "lines"))


@pytest.mark.parametrize(
    ("content", "said"), [(b"1\nno\n", "line 2: Expecting value"), (b"\xff", "decode .* in UTF-8")]
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "b.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"b\.jsonl.*{said}"):
        list(read_json_lines(file, "lines"))
    with pytest.raises(DataError, match="which is not a file"):
        list(read_json_lines(tmp_path, "lines"))
