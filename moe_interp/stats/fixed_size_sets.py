"""Random sets of a fixed size in which each member has a given chance: how often are two of them together?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moe_interp.checks import check_whole
from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray

_STEPS, _CLOSE = 60, 1e-10
_LARGEST_STEP = 2.0  # of a log-odds in one step of Newton's


def pair_inclusion(inclusion: ArrayLike, size: int) -> FloatArray:
    """Chance that two members are both in a random set of ``size``, given how often each is, and nothing else.

    Of all distributions over sets S of k members with P(i in S) = pi_i, that of maximum entropy: P(S) proportional to
    the product of the members' odds (conditional Poisson sampling). The odds are found by Newton's method; sums over
    sets are coefficients of prod_i (1 - p_i + p_i z), read off by a discrete Fourier transform.

    Args:
        inclusion: ``[member]`` pi from 0 to 1, of sum k.
        size: k, members of a set.

    Returns:
        ``[member, other]`` P(i and j in S), symmetric; pi on the diagonal, rows sum to k pi_i.

    Raises:
        DataError: chances outside [0, 1], or of another sum than k.

    Source: Hajek (1964); Chen, Dempster & Liu (1994). What it does not show: the pairs of other draws of
    fixed size, such as the k largest of independent noisy scores, which differ slightly.
    """
    pi = np.asarray(inclusion, dtype=np.float64)
    k = check_whole(size, "size", 0, error=DataError)
    if pi.ndim != 1 or not ((pi >= 0) & (pi <= 1)).all() or abs(pi.sum() - k) > 1e-6 * max(k, 1):
        raise DataError(
            f"chances of shape {pi.shape} and sum {pi.sum():g}", f"of sum {k}, each from 0 to 1", "Check k."
        )
    both = np.outer(pi, pi)  # right where either is always or never there
    free = np.flatnonzero((pi > 0) & (pi < 1))
    if len(free):
        both[np.ix_(free, free)] = _free_pairs(pi[free], k - int((pi == 1).sum()))
    np.fill_diagonal(both, pi)
    return np.asarray((both + both.T) / 2)


def _free_pairs(pi: FloatArray, k: int) -> FloatArray:
    n = len(pi)
    points = n + 1 + n % 2  # odd, so that -1 is none of them and no factor is 0
    z = np.exp(2j * np.pi * np.arange(points) / points)[:, None]
    log_odds = np.log(pi) - np.log1p(-pi)
    pairs = np.outer(pi, pi)
    for _ in range(_STEPS):
        log_odds = log_odds + _shift(log_odds, k)
        p = 1 / (1 + np.exp(-log_odds))
        factor = 1 - p + p * z
        weight = np.exp(np.log(factor).sum(axis=1)) * z[:, 0] ** -k
        member = p * z / factor
        weight = weight / weight.sum()
        found = (weight @ member).real
        pairs = (member.T @ (weight[:, None] * member)).real
        np.fill_diagonal(pairs, found)
        off = pi - found
        if np.abs(off).max() < _CLOSE:
            break
        covariance = pairs - np.outer(found, found)
        # odds count up to a factor: the direction of equal change is fixed
        step = np.linalg.lstsq(covariance + covariance.trace() / n**2, off, rcond=None)[0]
        log_odds = log_odds + step * min(1.0, _LARGEST_STEP / max(float(np.abs(step).max()), 1e-300))
    return pairs


def _shift(log_odds: FloatArray, k: int) -> float:
    """What to add to all, so that independent members would be k on average."""
    low, high = -60.0 - float(log_odds.max()), 60.0 - float(log_odds.min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / (1 + np.exp(-log_odds - middle))).sum() < k else (low, middle)
    return (low + high) / 2
