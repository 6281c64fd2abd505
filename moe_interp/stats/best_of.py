"""The best of a few out of many, in closed form: the expectation over all subsets of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats
from scipy.special import gammaln

from moe_interp.stats.checks import FloatArray, check_at_least, check_no_missing, sample_last


@dataclass(frozen=True)
class BestOf:
    """Expectations over all subsets of a size, ``[size, ...]``; NaN where there are fewer alternatives than that.

    Attributes:
        gap: ``max exp(x) - exp(standard)``, in probability.
        regret: ``max(0, max x - standard)``, in nats.
        positive_rate: ``P(max x > standard)``.
    """

    gap: FloatArray
    regret: FloatArray
    positive_rate: FloatArray


def best_of(x: ArrayLike, standard: ArrayLike, sizes: Sequence[int]) -> BestOf:
    """How much better than a standard the best of a random subset of the alternatives is, in expectation.

    The i-th largest of n is the best of a subset of size m with probability C(n - i, m - 1) / C(n, m).

    Args:
        x: Log-probabilities of the alternatives, ``[..., alternative]``; NaN is an absent one.
        standard: Log-probability of the standard, ``[...]``, complete.
        sizes: Sizes of the subsets.

    Source: order statistics of draws without replacement (David and Nagaraja, 2003). It compares items that have
    different numbers of alternatives at an equal number.
    """
    for size in sizes:
        check_at_least(size, 1, "the size of a subset")
    values, level = sample_last(x), np.asarray(standard, dtype=np.float64)
    check_no_missing(level, "standard")
    n = (~np.isnan(values)).sum(-1)
    ordered = -np.sort(-np.where(np.isnan(values), -np.inf, values), axis=-1)
    probability = np.exp(ordered)
    over = np.maximum(ordered - level[..., None], 0)
    beats = (ordered > level[..., None]).astype(np.float64)
    found = []
    for size in sizes:
        weights = _weights(size, values.shape[-1])[n]
        gap, regret, rate = ((weights * part).sum(-1) for part in (probability, over, beats))
        is_short = n < size
        found.append([np.where(is_short, np.nan, part) for part in (gap - np.exp(level), regret, rate)])
    return BestOf(*(np.stack(parts) for parts in zip(*found)))


def in_top(x: ArrayLike, standard: ArrayLike, size: int, k: int) -> FloatArray:
    """``[...]``: probability that the standard is among the k best of itself and a random subset of the alternatives.

    Among n alternatives of which b are better, the number of better ones in a subset of size m is hypergeometric; the
    result is P(fewer than k). An alternative that is exactly equal does not count as better. Arguments as
    :func:`best_of`.
    """
    check_at_least(size, 1, "the size of a subset")
    check_at_least(k, 1, "k")
    values, level = sample_last(x), np.asarray(standard, dtype=np.float64)
    n = (~np.isnan(values)).sum(-1)
    better = (values > level[..., None]).sum(-1)
    known = np.maximum(n, size)  # where there are fewer, the result is NaN
    return np.where(n < size, np.nan, scipy_stats.hypergeom.cdf(k - 1, known, better, size))


def _weights(size: int, width: int) -> FloatArray:
    """``[n, i]``: the probability that the i-th largest of n (from 0) is the best of a random subset of ``size``."""
    n, i = np.arange(width + 1)[:, None], np.arange(width)[None]
    possible = (n >= size) & (n - 1 - i >= size - 1)
    return np.where(possible, np.exp(_log_choose(n - 1 - i, size - 1, possible) - _log_choose(n, size, possible)), 0.0)


def _log_choose(n: NDArray[np.int64], k: int, possible: NDArray[np.bool_]) -> FloatArray:
    n = np.where(possible, n, k)
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))
