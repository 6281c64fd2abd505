"""What is read as sequences, and what is refused: which entry, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import moe_interp as mi
from moe_interp.errors import DataError
from moe_interp.experiments.inputs.items import check_items
from moe_interp.experiments.inputs.repeats import RepeatedContentWarning, distinct_sequences
from moe_interp.experiments.inputs.sequence_texts import unread_fields
from moe_interp.experiments.inputs.sequences import read_sequences
from moe_interp.tokenization import RepeatedBOSWarning
from tests import tiny

TEMPLATE = (
    "<bos> {% for m in messages %}w50 {{ m['content'] }} {% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w52{% endif %}"
)
ASKED = [{"role": "user", "content": "w3 w4"}]
WHOLE = [*ASKED, {"role": "assistant", "content": "w5"}]


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer(chat_template=TEMPLATE))


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "seq.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return path


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1], [1, 2], 3], r"mask=\[\[1\], \[1, 2\], 3\]"),
        ({"a": 1}, r"mask=\{'a': 1\}"),
        ("011", "mask=011"),
        (["a", "b", "c"], r"mask=\['a', 'b', 'c'\]"),
        ([1, 0], r"a mask of shape \(2,\)"),
        ([0, 2, 0], r"values \[0, 2\]"),
        ([0, float("nan"), 1], "values"),
    ],
)
def test_masks_that_are_none_name_their_sequence(bridge: TransformerBridge, mask: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"sequence 'odd': .*{message}"):
        read_sequences(bridge, [[3, 4], {"id": "odd", "tokens": [3, 4, 5], "mask": mask}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("w3 w4", r"one text\..*Wrap it in a list"),
        ({"text": "w3 w4"}, r"one dict\..*Wrap it in a list\. Of sequences by name, give each its id"),
        ([3, 4, 5], r"ids \[3, 4, 5, \.\.\.\], one sequence.*Wrap it in a list"),
        (torch.tensor([3, 4, 5, 6, 7]), r"ids \[3, 4, 5, 6, \.\.\.\], one sequence.*Wrap it in a list"),
        (np.array([3, 4]), r"ids \[3, 4, \.\.\.\], one sequence"),
        (torch.tensor(3), "no sequence"),
        ([], "no sequence"),
        (iter([]), "no sequence"),
        (None, "a NoneType"),
        ({3, 4}, r"a set\..*Pass a list"),
    ],
)
def test_what_is_no_list_of_sequences(bridge: TransformerBridge, given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_sequences(bridge, given)


def test_generators_mappings_and_sequences_that_are_read_already(bridge: TransformerBridge) -> None:
    entries = [MappingProxyType({"id": "a", "tokens": [3, 4, 5], "score_from": 2}), "w3 w4"]
    read = read_sequences(bridge, (entry for entry in entries))
    assert [(one.id, one.tokens) for one in read] == [("a", (3, 4, 5)), ("1", (1, 3, 4))]
    assert read[0].is_scored.tolist() == [False, True, False]
    assert read_sequences(bridge, read) == read


def test_all_that_is_longer_than_the_context_is_named(bridge: TransformerBridge) -> None:
    long = [{"id": f"s{n}", "tokens": [3] * (62 + n)} for n in range(10)]
    five = "; ".join(f"sequence 's{n}': {62 + n} tokens" for n in range(3, 8))
    with pytest.raises(DataError, match=rf"^{five}; and 2 more\. Expected: at most the model's context of 64"):
        read_sequences(bridge, long)
    with pytest.raises(DataError, match=r"^sequence 's3': 65 tokens\. Expected"):
        read_sequences(bridge, long[:4])


def test_fields_that_are_not_read_are_counted() -> None:
    given = [
        {"text": "a", "trajectory": "b"},
        {"text": "c", "trajectory": "d", "scorefrom": 3, "mask": None},
        "text",
        [3],
    ]
    assert unread_fields(given) == {"trajectory": 2, "scorefrom": 1}
    assert unread_fields([{"id": "a", "tokens": [3], "score_from": 2}]) == {}


def test_conversations_are_read_whole_or_as_the_prompt_of_an_answer(bridge: TransformerBridge) -> None:
    read = read_sequences(
        bridge,
        [
            {"id": "whole", "messages": WHOLE},
            {"id": "asked", "messages": ASKED, "answer": "w5"},
            {"id": "prompt", "prompt": ASKED, "answer": [5]},
            *check_items([{"id": "item", "domain": "d", "messages": WHOLE}]),
            {"id": "last", "messages": WHOLE, "score_from": 5},
        ],
    )
    opened = (1, 50, 3, 4, 52, 5)
    assert [one.tokens for one in read] == [(1, 50, 3, 4, 50, 5, 2), opened, opened, opened, read[0].tokens]
    scored = [np.flatnonzero(one.is_scored).tolist() for one in read]
    assert scored == [[0, 1, 2, 3, 4, 5], [4], [4], [4], [4, 5]]
    with pytest.warns(RepeatedContentWarning, match=r"'prompt' \(as 'asked'\), 'item' \(as 'asked'\)"):
        kept, merged = distinct_sequences(read)
    assert (len(kept), merged) == (2, {"whole": ["last"], "asked": ["prompt", "item"]})


def test_a_named_field_is_scored_and_lines_are_kept_by_their_other_fields(tmp_path: Path, bridge: Any) -> None:
    lines: list[Any] = [
        {"id": 1, "prompt": "w3 w4", "trajectory": "w5 w6 w7", "answer": "w7", "correct": True},
        {"prompt": "w3", "trajectory": "w5 w6", "answer": "w6", "correct": False},
    ]
    path = written(tmp_path, *lines)
    loaded = mi.load_sequences(path, answer_field="trajectory")
    assert [(one.id, one.fields) for one in loaded] == [
        ("1", {"answer": "w7", "correct": True}),
        ("seq-2", {"answer": "w6", "correct": False}),
    ]
    assert unread_fields(loaded) == {"answer": 2, "correct": 2}
    (one,) = read_sequences(bridge, [entry for entry in loaded if entry.fields["correct"]])
    assert (one.tokens, np.flatnonzero(one.is_scored).tolist()) == ((1, 3, 4, 5, 6, 7), [2, 3, 4])
    assert [one.tokens for one in read_sequences(bridge, mi.load_sequences(path))] == [(1, 3, 4, 7), (1, 3, 6)]
    assert [one.start for one in mi.load_sequences(path, prompt_field="trajectory")] == ["w5 w6 w7", "w5 w6"]
    body = mi.load_sequences(written(tmp_path, {"n": "x", "body": "w3 w4"}), text_field="body", id_field="n")
    assert [(one.id, one.start, one.place) for one in body] == [("x", "w3 w4", "sequence 'x' (seq.jsonl, line 1)")]


BAD_LINES = [
    ({"id": "b", "prompt": "w3"}, {}, r"seq.jsonl, line 2 \(sequence 'b'\): no answer among its fields id, prompt\. "),
    (
        {"id": "b", "prompt": "w3", "answer": "w4"},
        {"answer_field": "steps"},
        "'b'.: no steps among its fields id, prompt, answer",
    ),
    ({"id": "b", "text": "w3", "answer": "w4"}, {}, "line 2 .sequence 'b'. with the fields"),
    ({"id": "b", "messages": ASKED, "prompt": "w3", "answer": "w4"}, {}, "'b'.: messages beside prompt"),
    ({"id": "b", "messages": WHOLE, "answer": "w4"}, {}, "answer beside messages that end with the assistant's"),
    ({"id": "b", "messages": []}, {}, "'b'.: messages none"),
    ({"id": "b\0", "text": "w3 w4"}, {}, r"line 2: id 'b\\x00' with the control character"),
    ({"id": "b\ud800", "text": "w3 w4"}, {}, "line 2: id .* half of a surrogate pair"),
    ({"id": 1.5, "text": "w3 w4"}, {}, "line 2: id '1.5' of type float"),
    ({"id": "b", "text": {"a": 1}}, {}, r"sequence 'b' \(seq.jsonl, line 2\): text {'a': 1} of type dict"),
    ({"id": "b", "prompt": "w3", "answer": 18}, {}, r"'b' \(seq.jsonl, line 2\): answer 18 of type int"),
    ({"id": "b", "prompt": "w3", "steps": 18}, {"answer_field": "steps"}, r"line 2\): steps 18 of type int"),
    ({"id": "b", "text": "w3 \ud800"}, {}, r"'b' \(seq.jsonl, line 2\): text with '\\ud800'"),
    ({"id": "b", "text": "w3 w4", "score_from": True}, {}, r"line 2\): score_from=True\. Expected: a whole number"),
    ({"id": "b", "text": "w3 w4", "mask": [1]}, {}, r"'b' \(seq.jsonl, line 2\): a mask of shape"),
    ({"id": "b", "tokens": [3, 999]}, {}, r"'b' \(seq.jsonl, line 2\): token id 999 in tokens"),
    ({"id": "b", "text": "w3 " * 70}, {}, r"sequence 'b' \(seq.jsonl, line 2\): 71 tokens"),
    ({"id": "b", "text": "w3"}, {"id_field": "name"}, None),
    (
        {"id": "a", "text": "w3 w4"},
        {},
        r"'a' more than once: sequence 'a' \(seq.jsonl, line 1\), sequence 'a' .*line 2\)",
    ),
    (18, {}, r"sequence 'seq-2' \(seq.jsonl, line 2\): tokens 18 of type int"),
]


@pytest.mark.parametrize(("line", "names", "said"), BAD_LINES)
def test_a_bad_line_is_refused_with_file_line_id_and_field(
    tmp_path: Path, bridge: TransformerBridge, line: Any, names: dict[str, str], said: str | None
) -> None:
    good = {"id": "a", "prompt": "w3", names.get("answer_field", "answer"): "w4"}
    path = written(tmp_path, good, line)
    if said is None:
        assert len(read_sequences(bridge, mi.load_sequences(path, **names))) == 2
        return
    with pytest.raises(DataError, match=said):
        read_sequences(bridge, mi.load_sequences(path, **names))


def test_texts_that_begin_with_bos_are_named_once(bridge: TransformerBridge) -> None:
    with pytest.warns(RepeatedBOSWarning, match=r"^2 sequences \(sequence 'a', sequence '1'\) begin with BOS") as said:
        read = read_sequences(
            bridge, [{"id": "a", "text": "<bos> w3 w4"}, "<bos> w5", "w5", {"id": "m", "messages": ASKED}]
        )
    assert len(said) == 1
    assert [one.tokens for one in read] == [(1, 3, 4), (1, 5), (1, 5), (1, 50, 3, 4)]
    with pytest.warns(RepeatedBOSWarning, match=r"sequence 'b'\) begins with two BOS"):
        assert read_sequences(bridge, [{"id": "b", "tokens": [1, 1, 3]}])[0].tokens == (1, 1, 3)
