"""Intervals for a row's centre: exact ones from order statistics and Walsh averages, and bootstrap ones by item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from moe_interp.stats.checks import (
    FloatArray,
    check_at_least,
    check_choice,
    check_no_missing,
    check_probability,
    sample_last,
)
from moe_interp.stats.streams import derive_rng
from moe_interp.stats.wilcoxon import signed_rank_null

BOOTSTRAP_METHODS = ("percentile", "bca", "studentized")
Statistic = Callable[[FloatArray], FloatArray]  # [..., item] -> [...]
_CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval over the leading axes.

    ``attained`` is the coverage that an exact interval guarantees (at least the level asked for); for any other it is
    what the interval covers at this number of units, tabulated in docs/stats-coverage.md. ``n`` is the number of
    independent units behind it, where they are counted.
    """

    estimate: FloatArray
    low: FloatArray
    high: FloatArray
    attained: FloatArray
    n: NDArray[np.int64] | None = None


def median_interval(x: ArrayLike, *, axis: int = -1, level: float = 0.95) -> Interval:
    """Exact interval of the median from order statistics: [x_(k), x_(n+1-k)].

    k is the largest with 1 - 2 P(Binomial(n, 1/2) < k) >= ``level``. It holds for every continuous law, at every n
    (conservative with ties). Below 6 items no such interval exists at .95: it is (-inf, inf). NaN is a missing item.

    Source: Thompson (1936). The median says nothing of the mean, which is what a skewed delta moves.
    """
    check_probability(level, "level")
    return _by_count(sample_last(x, axis), level, _median_rows)


def pseudomedian_interval(x: ArrayLike, *, axis: int = -1, level: float = 0.95) -> Interval:
    """Hodges-Lehmann estimate (median of the Walsh averages (x_i + x_j) / 2, i <= j) and its exact interval.

    The interval [a_(k), a_(M+1-k)], M = n (n + 1) / 2, inverts the signed-rank test: k is the largest with
    1 - 2 P(W+ < k) >= ``level``. Exact for symmetric continuous laws; ties make it conservative. Below 6 items it is
    (-inf, inf) at .95. NaN is a missing item.

    Source: Hodges & Lehmann (1963), Tukey (1949). For a skewed law the pseudomedian is neither mean nor median.
    """
    check_probability(level, "level")
    return _by_count(sample_last(x, axis), level, _pseudomedian_rows)


def bootstrap_interval(
    x: ArrayLike,
    statistic: str | Statistic = "mean",
    *,
    axis: int = -1,
    method: str = "percentile",
    level: float = 0.95,
    expand: bool = True,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of ``statistic``, resampling items; one resample serves all rows, whose items are the same.

    ``"percentile"``: quantiles of the resampled statistic. ``"bca"``: the same at levels corrected for bias and for
    acceleration (jackknife). ``"studentized"``: estimate - t*_q se, t* = (theta* - theta) / se*, for the mean only; it
    covers best for skewed laws in small samples. Memory is bounded by chunks of resamples.

    Args:
        x: ``[..., item]`` without missing items, at least 2 of them.
        statistic: ``"mean"`` | ``"median"`` or a function of ``[..., item]`` that reduces the last axis.
        expand: Take the quantiles of ``"percentile"`` and ``"bca"`` at levels Phi(-+ sqrt(n / (n - 1)) t_{n-1}) instead
            of Phi(-+ z). A resample's spread is too small by sqrt((n - 1) / n) and its quantiles ignore that the sd is
            estimated; this makes up for both, and vanishes as n grows.

    Raises:
        DataError: Missing or infinite values.
        ConfigError: ``"studentized"`` with a statistic other than the mean, or options out of range.

    Source: Efron (1987); Hall (1988) for the studentized form; Hesterberg (2015) for the expansion. Coverage is
    tabulated in docs/stats-coverage.md; it falls short for skewed laws below about 50 items. BCa and its jackknife are
    unfit for the median: take :func:`median_interval`.
    """
    check_choice(method, BOOTSTRAP_METHODS, "method")
    check_probability(level, "level")
    check_at_least(n_resamples, 1, "n_resamples")
    if isinstance(statistic, str):
        check_choice(statistic, tuple(_NAMED), "statistic")
    if method == "studentized":
        check_choice(str(statistic), ("mean",), "statistic of a studentized interval")
    values = sample_last(x, axis)
    check_no_missing(values, "x")
    lead, n = values.shape[:-1], values.shape[-1]
    check_at_least(n, 2, "the number of items")
    rows = values.reshape(-1, n)
    function = _NAMED[statistic] if isinstance(statistic, str) else statistic
    estimate = np.asarray(function(rows), dtype=np.float64)
    rng = derive_rng(seed, "bootstrap_interval")
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "studentized":
        low, high = _studentized(rows, tails, n_resamples, rng)
    else:
        if expand:
            tails = scipy_stats.norm.cdf(np.sqrt(n / (n - 1)) * scipy_stats.t.ppf(tails, n - 1))
        by_mean = statistic == "mean"
        draws = _mean_draws(rows, n_resamples, rng) if by_mean else _draws(rows, function, n_resamples, rng)
        levels = np.tile(tails, (len(rows), 1))
        if method == "bca":
            levels = _bca_levels(draws, estimate, rows, function, tails)
        low, high = _row_quantiles(draws, levels)
    return Interval(estimate.reshape(lead), low.reshape(lead), high.reshape(lead), np.full(lead, level))


_NAMED: dict[str, Statistic] = {"mean": lambda a: a.mean(-1), "median": lambda a: np.median(a, axis=-1)}


def _draws(rows: FloatArray, function: Statistic, n_resamples: int, rng: np.random.Generator) -> FloatArray:
    """The statistic of every resample, ``[resample, row]``."""
    n = rows.shape[-1]
    chunk = max(1, _CELLS_AT_ONCE // max(rows.size, 1))
    parts = []
    for start in range(0, n_resamples, chunk):
        picked = rng.integers(n, size=(min(chunk, n_resamples - start), n))
        parts.append(function(np.moveaxis(rows[:, picked], 0, 1)))  # (row, resample, item) -> (resample, row, item)
    return np.concatenate(parts)


def _mean_draws(rows: FloatArray, n_resamples: int, rng: np.random.Generator) -> FloatArray:
    """As :func:`_draws` for the mean, by item counts and one matrix product."""
    n = rows.shape[-1]
    return rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) @ rows.T / n


def _studentized(
    rows: FloatArray, tails: FloatArray, n_resamples: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    n = rows.shape[-1]
    mean = rows.mean(-1)
    centred = rows - mean[:, None]  # so that the variances below lose no digits
    counts = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)
    shift = counts @ centred.T / n
    se = np.sqrt(np.maximum(counts @ (centred**2).T / n - shift**2, 0) / (n - 1))
    # a resample of one item repeated has no spread and gives no t
    t = np.where(se > 1e-12 * np.abs(centred).max(-1), shift / np.where(se > 0, se, 1), np.nan)
    observed = np.sqrt((centred**2).mean(-1) / (n - 1))
    usable = ~np.isnan(t).all(0)
    quantiles = np.zeros((2, len(rows)))  # a constant row has no spread: its interval is the point itself
    quantiles[:, usable] = np.nanquantile(t[:, usable], tails, axis=0)
    return mean - quantiles[1] * observed, mean - quantiles[0] * observed


def _bca_levels(
    draws: FloatArray, estimate: FloatArray, rows: FloatArray, function: Statistic, tails: FloatArray
) -> FloatArray:
    """Quantile levels per row, ``[row, 2]``: Phi(z0 + (z0 + z) / (1 - a (z0 + z)))."""
    below = ((draws < estimate).mean(0) + (draws <= estimate).mean(0)) / 2
    # a statistic beyond all resamples would put the correction at infinity
    bias = scipy_stats.norm.ppf(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    n = rows.shape[-1]
    left_out = np.stack([function(np.delete(rows, i, axis=-1)) for i in range(n)], axis=-1)
    deviation = left_out.mean(-1, keepdims=True) - left_out
    spread = (deviation**2).sum(-1)
    acceleration = np.where(spread > 0, (deviation**3).sum(-1) / (6 * np.where(spread > 0, spread, 1) ** 1.5), 0)
    moved = bias[:, None] + scipy_stats.norm.ppf(tails)
    return scipy_stats.norm.cdf(bias[:, None] + moved / (1 - acceleration[:, None] * moved))


def _row_quantiles(draws: FloatArray, levels: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Quantiles of each column of ``draws`` at its own levels (linear interpolation)."""
    ordered = np.sort(draws, axis=0)
    place = levels.T * (len(draws) - 1)
    floor = np.floor(place).astype(np.int64)
    columns = np.arange(draws.shape[1])
    above = np.minimum(floor + 1, len(draws) - 1)
    low, high = ordered[floor, columns] + (place - floor) * (ordered[above, columns] - ordered[floor, columns])
    return low, high


def _by_count(
    values: FloatArray, level: float, rows_interval: Callable[[FloatArray, float], tuple[FloatArray, ...]]
) -> Interval:
    """Apply an exact interval to rows grouped by how many items they have."""
    lead = values.shape[:-1]
    rows = np.sort(values.reshape(-1, values.shape[-1]), axis=-1)  # NaN sorts last
    counts = (~np.isnan(rows)).sum(-1)
    out = np.full((4, len(rows)), np.nan)
    for n in np.unique(counts[counts > 0]):
        out[:, counts == n] = rows_interval(rows[counts == n, :n], level)
    return Interval(*out.reshape(4, *lead))


def _median_rows(rows: FloatArray, level: float) -> tuple[FloatArray, ...]:
    n = rows.shape[-1]
    below = scipy_stats.binom.cdf(np.arange(n // 2 + 1), n, 0.5)
    return _ordered_interval(rows, np.median(rows, axis=-1), below, level)


def _pseudomedian_rows(rows: FloatArray, level: float) -> tuple[FloatArray, ...]:
    n = rows.shape[-1]
    first, second = np.triu_indices(n)
    walsh = np.sort((rows[:, first] + rows[:, second]) / 2, axis=-1)
    below = np.cumsum(signed_rank_null(np.arange(1, n + 1)[None])[0, ::2])[: walsh.shape[-1] // 2 + 1]
    return _ordered_interval(walsh, np.median(walsh, axis=-1), below, level)


def _ordered_interval(
    ordered: FloatArray, estimate: FloatArray, below: FloatArray, level: float
) -> tuple[FloatArray, ...]:
    """[y_(k), y_(M+1-k)] with the largest k such that 1 - 2 P(count < k) >= level; below[j] = P(count <= j)."""
    k = int((1 - 2 * below >= level).sum())
    if k == 0:
        endless = np.full(len(ordered), np.inf)
        return estimate, -endless, endless, np.ones(len(ordered))
    return estimate, ordered[:, k - 1], ordered[:, -k], np.full(len(ordered), 1 - 2 * below[k - 1])
