"""Permutation tests: specialization between domains, paired differences, and two groups of layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_choice, check_no_missing, sample_last
from moe_interp.stats.correlation import PermutationResult
from moe_interp.stats.multiple import adjust_p
from moe_interp.stats.streams import derive_rng

_CELLS_AT_ONCE = 4_000_000
_ENUMERATE = 20_000  # arrangements up to this many are all visited
_TIE = 1e-9  # relative; equal statistics computed in different orders must count as equal


@dataclass(frozen=True)
class DomainEffect:
    """Result of :func:`domain_effect`.

    Attributes:
        statistic: Between-domain sum of squares, ``[layer, expert]``, in squared units of delta.
        eta_squared: Its share of the total sum of squares, in [0, 1]; optimistic, also with no effect.
        p_value, q_value: Per (layer, expert), and adjusted over all of them.
        contrast: Domain mean of centred delta minus the mean over all items, ``[domain, layer, expert]``.
        global_p: One test of the sum over layers and experts.
        domains: Labels in the order of ``contrast``.
    """

    statistic: FloatArray
    eta_squared: FloatArray
    p_value: FloatArray
    q_value: FloatArray
    contrast: FloatArray
    global_p: float
    domains: tuple[str, ...]
    n_permutations: int


def domain_effect(
    delta: ArrayLike, domain: ArrayLike, *, n_permutations: int = 9999, method: str = "bh", seed: int = 0
) -> DomainEffect:
    """Does an expert help some domains more than others, beyond domains being more or less fragile as a whole?

    delta is centred per item (and layer) over experts, which removes the main effect of the domain; the statistic is
    the between-domain sum of squares sum_d n_d (mean_d - mean)^2; the items' labels are permuted jointly over all
    layers and experts; p = (1 + #{SS* >= SS}) / (1 + B), adjusted over (layer, expert).

    Args:
        delta: ``[item, layer, expert]`` or ``[item, expert]``, nats, complete; positive = better than the baseline.
        domain: Label of each item, ``[item]``; at least two domains of at least two items.
        n_permutations: B; the smallest p is 1 / (1 + B), so BH over m tests wants B well above m / alpha.

    Raises:
        DataError: One domain only, a domain with a single item, labels that do not match, or missing values.

    Source: derived. The null is that centred deltas have one law in all domains: where domains differ in spread and in
    size, a rejection may be due to the spread. A domain that scales all of an item's deltas is an effect here.
    """
    check_at_least(n_permutations, 1, "n_permutations")
    values = sample_last(delta, name="delta")
    check_no_missing(values, "delta")
    names, codes, sizes = _labels(domain, len(values))
    shape = values.shape[1:]
    flat = (values - values.mean(-1, keepdims=True)).reshape(len(values), -1)
    flat = flat - flat.mean(0)
    indicator = np.eye(len(names))[codes].T / np.sqrt(sizes)[:, None]  # [domain, item]: squares then weigh by n_d
    between = ((indicator @ flat) ** 2).sum(0)
    total = (flat**2).sum(0)

    rng = derive_rng(seed, "domain_effect")
    chunk = max(1, _CELLS_AT_ONCE // max(len(names) * max(flat.shape), 1))
    extreme, extreme_global = np.zeros(flat.shape[1]), 0
    for start in range(0, n_permutations, chunk):
        count = min(chunk, n_permutations - start)
        order = rng.permuted(np.tile(np.arange(len(flat)), (count, 1)), axis=1)
        drawn = indicator.T[order].transpose(0, 2, 1).reshape(-1, len(flat)) @ flat  # (permutation * domain, cell)
        null = (drawn**2).reshape(count, len(names), -1).sum(1)
        extreme += (null >= between * (1 - _TIE)).sum(0)
        extreme_global += int((null.sum(-1) >= between.sum() * (1 - _TIE)).sum())
    p = ((1 + extreme) / (1 + n_permutations)).reshape(shape)
    contrast = (indicator @ flat / np.sqrt(sizes)[:, None]).reshape(-1, *shape)
    eta = np.where(total > 0, between / np.where(total > 0, total, 1), 0).reshape(shape)
    global_p = (1 + extreme_global) / (1 + n_permutations)
    return DomainEffect(
        between.reshape(shape), eta, p, adjust_p(p, method=method), contrast, global_p, names, n_permutations
    )


def _labels(domain: ArrayLike, n_items: int) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64]]:
    labels = np.asarray(domain)
    names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if labels.shape != (n_items,) or len(names) < 2 or sizes.min() < 2:
        counts = dict(zip(map(str, names), sizes.tolist()))
        raise DataError(
            f"domain labels of shape {labels.shape} for {n_items} items, counts {counts}",
            "one label per item, and at least two domains of at least two items each",
            "Add items of another domain, or drop the domains with a single item.",
        )
    return tuple(map(str, names)), codes, sizes


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
