"""Mantel's test: do two measures of similarity agree, over pairs of which each thing is in many?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_choice, sample_last
from moe_interp.stats.random_generators import derive_rng

_ENUMERATE = 7  # units: 5,040 orders
_TIE = 1e-12


@dataclass(frozen=True)
class MantelResult:
    """Correlations over pairs, and their permutation test.

    Attributes:
        correlation: ``[...]``, Pearson's over pairs of different units; NaN where a side is constant.
        p_value: ``[...]``.
        null_mean, null_sd: ``[...]``, of the correlation under permutation. The mean is off 0 where what a permutation
            leaves in place (such as positions) makes pairs alike.
        mean: The mean correlation over all leading axes that have one.
        mean_p: Its p, under the same permutations for all of them.
        n_permutations: Drawn ones, or all that there are where ``exact``.
    """

    correlation: FloatArray
    p_value: FloatArray
    null_mean: FloatArray
    null_sd: FloatArray
    mean: float
    mean_p: float
    n_permutations: int
    exact: bool


def mantel(
    x: ArrayLike,
    y: ArrayLike,
    *,
    tokens_per_unit: int = 1,
    strata: ArrayLike | None = None,
    n_permutations: int = 999,
    alternative: str = "two-sided",
    seed: int = 0,
) -> MantelResult:
    """Mantel's permutation test of the correlation of two symmetric matrices over pairs.

    Pairs share their members, so they are not independent, and no test of a correlation over pairs holds its level.
    Here the units (sequences) of ``x`` are permuted, rows and columns together. Where a unit has several tokens, they
    move together and pairs within a unit are left out: tokens of one sequence depend on each other, and permuted one by
    one they would reject far too often. Two-sided p is twice the smaller one-sided p, at most 1.

    Args:
        x, y: ``[..., thing, thing]``, symmetric similarities; the diagonal is not read.
        tokens_per_unit: Things that follow one another and belong to one unit.
        strata: ``[unit]`` labels, such as domains: units are permuted within them only. The correlation over all pairs
            then has a null mean above 0 where strata differ; p is of what goes beyond that.
        n_permutations: Drawn besides the observed order; all orders are visited where there are at most 5,040.
        alternative: "two-sided" | "greater" | "less".

    Raises:
        DataError: matrices that are not square, of different shapes or with missing values; fewer than 3 units.
        ConfigError: options out of range.

    Source: Mantel (1967); permuting blocks of tokens is derived. Its level is in docs/geometry.md. A rejection says
    that the two similarities go together, not that one makes the other.
    """
    check_choice(alternative, ("two-sided", "greater", "less"), "alternative")
    check_at_least(n_permutations, 1, "n_permutations")
    check_at_least(tokens_per_unit, 1, "tokens_per_unit")
    left, right = _matrices(x, y)
    lead, size = left.shape[:-2], left.shape[-1]
    n = size // tokens_per_unit
    if size % tokens_per_unit or n < 3:
        raise DataError(
            f"{size} things in units of {tokens_per_unit}, {n} units",
            "at least 3 units (sequences) of one size: their order is what is permuted",
            "Add sequences: no permutation of fewer says anything.",
        )
    groups = np.zeros(n, dtype=np.int64) if strata is None else _groups(strata, n)
    unit = np.repeat(np.arange(n), tokens_per_unit)
    first, second = np.triu_indices(size, 1)
    apart = unit[first] != unit[second]
    first, second = first[apart], second[apart]
    flat = left.reshape(-1, size * size)
    a, b = (_standardised(side.reshape(-1, size * size)[:, first * size + second]) for side in (left, right))
    centre, scale = _moments(flat[:, first * size + second])
    observed = (a * b).sum(-1)
    orders, exact = _orders(groups, n_permutations, seed)
    drawn = np.empty((len(orders), len(flat)))
    within = np.arange(tokens_per_unit)
    for number, order in enumerate(orders):
        moved = (order[:, None] * tokens_per_unit + within).ravel()
        permuted = (flat[:, moved[first] * size + moved[second]] - centre) / scale
        drawn[number] = (permuted * b).sum(-1)
    known = ~np.isnan(observed)
    everything = np.column_stack([drawn, drawn[:, known].mean(-1) if known.any() else np.full(len(drawn), np.nan)])
    mean = float(observed[known].mean()) if known.any() else np.nan
    p = _p(everything, np.append(observed, mean), alternative, exact)
    return MantelResult(
        correlation=observed.reshape(lead),
        p_value=p[:-1].reshape(lead),
        null_mean=drawn.mean(0).reshape(lead),
        null_sd=drawn.std(0).reshape(lead),
        mean=mean,
        mean_p=float(p[-1]),
        n_permutations=len(orders),
        exact=exact,
    )


def _matrices(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    left, right = sample_last(x, name="x"), sample_last(y, name="y")
    is_square = left.ndim >= 2 and left.shape[-1] == left.shape[-2]
    if not is_square or left.shape != right.shape or np.isnan(left + right).any():
        raise DataError(
            f"x of shape {left.shape} and y of shape {right.shape}, {int(np.isnan(left).sum())} and "
            f"{int(np.isnan(right).sum())} values missing",
            "square matrices of one shape without missing values",
            "Compute both similarities for the same things.",
        )
    return left, right


def _groups(strata: ArrayLike, n: int) -> NDArray[np.int64]:
    labels = np.asarray(strata)
    if labels.shape != (n,):
        raise DataError(f"strata of shape {labels.shape}", f"one label for each of {n} units", "Give one a sequence.")
    return np.unique(labels, return_inverse=True)[1]


def _moments(pairs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and root of the sum of squares about it; NaN for a constant row."""
    centre = pairs.mean(-1, keepdims=True)
    scale = np.sqrt(((pairs - centre) ** 2).sum(-1, keepdims=True))
    is_flat = scale <= 1e-13 * np.sqrt((pairs**2).sum(-1, keepdims=True))
    return centre, np.where(is_flat, np.nan, scale)


def _standardised(pairs: FloatArray) -> FloatArray:
    centre, scale = _moments(pairs)
    return (pairs - centre) / scale


def _orders(groups: NDArray[np.int64], n_permutations: int, seed: int) -> tuple[NDArray[np.int64], bool]:
    """``[permutation, unit]`` orders of the units within their strata."""
    n = len(groups)
    if n <= _ENUMERATE:
        every = np.array(list(permutations(range(n))))
        return every[(groups[every] == groups).all(1)], True
    rng = derive_rng(seed, "mantel")
    orders = np.empty((n_permutations, n), dtype=np.int64)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        orders[:, members] = rng.permuted(np.tile(members, (n_permutations, 1)), axis=1)
    return orders, False


def _p(drawn: FloatArray, observed: FloatArray, alternative: str, exact: bool) -> FloatArray:
    extra = 0 if exact else 1  # the observed order is among all of them
    above = ((drawn >= observed - _TIE).sum(0) + extra) / (len(drawn) + extra)
    below = ((drawn <= observed + _TIE).sum(0) + extra) / (len(drawn) + extra)
    p = {"greater": above, "less": below, "two-sided": np.minimum(2 * np.minimum(above, below), 1)}[alternative]
    return np.where(np.isnan(observed), np.nan, p)
