"""The best of the first few alternatives, in the order in which they were drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.stats.checks import FloatArray, check_at_least, check_no_missing, sample_last


@dataclass(frozen=True)
class BestOf:
    """At each size m, ``[size, ...]``; NaN where there are fewer alternatives than that.

    Attributes:
        gap: ``max exp(x) - exp(standard)``, in probability.
        regret: ``max(0, max x - standard)``, in nats.
        positive: 1 where ``max x > standard + margin``, else 0.
    """

    gap: FloatArray
    regret: FloatArray
    positive: FloatArray


def best_of(x: ArrayLike, standard: ArrayLike, sizes: Sequence[int], margin: ArrayLike = 0.0) -> BestOf:
    """How much better than a standard the best of the first m alternatives is.

    Args:
        x: Log-probabilities of the alternatives in drawn order, ``[..., alternative]``; NaN is an absent one, which
            does not count among the m.
        standard: Log-probability of the standard, ``[...]``, complete.
        sizes: Numbers m of alternatives.
        margin: What an alternative must be better by to count as better, in nats, ``[...]`` or a number.

    Source: derived. Items with different numbers of alternatives are compared at an equal one, and at m it is what m
    draws would have given.
    """
    for size in sizes:
        check_at_least(size, 1, "the number of alternatives")
    values, level = sample_last(x), np.asarray(standard, dtype=np.float64)
    check_no_missing(level, "standard")
    n, bound = (~np.isnan(values)).sum(-1), level + np.asarray(margin, dtype=np.float64)
    found = []
    for size in sizes:
        top = np.where(_is_among(values, size), values, -np.inf).max(-1, initial=-np.inf)
        parts = (np.exp(top) - np.exp(level), np.maximum(top - level, 0), (top > bound).astype(np.float64))
        found.append([np.where(n < size, np.nan, part) for part in parts])
    return BestOf(*(np.stack(parts) for parts in zip(*found)))


def in_top(x: ArrayLike, standard: ArrayLike, size: int, k: int, margin: ArrayLike = 0.0) -> FloatArray:
    """``[...]``: 1 where the standard is among the k best of itself and the first ``size`` alternatives, else 0.

    An alternative counts as better where it is so by more than ``margin``. Arguments as :func:`best_of`; NaN where
    there are fewer alternatives.
    """
    check_at_least(size, 1, "the number of alternatives")
    check_at_least(k, 1, "k")
    values, level = sample_last(x), np.asarray(standard, dtype=np.float64)
    bound = np.asarray(level + np.asarray(margin, dtype=np.float64))
    is_better = _is_among(values, size) & (values > bound[..., None])
    return np.where((~np.isnan(values)).sum(-1) < size, np.nan, (is_better.sum(-1) < k).astype(np.float64))


def _is_among(values: FloatArray, size: int) -> NDArray[np.bool_]:
    """Which alternatives are the first ``size`` that are there."""
    is_there = ~np.isnan(values)
    return is_there & (is_there.cumsum(-1) <= size)
