"""Risk differences of two sets of units, such as prompts: intervals, tests over units, stability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray
from moe_interp.stats.intervals.small_samples import mean_interval, stratified_interval
from moe_interp.stats.random_generators import derive_rng
from moe_interp.stats.significance.multiple import adjust_p, rejected
from moe_interp.stats.significance.permutation import paired_permutation, two_group_permutation

N_PERMUTATIONS = 9999
N_RESAMPLES = 200
_TIE = 1e-12


@dataclass(frozen=True)
class RiskDifferences:
    """Two sets of units compared in every cell ``[layer, expert]``.

    Attributes:
        share_a, share_b: Mean shares; ``difference`` is a - b, with the bounds ``low`` and ``high``.
        p, q: Of a permutation of units between the sets (for pairs, of signs); adjusted over all cells.
        stability: See :func:`stability_of`.
        found: 1 where a is larger, -1 where b is, with q at most alpha; else 0.
        n_a, n_b, smallest_p: Units, and the smallest p that so many can give.
    """

    share_a: FloatArray
    share_b: FloatArray
    difference: FloatArray
    low: FloatArray
    high: FloatArray
    p: FloatArray
    q: FloatArray
    stability: FloatArray
    found: NDArray[np.int64]
    n_a: int
    n_b: int
    smallest_p: float


def risk_differences(
    a: ArrayLike, b: ArrayLike, *, paired: bool = False, alpha: float = 0.05, method: str = "bh", seed: int = 0
) -> RiskDifferences:
    """Mean share of one set of units less that of another, cell by cell; units are what varies.

    Args:
        a, b: ``[unit, layer, expert]`` shares from 0 to 1, complete.
        paired: The i-th units of both belong together.
        alpha: Level of the false discovery rate.
        method: Of :func:`moe_interp.stats.adjust_p`.
        seed: Of permutations and resamples.

    Raises:
        DataError: fewer than two units in a set, or pairs of different number.

    Source: SteerMoE for the risk difference; tests and stability are derived. The permutation holds where units of both
    sets have one law under the null; BH where cells are independent or positively dependent.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if min(len(first), len(second)) < 2 or (paired and len(first) != len(second)):
        raise DataError(
            f"{len(first)} and {len(second)} units{' that are paired' if paired else ''}",
            "at least two in each set, and as many in both where they are paired",
            "Add sequences: no number of tokens of one says what another would do.",
        )
    p = np.stack([_p_values(first[:, i], second[:, i], paired, seed) for i in range(first.shape[1])])
    q = adjust_p(p, method=method)
    difference = first.mean(0) - second.mean(0)
    if paired:
        interval = mean_interval(first - second, axis=0, bounds=(-1.0, 1.0))
    else:
        # the mean of two groups' means, one of them with the opposite sign
        interval = stratified_interval([2 * first, -2 * second], bounds=(-1.0, 1.0))
    is_found = rejected(q, alpha)
    return RiskDifferences(
        share_a=first.mean(0),
        share_b=second.mean(0),
        difference=difference,
        low=np.asarray(interval.low),
        high=np.asarray(interval.high),
        p=p,
        q=q,
        stability=stability_of(first, second, int(is_found.sum()), paired, seed),
        found=(np.sign(difference) * is_found).astype(np.int64),
        n_a=len(first),
        n_b=len(second),
        smallest_p=smallest_p(len(first), len(second), paired),
    )


def _p_values(a: FloatArray, b: FloatArray, paired: bool, seed: int) -> FloatArray:
    """``[expert]``, of one layer; the same permutations at every layer."""
    if paired:
        return paired_permutation(a - b, axis=0, n_permutations=N_PERMUTATIONS, seed=seed).p_value
    values, is_a = np.concatenate([a, b]), np.arange(len(a) + len(b)) < len(a)
    return two_group_permutation(values, is_a, axis=0, n_permutations=N_PERMUTATIONS, seed=seed).p_value


def smallest_p(n_a: int, n_b: int, paired: bool) -> float:
    """The smallest p that so many prompts can give."""
    if paired:
        return 2 / 2**n_a if n_a <= 14 else 1 / (1 + N_PERMUTATIONS)
    ways = math.comb(n_a + n_b, n_a)
    return (1 + (n_a == n_b)) / ways if ways <= 20_000 else 1 / (1 + N_PERMUTATIONS)


def stability_of(a: FloatArray, b: FloatArray, n_found: int, paired: bool, seed: int) -> FloatArray:
    """``[layer, expert]``: in what share of resamples an expert is among as many largest differences as were found.

    A resample is half of each set's prompts (of the pairs), drawn without replacement; the difference has the sign that
    it has on all prompts. NaN where nothing was found.

    Source: Meinshausen & Buehlmann (2010), stability selection; the ranking by abs(difference) is derived.
    """
    if not n_found:
        return np.full(a.shape[1:], np.nan)
    rng = derive_rng(seed, "stability of a contrast")
    sign, hits = np.sign(a.mean(0) - b.mean(0)), np.zeros(a.shape[1:])
    for _ in range(N_RESAMPLES):
        rows_a = _half(rng, len(a))
        rows_b = rows_a if paired else _half(rng, len(b))
        size = sign * (a[rows_a].mean(0) - b[rows_b].mean(0))
        least = np.partition(size.ravel(), -n_found)[-n_found]
        hits += (size >= least - _TIE) & (size > 0)
    return hits / N_RESAMPLES


def _half(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    return rng.choice(n, size=max(1, n // 2), replace=False)
