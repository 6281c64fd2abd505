"""Bootstrap intervals of a row's centre, resampling items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from moe_interp.stats.checks import (
    FloatArray,
    check_at_least,
    check_choice,
    check_no_missing,
    check_probability,
    sample_last,
)
from moe_interp.stats.intervals.coverage import attained_coverage
from moe_interp.stats.intervals.means import Interval
from moe_interp.stats.intervals.small_samples import mean_interval
from moe_interp.stats.random_generators import derive_rng

BOOTSTRAP_METHODS = ("percentile", "bca", "studentized")
Statistic = Callable[[FloatArray], FloatArray]  # [..., item] -> [...]
_CELLS_AT_ONCE = 4_000_000
_FARTHEST = 8.0  # no normal deviate is farther from 0


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
    acceleration (jackknife). ``"studentized"``: estimate - t*_q se, t* = (theta* - theta) / se*, for the mean only;
    endless with 2 and 3 items, of whose resamples too many have no spread. Memory is bounded by chunks of resamples.

    Args:
        x: ``[..., item]`` without missing items, at least 2 of them.
        statistic: ``"mean"`` | ``"median"`` or a function of ``[..., item]`` that reduces the last axis.
        expand: Take the quantiles of ``"percentile"`` and ``"bca"`` at levels Phi(-+ sqrt(n / (n - 1)) t_{n-1}) instead
            of Phi(-+ z): a resample's spread is too small by sqrt((n - 1) / n), and its quantiles ignore that the sd is
            estimated. And stretch the percentile interval of the mean to hold that of
            :func:`moe_interp.stats.mean_interval`, without which it covers .5, .75, .88 and .91 with 2 to 5 items.

    Returns:
        Its ``attained`` is what the method was found to cover with so many items, at the worst of the tabulated laws;
        that of the same method for a mean where ``statistic`` is a function; NaN for BCa of the median.

    Raises:
        DataError: Missing or infinite values.
        ConfigError: ``"studentized"`` with a statistic other than the mean, or options out of range.

    Source: Efron (1987); Hall (1988) for the studentized form; Hesterberg (2015) for the levels. BCa and its jackknife
    are unfit for the median: take :func:`median_interval`.
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
        if by_mean and method == "percentile" and expand:
            sure = mean_interval(rows, level=level)
            low, high = np.minimum(low, sure.low), np.maximum(high, sure.high)
    column = _tabulated(method, statistic, expand)
    attained = np.nan if column is None else attained_coverage(n, level, column)
    return Interval(
        estimate.reshape(lead), low.reshape(lead), high.reshape(lead), np.full(lead, attained), np.full(lead, n)
    )


def _tabulated(method: str, statistic: str | Statistic, expand: bool) -> str | None:
    """The name of the column of coverages."""
    if method == "studentized":
        return method
    if statistic == "median":
        return None if method == "bca" else "median_percentile" + "_expanded" * expand
    if statistic == "mean" and method == "percentile" and expand:
        return "percentile"
    return method + ("_expanded" if expand else "_plain")


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
    # a resample of one item repeated has no spread: its t is endless, and with few items so is the interval
    has_spread = se > 1e-12 * np.abs(centred).max(-1)
    t = np.where(has_spread, shift / np.where(has_spread, se, 1), np.where(shift == 0, 0, np.copysign(np.inf, shift)))
    observed = np.sqrt((centred**2).mean(-1) / (n - 1))
    t[:, observed == 0] = 0  # a constant row: its interval is the point itself
    low = np.quantile(t, float(tails[1]), axis=0, method="higher")
    high = np.quantile(t, float(tails[0]), axis=0, method="lower")
    unit = np.where(observed > 0, observed, 1)
    return mean - low * unit, mean - high * unit


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
    moved = bias[:, None] + np.clip(scipy_stats.norm.ppf(tails), -_FARTHEST, _FARTHEST)
    slope = 1 - acceleration[:, None] * moved
    # where the slope is not positive the correction has passed its pole, and the level is at its end
    levels = scipy_stats.norm.cdf(bias[:, None] + moved / np.where(slope > 0, slope, 1))
    return np.where(slope > 0, levels, moved > 0)


def _row_quantiles(draws: FloatArray, levels: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Quantiles of each column of ``draws`` at its own levels (linear interpolation)."""
    ordered = np.sort(draws, axis=0)
    place = levels.T * (len(draws) - 1)
    floor = np.floor(place).astype(np.int64)
    columns = np.arange(draws.shape[1])
    above = np.minimum(floor + 1, len(draws) - 1)
    low, high = ordered[floor, columns] + (place - floor) * (ordered[above, columns] - ordered[floor, columns])
    return low, high
