"""What is read as sequences, and what is refused: which entry, and what to do about it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.errors import DataError
from moe_interp.experiments.sequences import read_sequences, unread_fields
from tests import tiny


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer())


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
