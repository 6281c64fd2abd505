"""A rank correlation over experts, corrected for the noise of means over items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import factorial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_probability
from moe_interp.stats.correlation import mean_rho_permutation
from moe_interp.stats.halves import (
    complete_items,
    experts_differ,
    experts_first,
    half_ranks,
    random_halves,
    unit_ranks,
)
from moe_interp.stats.intervals.verdicts import decide
from moe_interp.stats.random_generators import derive_rng
from moe_interp.stats.reliability import expected_spearman, latent_pearson, spearman_brown

# Item weights of a resample are 1 - SPREAD or 1 + SPREAD. Multinomial weights (spread 1) would double the noise of the
# means, and with it the very unreliability that is corrected for; the spread of the estimates is scaled back.
SPREAD = 0.75
SPLITS_PER_RESAMPLE = 25
CORRECTED_COVERS = 0.93  # by an interval at .95 from 8 items on, at the least (docs/stats-coverage.md)


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CorrectedCorrelation:
    """Result of :func:`corrected_correlation`.

    Attributes:
        corrected: Correlation of the expectations, with its interval; NaN where the data are too noisy.
        raw: Mean Spearman correlation between the means over all items, not corrected.
        reliability_x, reliability_y: Of the means over all items, on the scale of a Pearson correlation.
        p_value: Permutation test of the mean rho between the means (:func:`mean_rho_permutation`): are experts more
            in line than exchangeable ones would be?
        too_noisy: Whether the lower bound of a reliability is below the floor.
        verdict: One plain sentence.
        n_items: Items per domain.
        p_crossed: The test that the verdict asks for: the same of the correlation between different halves, which noise
            common to x and y in an item does not move, with experts permuted one way for all layers, so that layers
            whose experts are alike count as what they are.
    """

    corrected: Estimate
    raw: Estimate
    reliability_x: Estimate
    reliability_y: Estimate
    p_value: float
    too_noisy: bool
    verdict: str
    n_items: tuple[int, ...]
    p_crossed: float = float("nan")


def corrected_correlation(
    x: ArrayLike | Sequence[ArrayLike],
    y: ArrayLike | Sequence[ArrayLike],
    *,
    level: float = 0.95,
    floor: float = 0.2,
    n_splits: int = 100,
    n_resamples: int = 200,
    n_permutations: int = 1999,
    seed: int = 0,
) -> CorrectedCorrelation:
    """Spearman correlation over experts between the **expectations** of ``x`` and ``y``, pooled over layers.

    The items are cut at random into halves A and B, ``n_splits`` times. With rho the Spearman correlation over experts,
    averaged over splits, layers and domains::

        c = mean rho(x_A, y_B), rho(x_B, y_A)      rx = mean rho(x_A, x_B)      ry = mean rho(y_A, y_B)
        corrected = g(f(c) / sqrt(f(rx) f(ry)))

    Different halves keep noise that x and y share in an item out of c. g is :func:`expected_spearman`, f its inverse:
    noise attenuates Pearson correlations by sqrt(rx ry), not rank correlations of few experts.

    Interval: items are reweighted by 1 +- .75 (half of them up, half down) within each domain, all layers together, in
    ``n_resamples`` / 2 antithetic pairs, and the whole procedure is rerun. The odd part of the changes counts noise x
    noise terms twice, the even part once, though with the roughness of ranks: three quarters of it are taken
    off, a share set by simulation (docs/stats-coverage.md). Added is that noise blurs close ranks most, so that the
    correction finds the expectations' metric correlation, from which that of their ranks differs by chance.

    Args:
        x: For instance routing probabilities, ``[item, layer, expert]``, or one such array per domain.
        y: For instance deltas (nats), the same shapes. Complete; at least 8 items per domain and 4 experts.
        floor: Where the lower bound of either reliability is below it, no corrected number is given.

    Returns:
        The corrected and the raw correlation with intervals, both reliabilities, and a verdict in words.

    Raises:
        DataError: Shapes that differ, missing values, too few items or experts, or no layer in which experts differ.

    Source: Spearman (1904) for the correction; the rest is derived. The unit of inference is the item: the interval is
    for these experts and layers, and a few experts are correlated by chance, so that the verdict asks for the
    permutation test (p_crossed) as well. Where noise differs much between experts, the correction is rough.
    """
    check_probability(level, "level")
    check_probability(floor, "floor")
    check_at_least(n_splits, SPLITS_PER_RESAMPLE, "n_splits")
    check_at_least(n_resamples, 20, "n_resamples")
    domains = _domains(x, y, n_splits, seed)
    n_experts = domains[0].n_experts
    base = _correlations(domains, np.arange(n_splits))
    rng = derive_rng(seed, "item_weights")
    odd, even = [], []
    for pair in range(n_resamples // 2):
        splits = (np.arange(SPLITS_PER_RESAMPLE) + SPLITS_PER_RESAMPLE * pair) % n_splits
        signs = [rng.permutation(np.arange(domain.n_items) % 2 * 2 - 1) for domain in domains]
        up, down = (
            _scores(_correlations(domains, splits, [1 + way * SPREAD * s for s in signs]), n_experts) for way in (1, -1)
        )
        odd.append((up - down) / (2 * SPREAD))
        even.append(((up + down) / 2 - _scores(base[:, splits], n_experts)) / SPREAD**2)
    sizes = tuple(domain.n_items for domain in domains)
    sd = _standard_errors(np.array(odd), np.array(even), min(sizes))
    n_layers = sum(len(domain.x) // n_experts for domain in domains)
    center = _scores(base, n_experts)
    sd[0] = np.hypot(sd[0], _rank_error(center, n_layers, n_experts))
    # the standard errors are uncertain through the number of items and through that of resamples
    freedom = 1 / (1 / (sum(sizes) - len(sizes)) + 1 / len(odd))
    half_width = scipy_stats.t.ppf((1 + level) / 2, freedom) * sd
    means_x, means_y = (np.stack(sides) for sides in zip(*(domain.means for domain in domains)))
    p = float(mean_rho_permutation(means_x, means_y, n_permutations=n_permutations, seed=seed)[1].p_value)
    crossed = _crossed_p(domains, n_permutations, seed)
    return _result(center, half_width, n_experts, floor, sizes, p, crossed, level)


@dataclass(frozen=True)
class _Domain:
    """One domain's x and y as ``[expert * layer, item]``, their means ``[layer, expert]``, halves ``[split, item]``."""

    x: FloatArray
    y: FloatArray
    means: tuple[FloatArray, FloatArray]
    halves: NDArray[np.bool_]

    @property
    def n_items(self) -> int:
        return self.x.shape[-1]

    @property
    def n_experts(self) -> int:
        return self.means[0].shape[-1]


def _domains(
    x: ArrayLike | Sequence[ArrayLike], y: ArrayLike | Sequence[ArrayLike], n_splits: int, seed: int
) -> list[_Domain]:
    xs, ys = (list(side) if isinstance(side, (list, tuple)) else [side] for side in (x, y))
    if len(xs) != len(ys) or not xs:
        raise DataError(f"x has {len(xs)} domains and y {len(ys)}", "as many", "Pass one array of each per domain.")
    domains = []
    for index, (one, other) in enumerate(zip(xs, ys)):
        a, b = complete_items(one, "x", 8), complete_items(other, "y", 8)
        if a.shape != b.shape or a.ndim != 3 or a.shape[-1] < 4:
            raise DataError(
                f"x has shape {a.shape} and y {b.shape}",
                "the same shape [item, layer, expert] with at least 4 experts",
                "Pass one array per domain, or one for all items, with the same items in x and y.",
            )
        usable = experts_differ(a) & experts_differ(b)
        halves = random_halves(len(a), n_splits, derive_rng(seed, "halves", index))
        flat_x, flat_y = experts_first(a[:, usable]), experts_first(b[:, usable])
        domains.append(_Domain(flat_x, flat_y, (a.mean(0), b.mean(0)), halves))
    shapes = {domain.means[0].shape for domain in domains}
    if len(shapes) != 1 or all(domain.x.size == 0 for domain in domains):
        raise DataError(
            f"layers and experts {sorted(shapes)}, "
            f"layers in which experts differ {[len(domain.x) // domain.n_experts for domain in domains]}",
            "the same layers and experts in every domain, and a layer in which experts differ",
            "Leave out the layers or domains without any difference between experts.",
        )
    return [domain for domain in domains if domain.x.size]


def _correlations(
    domains: list[_Domain], splits: NDArray[np.int64], weights: list[NDArray[np.float64]] | None = None
) -> FloatArray:
    """Means over layers and domains of rho(x_A, y_B), rho(x_A, x_B), rho(y_A, y_B) and rho(x, y), ``[4, split]``."""
    parts = []
    for index, domain in enumerate(domains):
        weight = np.ones(domain.n_items) if weights is None else weights[index]
        x, y = (half_ranks(side, domain.n_experts, domain.halves[splits], weight) for side in (domain.x, domain.y))
        whole = [unit_ranks((side @ weight).reshape(domain.n_experts, -1)) for side in (domain.x, domain.y)]
        raw = np.broadcast_to((whole[0] * whole[1]).sum(0)[:, None], x.shape[1::2])
        crossed = ((x[:, :, 0] * y[:, :, 1]).sum(0) + (x[:, :, 1] * y[:, :, 0]).sum(0)) / 2
        parts.append([crossed, (x[:, :, 0] * x[:, :, 1]).sum(0), (y[:, :, 0] * y[:, :, 1]).sum(0), raw])
    return np.concatenate(parts, axis=1).mean(1)


def _crossed_p(domains: list[_Domain], n_permutations: int, seed: int) -> float:
    """Permutation p of the mean over splits of rho(x_A, y_B) and rho(x_B, y_A), summed over layers and domains.

    Experts are permuted alike in all layers and domains. Halves of different items share no noise, but noise that x and
    y share makes x_i y_j and x_j y_i vary together, which permuted experts do not: their covariance is estimated from
    the items and the observed sum is scaled down by what it adds to the variance.
    """
    n_experts = domains[0].n_experts
    matrix, shared = np.zeros((n_experts, n_experts)), 0.0
    for domain in domains:
        even = np.ones(domain.n_items)
        x, y = (half_ranks(side, n_experts, domain.halves, even) for side in (domain.x, domain.y))
        for a, b in ((0, 1), (1, 0)):
            matrix += np.einsum("kls,mls->km", x[:, :, a], y[:, :, b], optimize=True) / (2 * len(domain.halves))
        shared += _shared_noise(domain)
    rows = np.arange(n_experts)
    if factorial(n_experts) <= n_permutations:
        orders, exact = np.array(list(permutations(range(n_experts)))), True
    else:
        rng = derive_rng(seed, "crossed_permutation")
        orders, exact = rng.permuted(np.tile(rows, (n_permutations, 1)), axis=1), False
    null = matrix[rows, orders].sum(1)
    variance = float((null**2).mean())
    observed = abs(float(np.trace(matrix)))
    observed *= np.sqrt(variance / (variance + shared)) if variance > 0 else 1.0
    extreme = int((np.abs(null) >= observed * (1 - 1e-9)).sum())
    return extreme / len(orders) if exact else (1 + extreme) / (1 + len(orders))


def _shared_noise(domain: _Domain) -> float:
    """Variance that noise common to x and y adds to the sum over layers of correlations between different items:
    sum over i != j of g_ij g_ji / (n (n - 1))^2, g_ij the product of the noise of item i in x and of item j in y, each
    on the scale of its layer's mean profile."""
    n, noise = domain.n_items, []
    for side in (domain.x, domain.y):
        profile = side.reshape(domain.n_experts, -1, n)
        profile = profile - profile.mean(0)
        mean = profile.mean(-1, keepdims=True)
        norm = np.sqrt((mean**2).sum(0, keepdims=True))
        noise.append(((profile - mean) / np.where(norm > 0, norm, np.inf)).reshape(-1, n))
    g = noise[0].T @ noise[1]
    return max(0.0, float((g * g.T).sum() - (np.diag(g) ** 2).sum()) / (n * (n - 1)) ** 2)


def _scores(correlations: FloatArray, n_experts: int) -> FloatArray:
    """Averages over splits on scales fit for a symmetric interval: latent corrected, logit of both latent half
    reliabilities, raw."""
    crossed, rx, ry = latent_pearson(correlations[:3].mean(-1), n_experts)
    rx, ry = np.clip([rx, ry], 1e-3, 1 - 1e-3)
    return np.array([crossed / np.sqrt(rx * ry), special.logit(rx), special.logit(ry), correlations[3].mean()])


def _standard_errors(odd: FloatArray, even: FloatArray, n: int) -> FloatArray:
    """Standard errors of :func:`_scores` from the odd and even parts of their changes, ``[pair, 4]``."""
    first = (odd**2).mean(0) * (n - 1) / n  # balanced signs are correlated by -1 / (n - 1)
    second = even.var(0)
    # noise x noise terms carry at most all of the variance, and then the odd part holds twice it
    variance = np.maximum(first - 0.75 * second, first / 2)
    variance[1:3] = first[1:3]  # on the logit scale the odd part alone is right
    half = n // 2
    return np.sqrt(variance * half / (half - 1))


def _rank_error(center: FloatArray, n_layers: int, n_experts: int) -> float:
    """Spread of Spearman about Pearson over all layers, on the latent scale, as far as noise blurs the ranks.

    For normal laws the two are correlated by 3 / pi, with variance 1 / (n_experts - 1) each. The blur grows with the
    sd of the noise and is complete well before ranks are lost (by simulation, within a tenth).
    """
    blur = min(1.0, 1.5 * np.sqrt(1 - special.expit(center[1:3]).prod() ** 0.5))
    slope = float(expected_spearman(0.01, n_experts)) / 0.01
    return blur * np.sqrt(2 * (1 - 3 / np.pi) / ((n_experts - 1) * n_layers)) / slope


def _result(
    center: FloatArray,
    half_width: FloatArray,
    n_experts: int,
    floor: float,
    sizes: tuple[int, ...],
    p: float,
    crossed: float,
    level: float,
) -> CorrectedCorrelation:
    bounds = np.stack([center, center - half_width, center + half_width], axis=-1)
    rx, ry = (Estimate(*map(float, spearman_brown(special.expit(row)))) for row in bounds[1:3])
    raw = Estimate(*map(float, np.clip(bounds[3], -1, 1)))
    corrected = Estimate(*map(float, expected_spearman(np.clip(bounds[0], -1, 1), n_experts)))
    noisy = [name for name, r in (("x", rx), ("y", ry)) if r.low < floor]
    if noisy:
        verdict = (
            f"too noisy: the reliability of {' and of '.join(noisy)} may be below {floor:g} "
            f"(x {rx.value:.2f}, lower bound {rx.low:.2f}; y {ry.value:.2f}, lower bound {ry.low:.2f})"
        )
        corrected = Estimate(float("nan"), float("nan"), float("nan"))
    else:
        found = decide(
            corrected.low, corrected.high, n=min(sizes), coverage=CORRECTED_COVERS, p=crossed, alpha=1 - level
        )
        sign = {"above": "positive", "below": "negative"}.get(found, "no")
        chance = "" if crossed <= 1 - level else ", within what exchangeable experts show by chance"
        verdict = (
            f"{sign} correlation: {corrected.value:.2f}, "
            f"interval {corrected.low:.2f} to {corrected.high:.2f}, p {crossed:.2g}{chance}"
        )
    return CorrectedCorrelation(corrected, raw, rx, ry, p, bool(noisy), verdict, sizes, crossed)
