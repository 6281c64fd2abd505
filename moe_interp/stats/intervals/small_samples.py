"""Intervals for means and ratios over few or unequal units, from leave-one-out values: a t that allows for skew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_no_missing, check_probability, sample_last
from moe_interp.stats.intervals.coverage import attained_coverage
from moe_interp.stats.intervals.means import Interval

Statistic = Callable[..., FloatArray]
# The level is raised to 1 - (1 - level) exp(-WIDER_BY_SKEW |a| - WIDER_BY_FEW / (df + 1)), a = skewness / sqrt(n):
# the smallest round numbers with which .95 covers .94 at every n of docs/stats-coverage.md for normal and exponential
# units of equal and of unequal size
WIDER_BY_SKEW, WIDER_BY_FEW = 1.5, 2.0
_FLAT = 1e-8  # below, a skewness changes nothing


def mean_interval(
    x: ArrayLike, *, axis: int = -1, level: float = 0.95, bounds: tuple[float, float] | None = None
) -> Interval:
    """Interval of a mean over independent units: :func:`cluster_interval` with one item a unit.

    Args:
        x: ``[..., item]``, complete, at least 1 (any unit); with a single item the bounds are NaN.
        bounds: Smallest and largest value that the mean can have, such as (0, 1); the interval is cut there.

    Source: as :func:`cluster_interval`.
    """
    values = sample_last(x, axis)
    check_no_missing(values, "x")
    check_at_least(values.shape[-1], 1, "the number of items")
    estimate = values.mean(-1)
    apart = values - estimate[..., None]
    return _interval(estimate, apart, np.ones_like(values), level, bounds)


def ratio_interval(
    totals: ArrayLike,
    sizes: ArrayLike,
    *,
    axis: int = 0,
    level: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Interval of sum(totals) / sum(sizes) over clusters, such as a mean over tokens of few sequences.

    Args:
        totals: ``[cluster, ...]``: the sum of the values in each cluster.
        sizes: ``[cluster, ...]``: their number (or weight); a cluster of size 0 is not counted.

    Source: as :func:`cluster_interval`.
    """
    arrays = [np.moveaxis(sample_last(part, axis), -1, 0) for part in (totals, sizes)]
    return cluster_interval(arrays, lambda total, size: total / size, level=level, bounds=bounds)


def cluster_interval(
    sums: Sequence[ArrayLike],
    statistic: Statistic,
    *,
    sizes: ArrayLike | None = None,
    level: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Interval of a smooth function of totals over independent clusters, which may be few and of unequal size.

    With theta(-i) the statistic without cluster i, d_i = (n - 1) (mean theta(-) - theta(-i)), se^2 = sum d_i^2 /
    (n (n - 1)) (the jackknife's), g the skewness of d, a = g / sqrt(n) and t a quantile of Student's law, the interval
    runs from theta - max(t, h(t)) se to theta + max(t, -h(-t)) se, where h(z) = (3 / a) ((1 + a (z - a / 6))^(1/3) - 1)
    corrects for skew. Degrees of freedom are the smallest of n - 1, sum(sizes)^2 / sum(sizes^2) - 1 and 3 n /
    (kurtosis of d) - 1, but at least 1. For .95 the level of t is between .95 and .982: higher with few units and
    with skew, such that the interval covers what it says (see ``WIDER_BY_SKEW``).

    Args:
        sums: Arrays ``[cluster, ...]``: sums over each cluster's items, such as of a value and of its count.
        statistic: Called with totals ``[m, ...]`` of each array; returns ``[m, ...]``, NaN where it is not defined.
        sizes: ``[cluster, ...]``, broadcast over the statistic's axes: how much each cluster weighs, 0 where it has no
            part in a statistic. By default the last of ``sums``, where it is not negative and has the statistic's
            shape; else every cluster is taken to have a part, and unequal sizes are seen in d alone.
        bounds: Smallest and largest value that the statistic can have; the interval is cut there.

    Returns:
        The estimate, of the totals themselves, and its interval; NaN bounds where fewer than two clusters have a part,
        or where the statistic is not defined without one of them. ``attained`` is the tabulated coverage and ``n`` the
        number of clusters with a part.

    Raises:
        DataError: Missing or infinite values, or sizes that do not match.

    Source: Quenouille (1956) and Tukey (1958) for d and se; Hall (1992) for h; Satterthwaite (1946) for the degrees of
    freedom; the level is derived, by the simulation that docs/stats-coverage.md tabulates. Laws more skewed than the
    exponential are covered less; medians and other statistics that are not smooth are not covered.
    """
    arrays = [np.moveaxis(sample_last(part, 0, "sums"), -1, 0) for part in sums]
    for array in arrays:
        check_no_missing(array, "sums")
    n = len(arrays[0])
    check_at_least(n, 1, "the number of clusters")
    if any(len(array) != n for array in arrays):
        raise DataError(
            f"sums of {', '.join(str(len(array)) for array in arrays)} clusters",
            "the same number in each array",
            "Give every array one entry a cluster.",
        )
    totals = [array.sum(0) for array in arrays]
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = np.asarray(statistic(*[total[None] for total in totals]), dtype=np.float64)[0]
        without = np.asarray(statistic(*[total - array for total, array in zip(totals, arrays)]), dtype=np.float64)
    weights = _sizes(sizes, arrays[-1], without.shape)
    has_part = weights > 0
    n_parts = has_part.sum(0)
    centre = np.where(has_part, without, 0).sum(0) / np.maximum(n_parts, 1)
    apart = np.where(has_part, (n_parts - 1) * (centre - without), 0)
    return _interval(estimate, np.moveaxis(apart, 0, -1), np.moveaxis(weights, 0, -1), level, bounds)


def jackknife_interval(
    estimate: ArrayLike, without: ArrayLike, *, level: float = 0.95, bounds: tuple[float, float] | None = None
) -> Interval:
    """The interval of :func:`cluster_interval` from leave-one-out values that the caller has computed.

    For statistics that are no function of sums over units, such as those of pairs of units.

    Args:
        estimate: ``[...]``, with all units.
        without: ``[..., unit]``, without each of them in turn.

    Returns:
        NaN bounds with a single unit, or where a value without a unit is missing.

    Source: as :func:`cluster_interval`.
    """
    found, values = np.asarray(estimate, dtype=np.float64), np.asarray(without, dtype=np.float64)
    n = values.shape[-1]
    apart = (n - 1) * (values.mean(-1, keepdims=True) - values)
    return _interval(found, apart, np.ones_like(values), level, bounds)


def stratified_interval(
    parts: Sequence[ArrayLike], *, level: float = 0.95, bounds: tuple[float, float] | None = None
) -> Interval:
    """Interval of the mean over groups (such as domains) of the groups' means over items, groups being fixed.

    Items vary within their group: se^2 = sum_g s_g^2 / (n_g G^2), s_g the sd within group g of G. Degrees of freedom
    are at most Satterthwaite's, se^4 / sum_g (s_g^2 / (n_g G^2))^2 / (n_g - 1); else as :func:`cluster_interval`.

    Args:
        parts: One array ``[item, ...]`` per group, the same trailing axes.

    Returns:
        The interval over the trailing axes; NaN bounds where a group has a single item. ``n`` is the number of items of
        the smallest group, by which the interval covers: .83 with 2 of them beside many, .93 from 6 on.

    Source: Satterthwaite (1946); skew and level as :func:`cluster_interval`.
    """
    arrays = [np.moveaxis(sample_last(part, 0, "parts"), -1, 0) for part in parts]
    for array in arrays:
        check_no_missing(array, "parts")
        check_at_least(len(array), 1, "the number of items of a group")
    estimate = np.mean([array.mean(0) for array in arrays], axis=0)
    n, groups = sum(map(len, arrays)), len(arrays)
    variances, apart, sizes = [], [], []
    for array in arrays:
        size = len(array)
        with np.errstate(divide="ignore", invalid="ignore"):
            from_mean = (array - array.mean(0)) / groups
            # scaled so that the sum of squares over n (n - 1) is the variance of the estimate
            apart.append(from_mean * np.sqrt(n * (n - 1) / (size * np.float64(size - 1))))
            variances.append((from_mean**2).sum(0) / (size * np.float64(size - 1)))
        sizes.append(np.full(array.shape, n / (groups * size)))
    share = np.sum([v**2 / max(len(array) - 1, 1) for v, array in zip(variances, arrays)], axis=0)
    whole = np.sum(variances, axis=0)
    df = np.where(share > 0, whole**2 / np.where(share > 0, share, 1), n - groups)
    deviations, weights = (np.moveaxis(np.concatenate(side), 0, -1) for side in (apart, sizes))
    found = _interval(estimate, deviations, weights, level, bounds, df)
    fewest = np.full(found.low.shape, min(map(len, arrays)))
    return replace(found, attained=attained_coverage(fewest, level, "stratified"), n=fewest)


def _sizes(sizes: ArrayLike | None, last: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """``[cluster, ...]`` in the statistic's shape."""
    if sizes is None:
        return last if last.shape == shape and (last >= 0).all() else np.ones(shape)
    given = np.moveaxis(sample_last(sizes, 0, "sizes"), -1, 0)
    check_no_missing(given, "sizes")
    aligned = given.reshape(len(given), *[1] * (len(shape) - given.ndim), *given.shape[1:])
    try:
        fits = np.broadcast_to(aligned, shape)
    except ValueError:
        fits = None
    if fits is None or (given < 0).any():
        raise DataError(
            f"sizes of shape {given.shape}, the smallest {given.min(initial=0):g}",
            f"sizes of at least 0 that broadcast to {shape}",
            "Give one size a cluster (and a statistic).",
        )
    return np.asarray(fits)


def _interval(
    estimate: FloatArray,
    apart: FloatArray,
    sizes: FloatArray,
    level: float,
    bounds: tuple[float, float] | None,
    df_most: FloatArray | float = np.inf,
) -> Interval:
    """From leave-one-out deviations ``[..., unit]``, 0 and of size 0 where a unit has no part."""
    check_probability(level, "level")
    n = (sizes > 0).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = (apart**2).sum(-1)
        spread = np.sqrt(squares / n)
        is_flat = spread <= 1e-14 * np.maximum(np.abs(estimate), np.abs(apart).max(-1, initial=0))
        z = np.where(is_flat[..., None], 0, apart / spread[..., None])
        skew, kurtosis = (z**3).sum(-1) / n, (z**4).sum(-1) / n
        by_size = sizes.sum(-1) ** 2 / (sizes**2).sum(-1) - 1
        by_tails = np.where(kurtosis > 0, 3 * n / kurtosis - 1, n - 1)
        df = np.maximum(np.minimum.reduce([by_size, by_tails, n - 1.0, df_most + 0 * by_size]), 1)
        a = skew / np.sqrt(n)
        tail = (1 - level) / 2 * np.exp(-WIDER_BY_SKEW * np.abs(a) - WIDER_BY_FEW / (df + 1))
        t = scipy_stats.t.isf(tail, df)
        se = np.sqrt(squares / (n * (n - 1)))
        low = estimate - np.maximum(t, _skewed(t, a)) * se
        high = estimate + np.maximum(t, -_skewed(-t, a)) * se
    is_given = (n > 1) & np.isfinite(estimate) & np.isfinite(squares)
    low, high = np.where(is_given, low, np.nan), np.where(is_given, high, np.nan)
    if bounds is not None:
        low, high = np.clip(low, *bounds), np.clip(high, *bounds)
    return Interval(np.asarray(estimate), low, high, attained_coverage(n, level, "small_sample"), n)


def _skewed(z: FloatArray, a: FloatArray) -> FloatArray:
    """Hall's inverse: where a mean of skewed units has the tail that z has without skew."""
    safe = np.where(np.abs(a) < _FLAT, _FLAT, a)
    return np.where(np.abs(a) < _FLAT, z, 3 / safe * (np.cbrt(1 + safe * (z - safe / 6)) - 1))
