"""What runs together: rows of like length, within a number of tokens."""

from __future__ import annotations

from moe_interp.experiments.inputs.batches import batches_of_like_length


def test_longest_first_and_as_many_as_fit() -> None:
    rows = ["abc", "abcde", "ab", "abcd", "a"]
    # widths 5, 4, 3, 2, 1: two rows of width 5 are ten tokens
    assert batches_of_like_length(rows, 10) == [[1, 3], [0, 2, 4]]
    assert batches_of_like_length(rows, 9) == [[1], [3, 0], [2, 4]]
    assert batches_of_like_length(rows, 1) == [[1], [3], [0], [2], [4]]  # one at least, though it does not fit
    assert batches_of_like_length([], 5) == []


def test_rows_of_one_length_come_in_the_order_of_their_names() -> None:
    rows = ["aa", "bb", "cc"]
    assert batches_of_like_length(rows, 4) == [[0, 1], [2]]
    assert batches_of_like_length(rows, 4, names=["z", "x", "y"]) == [[1, 2], [0]]
