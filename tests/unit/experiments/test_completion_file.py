"""Completions on disk: torn lines, damaged lines, other plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_interp.errors import ResultError
from moe_interp.experiments.pass_at_k.completions import Completion, CompletionFile, read_completions
from moe_interp.results.cells import DamagedCellWarning

PLAN = {"seed": 0, "temperature": 0.6}


def completion(problem: str = "a", sample: int = 0, text: str = "é\n\u2028 1") -> Completion:
    return Completion(problem, sample, 2**62 + sample, text, (5, 6, 2), "eos", True)


def written(path: Path, n: int = 3) -> bytes:
    file = CompletionFile(path, PLAN)
    for sample in range(n):
        file.add(completion(sample=sample))
    file.close()
    return path.read_bytes()


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    content = written(tmp_path / "c.jsonl")
    again = CompletionFile(tmp_path / "c.jsonl", PLAN)
    assert list(again.found.values()) == [completion(sample=s) for s in range(3)] == read_completions(again.path)  # type: ignore[arg-type]
    again.add(completion("b"))
    again.close()
    assert (tmp_path / "c.jsonl").read_bytes() == content + completion("b").line()


def test_nothing_is_written_before_the_first_completion(tmp_path: Path) -> None:
    CompletionFile(tmp_path / "c.jsonl", PLAN).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_mended_silently(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c.jsonl"
    content = written(path)
    path.write_bytes(content[:-cut])
    file = CompletionFile(path, PLAN)
    assert len(file.found) == (3 if cut == 1 else 2)  # only the line's end was missing
    file.add(completion(sample=2))
    file.close()
    assert CompletionFile(path, PLAN).found.keys() == {("a", 0), ("a", 1), ("a", 2)}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_torn_header_is_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    content = written(path)
    for torn in (b"", content[:20], content[: content.index(b"\n") - 1]):
        path.write_bytes(torn)
        file = CompletionFile(path, PLAN)
        assert not file.found
        file.add(completion())
        file.close()
        assert len(CompletionFile(path, PLAN).found) == 1


@pytest.mark.parametrize("damage", [b'"correct": 1', b'"sample": "0"', b'"finish": "none"', b'"text": '])
def test_a_damaged_line_is_left_out_with_a_warning(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "c.jsonl"
    lines = written(path).split(b"\n")
    key = damage.split(b":")[0]
    start = lines[2].index(key)
    lines[2] = lines[2][:start] + damage + lines[2][lines[2].index(b", ", start) :]
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(DamagedCellWarning, match="line 3 cannot be read"):
        assert CompletionFile(path, PLAN).found.keys() == {("a", 0), ("a", 2)}
    assert CompletionFile(path, PLAN).found.keys() == {("a", 0), ("a", 2)}  # and mended


def test_another_plan_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    content = written(path)
    with pytest.raises(ResultError, match=r"completions of another run \(temperature=0.6 there, 1.0 here\)"):
        CompletionFile(path, {**PLAN, "temperature": 1.0})
    assert path.read_bytes() == content
    for other in (b"hello", b"{}\n", b'{"id": 1}\n{"id": 2}\n', b"[1]\n"):
        path.write_bytes(other)
        with pytest.raises(ResultError, match="does not begin as a file of completions"):
            CompletionFile(path, PLAN)
        with pytest.raises(ResultError, match="holds no completions"):
            read_completions(path)
        assert path.read_bytes() == other
    with pytest.raises(ResultError, match="a folder"):
        CompletionFile(tmp_path, PLAN)


def test_without_resume_it_is_replaced_with_the_first_completion(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    content = written(path)
    file = CompletionFile(path, {"seed": 1}, resume=False)
    assert not file.found
    assert path.read_bytes() == content
    file.add(completion())
    file.close()
    assert len(read_completions(path)) == 1


def test_the_last_of_two_lines_counts(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    written(path, 1)
    file = CompletionFile(path, PLAN)
    file.add(Completion("a", 0, 2**62, "x", (5,), "length", None, "ValueError: no"))
    file.close()
    assert CompletionFile(path, PLAN).found["a", 0].error == "ValueError: no"
    assert len(read_completions(path)) == 1
