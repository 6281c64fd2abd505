"""Permutation tests: paired differences, and two groups of layers."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_choice, check_no_missing, sample_last
from moe_interp.stats.correlation import PermutationResult
from moe_interp.stats.random_generators import derive_rng

_CELLS_AT_ONCE = 4_000_000
_ENUMERATE = 20_000  # arrangements up to this many are all visited
_TIE = 1e-9  # relative; equal statistics computed in different orders must count as equal


def paired_permutation(
    x: ArrayLike, *, axis: int = -1, n_permutations: int = 9999, alternative: str = "two-sided", seed: int = 0
) -> PermutationResult:
    """Sign-flip test that paired differences are symmetric about zero; the statistic is their mean.

    All 2^n sign patterns are visited where there are at most 20,000 (n <= 14), else ``n_permutations`` are drawn, and
    p = (1 + #) / (1 + B). One set of signs serves all rows, whose items are the same.

    Args:
        x: Differences, ``[..., item]``, complete (any unit; positive = first of the pair larger).
        alternative: ``"two-sided"`` | ``"greater"`` | ``"less"``.

    Source: Fisher (1935). A rejection may come from asymmetry; the mean is moved by single large items.
    """
    check_choice(alternative, ("two-sided", "greater", "less"), "alternative")
    check_at_least(n_permutations, 1, "n_permutations")
    values = sample_last(x, axis)
    check_no_missing(values, "x")
    lead, n = values.shape[:-1], values.shape[-1]
    check_at_least(n, 1, "the number of items")
    rows = values.reshape(-1, n)
    exact = n <= 14
    if exact:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = derive_rng(seed, "paired_permutation").choice([-1, 1], size=(n_permutations, n))
    observed = rows.sum(-1)
    # the largest |sum| that rounding could blur
    slack = _TIE * np.abs(rows).sum(-1)
    extreme = np.zeros(len(rows))
    chunk = max(1, _CELLS_AT_ONCE // max(len(rows), n))
    for start in range(0, len(signs), chunk):
        extreme += _as_extreme(signs[start : start + chunk] @ rows.T, observed, slack, alternative)
    p = extreme / len(signs) if exact else (1 + extreme) / (1 + n_permutations)
    return PermutationResult((observed / n).reshape(lead), p.reshape(lead), len(signs), exact)


def two_group_permutation(
    x: ArrayLike,
    group: ArrayLike,
    *,
    axis: int = -1,
    n_permutations: int = 9999,
    alternative: str = "two-sided",
    seed: int = 0,
) -> PermutationResult:
    """Permutation test of mean(x in group) - mean(x outside), for instance early and last layers against the middle.

    All arrangements of the labels are visited where there are at most 20,000, else ``n_permutations`` are drawn.

    Args:
        x: For instance layer impact, ``[..., layer]``, nats, complete.
        group: Boolean, ``[layer]``.

    Raises:
        DataError: Labels that do not match, or an empty group.

    Source: Fisher (1935). Layers are taken as exchangeable under the null; where those next to each other are alike, it
    rejects far too often: see :func:`shifted_group_test`.
    """
    check_choice(alternative, ("two-sided", "greater", "less"), "alternative")
    check_at_least(n_permutations, 1, "n_permutations")
    values = sample_last(x, axis)
    check_no_missing(values, "x")
    n = values.shape[-1]
    inside = _checked_group(group, n)
    size = int(inside.sum())
    rows = values.reshape(-1, n)
    exact = comb(n, size) <= _ENUMERATE
    if exact:
        members = np.array(list(combinations(range(n), size)))
    else:
        rng = derive_rng(seed, "two_group_permutation")
        members = rng.permuted(np.tile(np.arange(n), (n_permutations, 1)), axis=1)[:, :size]
    weights = np.full((len(members), n), -1 / (n - size))
    np.put_along_axis(weights, members, 1 / size, axis=1)
    observed = rows[:, inside].mean(-1) - rows[:, ~inside].mean(-1)
    extreme = _as_extreme(weights @ rows.T, observed, _TIE * np.abs(rows).max(-1), alternative)
    p = extreme / len(members) if exact else (1 + extreme) / (1 + n_permutations)
    return PermutationResult(observed.reshape(values.shape[:-1]), p.reshape(values.shape[:-1]), len(members), exact)


def shifted_group_test(x: ArrayLike, group: ArrayLike, *, axis: int = -1) -> PermutationResult:
    """Test of mean(x in group) - mean(x outside) against the same group shifted along an ordered axis, such as layers.

    All cyclic shifts of the labels are visited; p is the share whose difference is at least as large, without regard
    to sign. Neighbours stay neighbours, so that a smooth or autocorrelated ``x`` is no evidence of groups, which it is
    to :func:`two_group_permutation`. The smallest p is 1 / n.

    Args:
        x: ``[..., layer]`` in order, complete.
        group: Boolean, ``[layer]``.

    Raises:
        DataError: Labels that do not match, or an empty group.

    Source: derived, after the toroidal shifts of spatial statistics (Lotwick & Silverman 1982). Exact where ``x`` is
    stationary on a circle; at or below its level for autoregressive, trending and random-walk ``x``, by simulation
    (docs/stats-coverage.md).
    """
    values = sample_last(x, axis)
    check_no_missing(values, "x")
    n = values.shape[-1]
    inside = _checked_group(group, n)
    weights = np.where(inside, 1 / inside.sum(), -1 / (n - inside.sum()))
    shifts = np.stack([np.roll(weights, by) for by in range(n)])
    rows = values.reshape(-1, n)
    observed = rows @ weights
    extreme = _as_extreme(shifts @ rows.T, observed, _TIE * np.abs(rows).max(-1), "two-sided")
    lead = values.shape[:-1]
    return PermutationResult(observed.reshape(lead), (extreme / n).reshape(lead), n, True)


def _checked_group(group: ArrayLike, n: int) -> NDArray[np.bool_]:
    inside = np.asarray(group)
    if inside.shape != (n,) or inside.dtype != bool or inside.all() or not inside.any():
        raise DataError(
            f"group of shape {inside.shape} and type {inside.dtype} with {int(inside.sum())} members, for {n} values",
            "one boolean per value, with members and others",
            "Mark the layers of one group with True and leave at least one False.",
        )
    return inside


def _as_extreme(null: FloatArray, observed: FloatArray, slack: FloatArray, alternative: str) -> FloatArray:
    """How many draws, ``[draw, row]``, are at least as extreme as what was observed."""
    if alternative == "two-sided":
        null, observed = np.abs(null), np.abs(observed)
    elif alternative == "less":
        null, observed = -null, -observed
    return np.asarray((null >= observed - slack).sum(0), dtype=np.float64)
