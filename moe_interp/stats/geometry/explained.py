"""How much of the similarity of routes follows from something else, and cannot be said to be the router's choice."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moe_interp.stats.checks import FloatArray
from moe_interp.stats.geometry.pairs import pair_interval, share_of_sums
from moe_interp.stats.intervals.means import Interval


def explained_share(
    similarity: ArrayLike, predicted: ArrayLike, first: ArrayLike, second: ArrayLike, *, n_units: int
) -> Interval:
    """The share of the variance of route similarity that a prediction reproduces: ``cov(s, g) / var(s)`` over pairs.

    ``s`` is the similarity of the routes that were taken, ``g`` that of predicted routes for the same pairs, in the
    same measure. Where the routes are those that are predicted, ``g = s`` and the share is exactly 1; where they are
    independent of what the prediction is made from, the covariance is 0 in expectation, and so is the share. It is the
    slope of ``g`` on ``s``: of a difference in route similarity, the part that the prediction has as well. Where ``g``
    is that of random routers, drawn like the one that took the routes, it is the share of the variance that all routers
    on these states have in common, cov(s, g) = var(E[s | states]).

    Args:
        similarity: ``[..., pair]``.
        predicted: The same shape; the mean over several predictions gives the mean of their shares.
        first, second: ``[pair]``, the units (sequences) of each pair.
        n_units: How many units there are.

    Returns:
        Estimate and interval over units; NaN where ``similarity`` is constant.

    Source: derived. What it does not show: a cause. A share below 1 is no evidence of a choice beyond the states; the
    prediction may be a poor one.
    """
    s, g = np.broadcast_arrays(np.asarray(similarity, dtype=np.float64), np.asarray(predicted, dtype=np.float64))
    return pair_interval([s, g, s * s, s * g], first, second, share_of_sums, n_units=n_units)


def common_share(similarities: FloatArray) -> FloatArray:
    """The mean over routers ``[router, ..., pair]`` of ``cov(s_r, mean of the others) / var(s_r)``.

    It is what :func:`explained_share` by these routers would be for one more of them. NaN with a single one, or where
    no router's similarity varies.
    """
    n = len(similarities)
    if n < 2:
        return np.full(similarities.shape[1:-1], np.nan)
    centred = similarities - similarities.mean(-1, keepdims=True)
    others = (centred.sum(0) - centred) / (n - 1)
    variance, together = (centred**2).mean(-1), (centred * others).mean(-1)
    usable = variance > 1e-13 * (similarities**2).mean(-1)
    share = np.where(usable, together / np.where(usable, variance, 1), 0.0)
    return np.where(usable.any(0), share.sum(0) / np.maximum(usable.sum(0), 1), np.nan)
