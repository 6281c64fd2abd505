"""Pairs of tokens and of sequences, and how alike their routes and their states are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_interp.errors import DataError
from moe_interp.experiments.geometry.states import BoolArray, IntArray, RoutedStates
from moe_interp.stats import derive_rng
from moe_interp.stats.checks import FloatArray
from moe_interp.stats.geometry.pairs import pairs_of, sampled_pairs

_AT_ONCE = 256  # pairs whose states are gathered together


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which pairs are compared.

    Attributes:
        first, second: ``[pair]``, places among the kept tokens, or sequences.
        first_unit, second_unit: ``[pair]``, their sequences.
    """

    first: IntArray
    second: IntArray
    first_unit: IntArray
    second_unit: IntArray


def token_pairs(routed: RoutedStates, most: int, seed: int) -> Pairs:
    """Pairs of kept tokens of different sequences."""
    unit = routed.sequence
    first, second = sampled_pairs(unit, most, seed, "token pairs")
    return Pairs(first, second, unit[first], unit[second])


def chosen_sequences(n: int, most: int, seed: int) -> IntArray:
    """At most so many sequences, drawn with the seed."""
    if n <= most:
        return np.arange(n)
    return np.sort(derive_rng(seed, "sequences").choice(n, most, replace=False))


def sequence_pairs(n: int, most: int, seed: int) -> Pairs:
    """All pairs of at most so many sequences."""
    chosen = chosen_sequences(n, most, seed)
    first, second = (chosen[side] for side in pairs_of(len(chosen)))
    return Pairs(first, second, first, second)


def check_sequences(n: int, least: int, what: str) -> None:
    """Refuse fewer sequences than a null or an interval over sequences needs.

    Raises:
        DataError: there are fewer.
    """
    if n < least:
        raise DataError(
            f"{n} sequence{'s' * (n != 1)}",
            f"at least {least} different sequences: {what} is over sequences",
            "Add sequences; tokens of one sequence are not independent.",
        )


def overlaps(sets: BoolArray, pairs: Pairs) -> FloatArray:
    """``|S_i n S_j| / sqrt(|S_i| |S_j|)`` of each pair, which is ``|S_i n S_j| / k`` where routes are of one width."""
    size = np.maximum(sets.sum(1), 1)
    together = (sets[pairs.first] & sets[pairs.second]).sum(1)
    return np.asarray(together / np.sqrt(size[pairs.first] * size[pairs.second]))


def cosine_matrix(rows: NDArray[np.floating]) -> FloatArray:
    """``[row, row]`` cosines; 0 with a row of length 0."""
    values = rows.astype(np.float64)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.where(length > 0, length, 1)
    return np.asarray(np.clip(unit @ unit.T, -1, 1))


def pair_cosines(states: NDArray[np.floating], pairs: Pairs) -> FloatArray:
    """The cosine of the states of each pair; 0 where one has length 0."""
    length = np.linalg.norm(states.astype(np.float64), axis=1)
    found = np.empty(len(pairs.first))
    for start in range(0, len(found), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        one, two = states[pairs.first[part]].astype(np.float64), states[pairs.second[part]].astype(np.float64)
        found[part] = np.einsum("pd,pd->p", one, two)
    scale = length[pairs.first] * length[pairs.second]
    return np.asarray(np.clip(np.where(scale > 0, found / np.where(scale > 0, scale, 1), 0.0), -1, 1))


def differences(states: FloatArray, pairs: Pairs, start: int) -> FloatArray:
    """Differences of the states of some pairs, from one on."""
    part = slice(start, start + _AT_ONCE)
    return states[pairs.first[part]] - states[pairs.second[part]]


def starts(n: int) -> range:
    return range(0, n, _AT_ONCE)


def usage_similarity(counts: NDArray[np.number]) -> FloatArray:
    """``[sequence, sequence]`` cosines of normalised expert counts ``[sequence, expert]``."""
    return cosine_matrix(counts.astype(np.float64))


def kept_counts(routed: RoutedStates, sets: BoolArray) -> FloatArray:
    """``[sequence, expert]`` slots of the kept tokens."""
    counts = np.zeros((routed.n_sequences, sets.shape[1]))
    np.add.at(counts, routed.sequence, sets)
    return counts
