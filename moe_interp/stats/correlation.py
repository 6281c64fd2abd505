"""Spearman correlation for many rows, its average over layers, and a permutation test of that average."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_no_missing, check_probability, sample_last
from moe_interp.stats.random_generators import derive_rng

CLIP = 0.9999
_CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class SpearmanResult:
    """rho in [-1, 1] (NaN where a side is constant or n < 2), its two-sided p, and the pairs used."""

    rho: FloatArray
    p_value: FloatArray
    n: NDArray[np.int64]


@dataclass(frozen=True)
class MeanCorrelation:
    """A Fisher-z mean with its analytic interval; ``assumption`` says what the interval takes for granted."""

    mean: FloatArray
    low: FloatArray
    high: FloatArray
    n_units: NDArray[np.int64]
    assumption: str


@dataclass(frozen=True)
class PermutationResult:
    """An observed statistic and its p-value over the leading axes.

    ``n_permutations`` were drawn besides the observed one, or, where ``exact``, are all that there are.
    """

    statistic: FloatArray
    p_value: FloatArray
    n_permutations: int
    exact: bool = False


def spearman(x: ArrayLike, y: ArrayLike, *, axis: int = -1) -> SpearmanResult:
    """Spearman's rho along ``axis``: Pearson's correlation of average ranks.

    p is two-sided from t = rho sqrt((n - 2) / (1 - rho^2)) with n - 2 degrees of freedom, as scipy has it. A pair with
    NaN on either side is left out. ``x`` and ``y`` broadcast.

    Raises:
        DataError: Infinite values, or shapes that do not broadcast.

    Source: Spearman (1904). It shows monotone association only; with 16 experts |rho| >= .50 is needed for p < .05.
    """
    a, b = _pair(sample_last(x, axis, "x"), sample_last(y, axis, "y"))
    missing = np.isnan(a) | np.isnan(b)
    n = (~missing).sum(-1)
    rho = pearson_of_ranks(_ranks(a, missing), _ranks(b, missing))
    rho = np.where(n >= 2, rho, np.nan)
    freedom = np.maximum(n - 2, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = rho * np.sqrt(freedom / np.maximum((1 - rho) * (1 + rho), 0))
    p = np.where(n >= 3, 2 * scipy_stats.t.sf(np.abs(t), freedom), np.nan)
    return SpearmanResult(rho, p, n)


def pearson_of_ranks(a: FloatArray, b: FloatArray) -> FloatArray:
    """Correlation of centred ranks along the last axis; NaN where a side is constant."""
    norm = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(norm > 0, np.clip((a * b).sum(-1) / np.where(norm > 0, norm, 1), -1, 1), np.nan)


def _pair(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    try:
        left, right = np.broadcast_arrays(a, b)
    except ValueError:
        raise DataError(
            f"x has shape {a.shape} and y {b.shape} (samples last)",
            "shapes that broadcast",
            "Pass two arrays with the same experts along the sample axis.",
        ) from None
    return left, right


def _ranks(x: FloatArray, missing: NDArray[np.bool_]) -> FloatArray:
    """Centred average ranks; 0 at missing entries."""
    if not x.size:
        return np.zeros(x.shape)
    ranks = scipy_stats.rankdata(np.where(missing, np.inf, x), axis=-1)
    n = (~missing).sum(-1, keepdims=True)
    return np.where(missing, 0.0, ranks - (n + 1) / 2)


def fisher_z_mean(rho: ArrayLike, *, axis: int | tuple[int, ...] | None = -1, clip: float = CLIP) -> FloatArray:
    """tanh(mean(atanh(rho))), rho clipped at +-``clip``; NaN is skipped, all-NaN gives NaN. A point estimate."""
    z = np.arctanh(np.clip(np.asarray(rho, dtype=np.float64), -clip, clip))
    n = (~np.isnan(z)).sum(axis)
    total = np.nansum(z, axis)
    return np.asarray(np.where(n > 0, np.tanh(total / np.maximum(n, 1)), np.nan))


def fisher_z_interval(
    rho: ArrayLike, n: int | ArrayLike, *, axis: int = -1, level: float = 0.95, clip: float = CLIP
) -> MeanCorrelation:
    """Fisher-z mean of Spearman correlations over units (layers), with its analytic normal interval.

    z_bar +- z_{(1+level)/2} sqrt(sum_u 1.06 / (n_u - 3)) / U. The interval **assumes independent units**; layers and
    domains share items and a model, so it is too narrow: :func:`corrected_correlation` resamples items instead.

    Args:
        rho: Correlations, ``[..., unit]``; NaN units are skipped.
        n: Pairs (experts) behind each correlation, at least 4; broadcasts against ``rho``.

    Source: Fisher (1921); variance 1.06 / (n - 3) for Spearman from Fieller, Hartley & Pearson (1957).
    """
    check_probability(level, "level")
    values = sample_last(rho, axis, "rho")
    pairs = np.broadcast_to(np.asarray(n), values.shape)
    check_at_least(int(pairs.min(initial=4)), 4, "n (pairs behind a correlation)")
    units = (~np.isnan(values)).sum(-1)
    mean = fisher_z_mean(values, clip=clip)
    variance = np.where(np.isnan(values), 0, 1.06 / (pairs - 3)).sum(-1) / np.maximum(units, 1) ** 2
    half = scipy_stats.norm.ppf((1 + level) / 2) * np.sqrt(variance)
    z = np.arctanh(mean)
    return MeanCorrelation(mean, np.tanh(z - half), np.tanh(z + half), units, "independent units")


def mean_rho_permutation(
    x: ArrayLike, y: ArrayLike, *, n_permutations: int = 9999, seed: int = 0, clip: float = CLIP
) -> tuple[PermutationResult, PermutationResult]:
    """Permutation test of the Fisher-z mean of Spearman correlations over layers (and domains).

    Null: within a layer, experts are exchangeable. The expert labels of ``x`` are permuted within each layer, with the
    same permutation for all domains (domains share the experts). Two-sided p = (1 + #{|T*| >= |T|}) / (1 + B).

    Args:
        x: Natural routing, ``[domain, layer, expert]`` (or ``[layer, expert]``).
        y: Mean delta, the same shape.

    Returns:
        The test per domain (fields ``[domain]``) and the test of the mean over domains and layers (scalar fields).
        A layer in which a side is constant is left out.

    Raises:
        DataError: Missing values, or shapes that differ.

    Source: derived. It rejects exchangeability of experts; it says nothing about the size of the correlation without
    noise.
    """
    check_at_least(n_permutations, 1, "n_permutations")
    a, b = _pair(sample_last(x, name="x"), sample_last(y, name="y"))
    if a.ndim not in (2, 3):
        raise DataError(f"x has shape {a.shape}", "[domain, layer, expert] or [layer, expert]", "Add or drop axes.")
    check_no_missing(a + b, "x or y")
    a, b = (side.reshape(-1, *side.shape[-2:]) for side in (a, b))
    unit_a, unit_b = (_unit_ranks(side) for side in (a, b))
    usable = (unit_a.any(-1)) & (unit_b.any(-1))
    per_domain = np.where(usable, (unit_a * unit_b).sum(-1), np.nan)
    observed = np.append(fisher_z_mean(per_domain, clip=clip), fisher_z_mean(per_domain, axis=None, clip=clip))

    rng = derive_rng(seed, "mean_rho_permutation")
    n_domains, n_layers, n_experts = a.shape
    chunk = max(1, _CELLS_AT_ONCE // max(a.size, 1))
    extreme = np.zeros(n_domains + 1)
    for start in range(0, n_permutations, chunk):
        count = min(chunk, n_permutations - start)
        order = rng.permuted(np.tile(np.arange(n_experts), (count, n_layers, 1)), axis=-1)
        # [permutation, domain, layer]: the same order for all domains
        drawn = np.stack(
            [(np.take_along_axis(u[None], order, axis=-1) * v).sum(-1) for u, v in zip(unit_a, unit_b)], axis=1
        )
        drawn = np.where(usable, drawn, np.nan)
        null = np.column_stack([fisher_z_mean(drawn, clip=clip), fisher_z_mean(drawn.reshape(count, -1), clip=clip)])
        extreme += (np.abs(null) >= np.abs(observed) * (1 - 1e-12)).sum(0)
    p = np.where(np.isnan(observed), np.nan, (1 + extreme) / (1 + n_permutations))
    return (
        PermutationResult(observed[:-1], p[:-1], n_permutations),
        PermutationResult(observed[-1], p[-1], n_permutations),
    )


def _unit_ranks(x: FloatArray) -> FloatArray:
    """Centred ranks of length one; all zeros where ``x`` is constant."""
    ranks = _ranks(x, np.zeros(x.shape, dtype=bool))
    norm = np.sqrt((ranks**2).sum(-1, keepdims=True))
    return ranks / np.where(norm > 0, norm, 1)
