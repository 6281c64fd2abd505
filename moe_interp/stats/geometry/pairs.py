"""Statistics of pairs: of which pairs they are, and intervals over the units (sequences) that pairs are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, sample_last
from moe_interp.stats.intervals.means import Interval
from moe_interp.stats.intervals.small_samples import jackknife_interval
from moe_interp.stats.random_generators import derive_rng

Statistic = Callable[..., FloatArray]
IntArray = NDArray[np.int64]


def pair_interval(
    values: Sequence[ArrayLike],
    first: ArrayLike,
    second: ArrayLike,
    statistic: Statistic,
    *,
    n_units: int,
    level: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Interval of a function of sums over pairs, where the units that pairs are made of are independent, not the pairs.

    Each unit is left out in turn with all of its pairs; from there on as :func:`moe_interp.stats.cluster_interval`.

    Args:
        values: Arrays ``[..., pair]`` that are summed over the pairs, such as x, y and their products.
        first, second: ``[pair]``, the two units of each pair; a pair within one unit counts as its.
        statistic: Called with the sums ``[m, ...]`` of each array, the number of pairs last; returns ``[m, ...]``.
        n_units: How many units there are.
        bounds: Smallest and largest value of the statistic.

    Raises:
        DataError: values that are missing or infinite, or of another number of pairs.

    Source: Arvesen (1969), the jackknife of U-statistics; its coverage is in docs/geometry.md. For a statistic whose
    pairs hold no information of single units (independent x and y), it is wider than it needs to be.
    """
    arrays = [sample_last(value) for value in values]
    one, two = np.asarray(first), np.asarray(second)
    if any(array.shape[-1] != len(one) or np.isnan(array).any() for array in arrays) or len(two) != len(one):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise DataError(f"values of shape {shapes} for {len(one)} pairs", "one number a pair, none missing", "Align.")
    check_at_least(len(one), 1, "the number of pairs")
    arrays.append(np.ones(len(one)))
    cross = one != two
    at = np.arange(len(one))
    entries = np.concatenate([one, two[cross]]), np.concatenate([at, at[cross]])
    incidence = sparse.csr_matrix((np.ones(len(entries[0])), entries), shape=(n_units, len(one)))
    totals = [array.sum(-1) for array in arrays]
    of_unit = [
        np.asarray(incidence @ array.reshape(-1, len(one)).T).reshape((n_units, *array.shape[:-1])) for array in arrays
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = np.asarray(statistic(*[total[None] for total in totals]), dtype=np.float64)[0]
        without = np.asarray(statistic(*[total - part for total, part in zip(totals, of_unit)]), dtype=np.float64)
    has_part = of_unit[-1] > 0
    return jackknife_interval(estimate, np.moveaxis(without[has_part], 0, -1), level=level, bounds=bounds)


def correlation_of_sums(
    x: FloatArray, y: FloatArray, xx: FloatArray, yy: FloatArray, xy: FloatArray, n: FloatArray
) -> FloatArray:
    """Pearson's correlation from sums; NaN where a side is constant."""
    n = _aligned(n, x)
    spread = _spread(x, xx, n) * _spread(y, yy, n)
    return np.where(spread > 0, (xy / n - x * y / n**2) / np.sqrt(np.where(spread > 0, spread, 1)), np.nan)


def share_of_sums(x: FloatArray, y: FloatArray, xx: FloatArray, xy: FloatArray, n: FloatArray) -> FloatArray:
    """``cov(x, y) / var(x)`` from sums; NaN where x is constant."""
    n = _aligned(n, x)
    spread = _spread(x, xx, n)
    return np.where(spread > 0, (xy / n - x * y / n**2) / np.where(spread > 0, spread, 1), np.nan)


def _aligned(n: FloatArray, x: FloatArray) -> FloatArray:
    return n.reshape(n.shape + (1,) * (x.ndim - n.ndim))


def _spread(x: FloatArray, xx: FloatArray, n: FloatArray) -> FloatArray:
    """The variance; 0 where it is rounding."""
    variance = xx / n - (x / n) ** 2
    return np.where(variance > 1e-13 * np.maximum(xx / n, 1e-300), variance, 0.0)


def pairs_of(n: int) -> tuple[IntArray, IntArray]:
    """All pairs of ``n`` things, the smaller number first."""
    first, second = np.triu_indices(n, 1)
    return first.astype(np.int64), second.astype(np.int64)


def sampled_pairs(unit: ArrayLike, most: int, seed: int = 0, label: str = "pairs") -> tuple[IntArray, IntArray]:
    """Pairs of things of different units; all where there are at most ``most``, else so many drawn, none twice.

    Args:
        unit: ``[thing]``.

    Raises:
        DataError: no two things of different units.
    """
    check_at_least(most, 1, "max_pairs")
    units = np.asarray(unit)
    n = len(units)
    if n * (n - 1) // 2 <= 4 * most:
        first, second = pairs_of(n)
        keep = np.flatnonzero(units[first] != units[second])
        if len(keep) > most:
            keep = np.sort(derive_rng(seed, label).choice(keep, most, replace=False))
    else:
        rng = derive_rng(seed, label)
        drawn = rng.integers(n, size=(8 * most, 2))
        drawn = drawn[units[drawn[:, 0]] != units[drawn[:, 1]]]
        drawn = np.unique(np.sort(drawn, axis=1), axis=0)
        drawn = drawn[np.sort(rng.permutation(len(drawn))[:most])]
        first, second = drawn.T
        keep = np.arange(len(drawn))
    if not len(keep):
        raise DataError(f"{n} tokens of one sequence", "tokens of at least two sequences", "Add sequences.")
    return first[keep], second[keep]
