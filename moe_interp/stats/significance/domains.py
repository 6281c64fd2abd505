"""Specialization between domains: a test per (layer, expert) and one of all, which unequal spread does not mislead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_no_missing, sample_last
from moe_interp.stats.intervals.verdicts import FEWEST_UNITS
from moe_interp.stats.random_generators import derive_rng
from moe_interp.stats.significance.multiple import adjust_p

_CELLS_AT_ONCE = 300_000  # few enough for the processor's cache
_TIE = 1e-9  # relative; equal statistics computed in different orders must count as equal
_NO_SPREAD = 1e-12  # of a cell's total sum of squares: less than this within a domain is rounding
WIDER = 1.5  # times the spread of the narrowest domain
ITEMS_IF_WIDER = 10


@dataclass(frozen=True)
class DomainEffect:
    """Result of :func:`domain_effect`.

    Attributes:
        statistic: Welch's F between domains, ``[layer, expert]``; NaN where it is not testable.
        eta_squared: The between-domain share of the total sum of squares, in [0, 1]; optimistic, also with no effect.
        p_value, q_value: Per (layer, expert), and adjusted over all of them that are testable. NaN where a domain has
            no spread although others have; 1 where nothing varies at all.
        contrast: Domain mean of centred delta minus the mean over all items, ``[domain, layer, expert]``.
        global_p: One test over layers and experts.
        domains: Labels in the order of ``contrast``.
        spread: Root mean variance of centred delta over layers and experts, per domain.
        n_items: Items per domain.
        too_few: Domains with too few items for a verdict in words: fewer than 6, or fewer than 10 where the spread is
            more than 1.5 times that of the narrowest domain.
    """

    statistic: FloatArray
    eta_squared: FloatArray
    p_value: FloatArray
    q_value: FloatArray
    contrast: FloatArray
    global_p: float
    domains: tuple[str, ...]
    n_permutations: int
    spread: tuple[float, ...] = ()
    n_items: tuple[int, ...] = ()
    too_few: tuple[str, ...] = ()


def domain_effect(
    delta: ArrayLike, domain: ArrayLike, *, n_permutations: int = 9999, method: str = "bh", seed: int = 0
) -> DomainEffect:
    """Does an expert help some domains more than others, beyond domains being more or less fragile as a whole?

    delta is centred per item (and layer) over experts, which removes the main effect of the domain. Each (layer,
    expert) is tested by W = sum_d w_d (mean_d - mean_w)^2 with w_d = n_d / variance_d and mean_w the mean weighted by
    them; p is the larger of the permutation p of W, (1 + #{W* >= W}) / (1 + B), and that of Welch's F, where the
    variance of a domain 1.5 times wider than the narrowest is raised by the share 4 / n_d.

    ``global_p`` is the permutation p of sum_{d<e} b_de |mean_d - mean_e|^2 over all layers and experts, divided by its
    standard error. Products of an item with itself are left out, so that the sum's expectation is 0 without an effect,
    whatever the spread and the law. b_de = v_d v_e / sum v, v_d = n_d over the domain's total variance. The items'
    labels are permuted jointly over all layers and experts.

    Args:
        delta: ``[item, layer, expert]`` or ``[item, expert]``, nats, complete; positive = better than the baseline.
        domain: Label of each item, ``[item]``; at least two domains of at least two items.
        n_permutations: B; the smallest p is 1 / (1 + B), so BH over m tests wants B well above m / alpha.

    Raises:
        DataError: One domain only, a domain with a single item, labels that do not match, or missing values.

    Source: Welch (1951); Chung & Romano (2013) for permuting a studentised statistic; Chen & Qin (2010) for the global
    statistic, here for several groups and studentised. Exact where centred deltas have one law in all domains, and
    asymptotically valid where only their means agree; levels by simulation in docs/stats-coverage.md. A domain that
    scales all of an item's deltas about a mean that is not 0 is an effect here.
    """
    check_at_least(n_permutations, 1, "n_permutations")
    values = sample_last(delta, name="delta")
    check_no_missing(values, "delta")
    names, codes, sizes = _labels(domain, len(values))
    shape = values.shape[1:]
    flat = (values - values.mean(-1, keepdims=True)).reshape(len(values), -1)
    flat = flat - flat.mean(0)
    indicator = np.eye(len(names))[codes]  # [item, domain]
    total = (flat**2).sum(0)
    sums = indicator.T @ flat
    within = indicator.T @ flat**2 - sums**2 / sizes[:, None]
    is_flat = within <= _NO_SPREAD * total
    testable = ~is_flat.any(0)
    p, overall = _permutation_p(flat, indicator, sizes, n_permutations, seed)
    spread = np.sqrt((np.maximum(within, 0) / (sizes[:, None] - 1)).mean(1))
    f, parametric = _welch_f(sums, np.where(is_flat, 1, within), sizes, spread > WIDER * spread.min())
    p = np.where(testable, np.maximum(p, parametric), np.where(total > 0, np.nan, 1.0)).reshape(shape)
    eta = np.where(total > 0, (sums**2 / sizes[:, None]).sum(0) / np.where(total > 0, total, 1), 0)
    needed = np.where(spread > WIDER * spread.min(), ITEMS_IF_WIDER, FEWEST_UNITS)
    return DomainEffect(
        statistic=np.where(testable, f, np.nan).reshape(shape),
        eta_squared=eta.reshape(shape),
        p_value=p,
        q_value=adjust_p(p, method=method),
        contrast=(sums / sizes[:, None]).reshape(-1, *shape),
        global_p=overall,
        domains=names,
        n_permutations=n_permutations,
        spread=tuple(spread.tolist()),
        n_items=tuple(sizes.tolist()),
        too_few=tuple(name for name, n, enough in zip(names, sizes, needed) if n < enough),
    )


def _permutation_p(
    flat: FloatArray, indicator: FloatArray, sizes: NDArray[np.int64], n_permutations: int, seed: int
) -> tuple[FloatArray, float]:
    """p per cell and of all cells; ``flat`` is [item, cell] with means 0."""
    squares = (flat @ flat.T) ** 2
    own = (flat**2).sum(1)
    raised = flat**2
    total = raised.sum(0)

    def statistics(labels: FloatArray) -> tuple[FloatArray, FloatArray]:
        """``labels`` [draw, domain, item] -> W [draw, cell], global statistic [draw]."""
        # the last domain holds what the others leave; flat sums to 0
        sums, raw = np.empty((2, *labels.shape[:2], flat.shape[1]))
        rows = labels[:, :-1].reshape(-1, len(flat))
        for into, values in ((sums, flat), (raw, raised)):
            into[:, :-1] = (rows @ values).reshape(len(labels), -1, flat.shape[1])
        sums[:, -1], raw[:, -1] = -sums[:, :-1].sum(1), total - raw[:, :-1].sum(1)
        return _studentised(sums, raw, sizes), _overall(labels, sums, own, squares, sizes)

    observed, whole = statistics(indicator.T[None])
    rng = derive_rng(seed, "domain_effect")
    chunk = max(1, _CELLS_AT_ONCE // (2 * len(sizes) * max(flat.shape)))
    extreme, extreme_whole = np.zeros(flat.shape[1]), 0
    for start in range(0, n_permutations, chunk):
        count = min(chunk, n_permutations - start)
        order = rng.permuted(np.tile(np.arange(len(flat)), (count, 1)), axis=1)
        null, null_whole = statistics(np.ascontiguousarray(indicator[order].transpose(0, 2, 1)))
        extreme += (null >= observed * (1 - _TIE)).sum(0)
        extreme_whole += int((null_whole >= whole - _TIE * np.abs(whole)).sum())
    return (1 + extreme) / (1 + n_permutations), (1 + extreme_whole) / (1 + n_permutations)


def _studentised(sums: FloatArray, raw: FloatArray, sizes: NDArray[np.int64]) -> FloatArray:
    """W from sums and sums of squares, ``[..., domain, cell]``."""
    n = sizes[:, None].astype(float)
    square = sums * sums
    square /= n
    total = raw.sum(-2, keepdims=True)
    scale = raw - square
    np.maximum(scale, np.where(total > 0, _NO_SPREAD * total, 1), out=scale)
    np.divide(n - 1, scale, out=scale)
    square *= scale
    return np.asarray(square.sum(-2) - (sums * scale).sum(-2) ** 2 / (n * scale).sum(-2))


def _overall(
    labels: FloatArray, sums: FloatArray, own: FloatArray, squares: FloatArray, sizes: NDArray[np.int64]
) -> FloatArray:
    """The studentised sum over cells, ``[draw]``: U-statistics of products of different items over their error."""
    n = sizes.astype(float)
    pairs = n[:, None] * n - np.diag(n)
    # [draw, domain, domain]: mean product of an item of one domain and another item of the other, and of its square
    eye = np.eye(len(n))
    product = (sums @ sums.transpose(0, 2, 1) - (labels @ own)[..., None] * eye) / pairs
    square = ((labels.reshape(-1, len(own)) @ squares).reshape(labels.shape) @ labels.transpose(0, 2, 1)) - (
        labels @ np.diag(squares)
    )[..., None] * eye
    variance = labels @ own / n - np.diagonal(product, axis1=1, axis2=2)
    mean = float(own.mean())
    weight = n / np.maximum(variance, _NO_SPREAD * mean if mean > 0 else 1)
    share = weight / weight.sum(-1, keepdims=True)
    # signed weight of each pair of domains; the diagonal is sum_{e != d} b_de, and rows sum to 0
    b = eye * weight[..., None] - weight[..., None] * share[:, None]
    error = np.sqrt(2 * (b**2 * square / pairs**2).sum((-2, -1)))
    return np.asarray((b * product).sum((-2, -1)) / np.where(error > 0, error, 1))


def _welch_f(
    sums: FloatArray, within: FloatArray, sizes: NDArray[np.int64], is_wider: NDArray[np.bool_]
) -> tuple[FloatArray, FloatArray]:
    """Welch's F, and its p with the variances of wider domains raised by 4 / n, against skew; ``[cell]``."""
    n, k = sizes[:, None].astype(float), len(sizes)
    mean, found = sums / n, []
    for raised in (1.0, 1 + 4 / n * is_wider[:, None]):
        weight = n * (n - 1) / (within * raised)
        share = weight / weight.sum(0)
        excess = ((1 - share) ** 2 / (n - 1)).sum(0)
        between = (weight * (mean - (share * mean).sum(0)) ** 2).sum(0) / (k - 1)
        found.append(between / (1 + 2 * (k - 2) / (k**2 - 1) * excess))
    return found[0], np.asarray(scipy_stats.f.sf(found[1], k - 1, (k**2 - 1) / (3 * excess)))


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
