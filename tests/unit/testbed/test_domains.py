"""Domains: splits without overlap, items as JSONL, and what is refused."""

from __future__ import annotations

import json
import random

import pytest

from moe_interp.errors import ConfigError, DataError
from moe_interp.testbed.domains.domain import (
    Domain,
    Example,
    Item,
    check_domains,
    generated_domain,
    read_items,
    split_of,
    write_items,
)
from moe_interp.testbed.domains.text import read_documents

ITEM = Item("d-0", "d", "question?", " answer", {"steps": 3})


def test_split_is_decided_by_the_key_alone_in_the_asked_shares():
    splits = [split_of(f"key {i}", validation=0.1, items=0.2) for i in range(20_000)]
    assert splits == [split_of(f"key {i}", validation=0.1, items=0.2) for i in range(20_000)]
    # standard deviations of these shares are at most .003
    assert splits.count("validation") / 20_000 == pytest.approx(0.1, abs=0.012)
    assert splits.count("items") / 20_000 == pytest.approx(0.2, abs=0.012)


@pytest.mark.parametrize(
    "train, validation, items, message",
    [
        ((), ("a",), (), "no train documents"),
        (("a",), (), (), "no validation documents"),
        (("a", "b"), ("b",), (), "1 texts in more than one split, such as 'b'"),
        (("question? answer",), ("b",), (ITEM,), "1 texts in more than one split"),
        (("a",), ("b",), (ITEM, ITEM), "items of the same id"),
    ],
)
def test_domain_refuses_empty_and_overlapping_splits(train, validation, items, message):
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        Domain("d", train, validation, items)


def test_domains_must_be_apart_from_one_another():
    a, b = Domain("a", ("x", "y"), ("z",)), Domain("b", ("u",), ("y",))
    with pytest.raises(DataError, match="'a' and 'b' share the document 'y'"):
        check_domains([a, b])
    with pytest.raises(DataError, match="each name once"):
        check_domains([a, a])
    with pytest.raises(DataError, match="at least one domain"):
        check_domains([])


def test_shares_are_normalised_and_checked():
    domains = [Domain("a", ("x",), ("z",)), Domain("b", ("u",), ("v",))]
    assert check_domains(domains) == (0.5, 0.5)
    assert check_domains(domains, (3, 1)) == (0.75, 0.25)
    for bad in ((1,), (1, 0), (1, float("inf"))):
        with pytest.raises(ConfigError, match="one positive share"):
            check_domains(domains, bad)


def test_items_survive_jsonl_and_damage_is_named_by_line(tmp_path):
    path = tmp_path / "items.jsonl"
    write_items([ITEM, Item("d-1", "d", "naïve", "é")], path)
    assert read_items(path) == (ITEM, Item("d-1", "d", "naïve", "é"))
    assert json.loads(path.read_text().splitlines()[0]) == {
        "id": "d-0", "domain": "d", "prompt": "question?", "answer": " answer", "steps": 3,
    }  # fmt: skip
    path.write_text(path.read_text() + '{"id": "d-2"}\n')
    with pytest.raises(DataError, match="line 3: 'domain'"):
        read_items(path)
    path.write_text("[1]")
    with pytest.raises(DataError, match=r"line 1: .* Expected: a JSON object"):
        read_items(path)


def test_a_generator_that_runs_dry_is_refused():
    def draw(rng: random.Random, split: str, number: int) -> Example:
        key = str(rng.randint(0, 30))
        return Example(key, key, key, "")

    with pytest.raises(DataError, match="distinct train examples"):
        generated_domain("few", draw, n_train=100, n_validation=1, n_items=1, seed=0, split_by="number")


@pytest.mark.parametrize("odd", ["a\0", "a\n", "\x1b[2J", "a\ud800", "", 3.5])
def test_names_that_no_file_holds_are_refused(tmp_path, odd):
    with pytest.raises(DataError, match="domain"):
        Domain(odd, ("one",), ("two",))
    with pytest.raises(DataError, match="domain 'd': item id"):
        Domain("d", ("one",), ("two",), (Item(odd, "d", "p", "q"),))
    file = tmp_path / "items.jsonl"
    for field in ("id", "domain"):
        line = {"id": "a", "domain": "d", "prompt": "p", "answer": "q"} | {field: odd}
        file.write_text(json.dumps(line), encoding="utf-8")
        with pytest.raises(DataError, match=rf"items.jsonl, line 1: {field} "):
            read_items(file)


def test_texts_of_half_characters_are_refused_by_line(tmp_path):
    file = tmp_path / "items.jsonl"
    for field, odd in (("prompt", "p\ud800"), ("answer", 3)):
        file.write_text(json.dumps({"id": "a", "domain": "d", "prompt": "p", "answer": "q"} | {field: odd}))
        with pytest.raises(DataError, match=rf"items.jsonl, line 1: {field} "):
            read_items(file)
    file.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": "\udfff"}))
    with pytest.raises(DataError, match=r"line 2: text with .*half of a surrogate pair"):
        read_documents(file)
