"""The same content under several ids counts once, is named, and changes no number."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import moe_interp as mi
from moe_interp.experiments.inputs.repeats import RepeatedContentWarning, distinct_sequences, merge_repeats
from moe_interp.experiments.inputs.sequences import read_sequences
from tests.integration.experiments.test_isolation import QUIET, attached, items_of


def test_items_given_twice_leave_every_number_as_it_was(tmp_path: Path) -> None:
    moe, items = attached("olmoe"), items_of(n=8)
    once = mi.isolate_experts(moe, items, **QUIET)
    copies = [{**items[0], "id": "copy"}, {**items[3], "id": "third"}, {**items[0], "id": "more"}]
    with pytest.warns(
        RepeatedContentWarning, match="3 items have the content of another .*'copy' .as 'item-0'"
    ) as caught:
        twice = mi.isolate_experts(moe, [*items, *copies], **QUIET)
    assert caught[0].filename == __file__
    assert twice.data.attrs.pop("merged") == {"item-0": ["copy", "more"], "item-3": ["third"]}
    xr.testing.assert_identical(once.data, twice.data)
    path = tmp_path / "twice.nc"
    with pytest.warns(RepeatedContentWarning):
        twice = mi.isolate_experts(moe, [*items, *copies], **QUIET)
    twice.save(path)
    assert mi.load_result(path).data.attrs["merged"] == twice.data.attrs["merged"]
    assert "; of the same content as one of them, and not counted: 3 more." in twice.summary()


def test_an_item_of_two_domains_is_one_of_each_and_is_named() -> None:
    moe, items = attached("olmoe"), items_of(n=8)
    in_two = [{**item, "id": f"again-{item['id']}", "domain": "another"} for item in items[:7]]
    once = mi.isolate_experts(moe, items, **QUIET)
    with pytest.warns(RepeatedContentWarning) as caught:
        both = mi.isolate_experts(moe, [*items, *in_two, {**in_two[0], "id": "copy"}], **QUIET)
    copied, shared = (str(warning.message) for warning in caught)
    assert copied.startswith("1 items have the content of another")
    assert shared.startswith("7 items stand in several domains ('item-0' = 'again-item-0', ")
    assert both.data.attrs["merged"] == {"again-item-0": ["copy"]}
    assert both.data.sizes["item"] == 15
    own = both.data["delta"].sel(item=once.data["item"].values)
    np.testing.assert_array_equal(own.values[..., :7, :, :], both.data["delta"].values[..., 8:, :, :])
    np.testing.assert_allclose(own, once.data["delta"], atol=2e-6)


def test_another_answer_or_another_cut_is_another_item() -> None:
    moe = attached("olmoe")
    items = [
        {"id": "a", "domain": "d", "prompt": [5, 6], "answer": [7]},
        {"id": "b", "domain": "d", "prompt": [5, 6], "answer": [8]},
        {"id": "c", "domain": "d", "prompt": [5], "answer": [6, 7]},  # the same ids, but another answer
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mi.isolate_experts(moe, items, **QUIET)
    assert result.data["item"].values.tolist() == ["a", "b", "c"]


def test_the_domain_router_takes_the_items_of_the_run_with_their_copies() -> None:
    moe, items = attached("olmoe"), items_of(n=8)
    copies = [{**items[0], "id": "copy"}, {**items[1], "id": "other"}]
    with pytest.warns(RepeatedContentWarning):
        result = mi.isolate_experts(moe, [*items, *copies], **QUIET)
    plain = mi.score_domain_router(moe, items, result, k=1, random_draws=1, **QUIET)
    with pytest.warns(RepeatedContentWarning) as caught:
        both = mi.score_domain_router(moe, [*items, *copies], result, k=1, random_draws=1, **QUIET)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(both.data["score"], plain.data["score"])
    # by the copy's name alone it is the item of the run, in its half
    named = mi.score_domain_router(moe, [copies[0], *items[1:]], result, k=1, random_draws=1, **QUIET)
    np.testing.assert_allclose(named.data["score"], plain.data["score"], atol=1e-5)


def test_sequences_of_the_same_tokens_are_one_and_their_masks_are_united() -> None:
    moe = attached("olmoe")
    read = read_sequences(
        moe.bridge,
        [
            {"id": "a", "tokens": [5, 6, 7, 8], "score_from": 3},
            {"id": "b", "tokens": [5, 6, 7]},
            {"id": "c", "tokens": [5, 6, 7, 8], "mask": [0, 1, 0, 0]},
        ],
    )
    with pytest.warns(RepeatedContentWarning, match="'c' .as 'a'"):
        found, merged = distinct_sequences(read)
    assert merged == {"a": ["c"]}
    assert [sequence.id for sequence in found] == ["a", "b"]
    assert found[0].is_scored.tolist() == [True, False, True, False]
    assert found[1] is read[1]


def test_many_are_named_up_to_five() -> None:
    with pytest.warns(RepeatedContentWarning, match=r"7 things .* and 2 more") as caught:
        kept, merged = merge_repeats("xxxxxxxxy", [f"n{i}" for i in range(9)], "things")
    assert caught[0].filename == __file__
    assert kept == [0, 8]
    assert merged == {"n0": [f"n{i}" for i in range(1, 8)]}


def test_no_copy_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge_repeats([1, 2, 3], list("abc"), "things") == ([0, 1, 2], {})
