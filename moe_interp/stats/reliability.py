"""Reliability of per-expert means over items, and how rank correlations relate to Pearson's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from moe_interp.stats.checks import FloatArray, check_at_least
from moe_interp.stats.halves import complete_items, experts_differ, experts_first, half_ranks, random_halves
from moe_interp.stats.random_generators import derive_rng


@dataclass(frozen=True)
class Reliability:
    """Split-half reliability.

    Attributes:
        half: Mean over splits of the Spearman correlation between the means of two halves of the items, ``[...]``.
        full: The same stepped up to all items by Spearman-Brown, ``[...]``.
        pooled: Mean of ``half`` over the leading axes, stepped up.
    """

    half: FloatArray
    full: FloatArray
    pooled: float


def spearman_brown(reliability: ArrayLike, factor: float = 2.0) -> FloatArray:
    """Reliability of a mean over ``factor`` times as many items: f r / (1 + (f - 1) r). Source: Spearman, Brown (1910).

    -inf at r = -1 / (f - 1); below zero it has no meaning as a reliability.
    """
    r = np.asarray(reliability, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(factor * r / (1 + (factor - 1) * r))


def expected_spearman(r: ArrayLike, n: int) -> FloatArray:
    """Expected Spearman correlation of ``n`` pairs from a bivariate normal law with Pearson correlation ``r``.

    6 / (pi (n + 1)) (arcsin r + (n - 2) arcsin(r / 2)). Source: Moran (1948).
    """
    r = np.asarray(r, dtype=np.float64)
    return np.asarray(6 / (np.pi * (n + 1)) * (np.arcsin(r) + (n - 2) * np.arcsin(r / 2)))


def latent_pearson(rho: ArrayLike, n: int) -> FloatArray:
    """The Pearson correlation whose :func:`expected_spearman` is ``rho`` (interpolated, to about 1e-7)."""
    return np.interp(np.asarray(rho, dtype=np.float64), *_latent_table(n))


@lru_cache(maxsize=16)
def _latent_table(n: int) -> tuple[FloatArray, FloatArray]:
    grid = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 4001))  # dense at the ends, where arcsin is steep
    return expected_spearman(grid, n), grid


def split_half_reliability(x: ArrayLike, *, n_splits: int = 100, seed: int = 0) -> Reliability:
    """Split-half reliability of the ranking of experts by their mean over items.

    The items are cut at random into two halves, ``n_splits`` times; r is the mean Spearman correlation over experts of
    the two halves' means, and 2 r / (1 + r) its value for all items.

    Args:
        x: ``[item, ..., expert]`` (any unit), complete, at least 4 items and 3 experts.

    Returns:
        Fields over the middle axes; NaN where all experts are equal.

    Source: Spearman (1910), Brown (1910). It says how far the ranking would repeat with other items of the same kind,
    not that the ranking is right.
    """
    check_at_least(n_splits, 1, "n_splits")
    values = complete_items(x, "x")
    middle = values.shape[1:-1]
    stack = values.reshape(len(values), -1, values.shape[-1])
    flat = experts_first(stack)
    halves = random_halves(len(values), n_splits, derive_rng(seed, "split_half"))
    ranks = half_ranks(flat, stack.shape[-1], halves, np.ones(len(values)))
    half = (ranks[:, :, 0] * ranks[:, :, 1]).sum(0).mean(-1)
    half = np.where(experts_differ(stack), half, np.nan).reshape(middle)
    pooled = float(spearman_brown(np.nanmean(half))) if not np.isnan(half).all() else float("nan")
    return Reliability(half, spearman_brown(half), pooled)
