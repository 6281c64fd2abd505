"""Whole numbers and names: what is taken, and what is refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_interp.checks import check_name, check_seed, check_text, check_whole
from moe_interp.errors import ConfigError, DataError, RouteError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_become_pythons(value: Any) -> None:
    assert check_whole(value, "n", 3, 3) == 3
    assert type(check_whole(value, "n")) is int


@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), 3.0, np.float64(3), torch.tensor(3.0), "3", None, [3], np.array([3]), 1 + 0j],
    ids=repr,
)
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^draws=.*Expected: a whole number of at least 1\. Pass draws as an integer"
    ):
        check_whole(value, "draws", 1)


def test_numbers_out_of_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^k=0\. Expected: a whole number of at least 1 and of at most 8\. Choose"):
        check_whole(np.int64(0), "k", 1, 8)
    with pytest.raises(RouteError, match="k=9"):
        check_whole(9, "k", 1, 8, RouteError)
    assert check_seed(-(2**63)) == -(2**63)
    with pytest.raises(ConfigError, match=r"seed=9223372036854775808\. Expected: a whole number of at least -9"):
        check_seed(2**63)
    with pytest.raises(ConfigError, match="seed=a number of 33220 bits"):
        check_seed(10**10_000)


def test_names_that_can_be_shown_and_stored() -> None:
    for name in ("math", "a b", "数学", "é\u0301", "👩\u200d🔬", "x/y"):
        assert check_name(name, "domain") == name
    assert [check_name(n, "id") for n in (0, np.int64(7), np.str_("a"))] == ["0", "7", "a"]
    assert type(check_name(np.str_("a"), "id")) is str


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a\0b", r"id 'a\\x00b' with the control character '\\x00'"),
        ("\x1b[31mred", r"control character '\\x1b'"),
        ("two\nlines", r"control character '\\n'"),
        ("\x85", "control character"),
        ("\u200b\u2060", "at least one character that shows"),
        ("\u0301", "at least one character that shows"),
        ("a\x7f", "control character"),
        ("a\u2028b", "line break"),
        ("a\ud800", r"half of a surrogate pair '\\ud800'"),
        ("", "at least one character that shows"),
        ("  ", "at least one character that shows"),
        (None, "of type NoneType"),
        (True, "id 'True' of type bool"),
        (1.5, "of type float"),
        (["a"], "of type list"),
        (b"a", "of type bytes"),
    ],
)
def test_names_that_cannot(name: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_name(name, "id")


def test_texts_of_whole_characters() -> None:
    assert check_text("a\0\n👩", "text") == "a\0\n👩"
    with pytest.raises(DataError, match=r"^line 3: text with '\\udc00', half of a surrogate pair"):
        check_text("a\udc00", "line 3: text")
