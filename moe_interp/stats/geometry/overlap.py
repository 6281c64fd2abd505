"""Sets of experts that carry most of the mass, how far two of them overlap, and how far by chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_share, real_numbers

BoolArray = NDArray[np.bool_]


def smallest_sets(mass: ArrayLike, p: float = 0.8) -> BoolArray:
    """The smallest sets of experts that hold at least a share ``p`` of the mass, taken from the largest down.

    Equal masses are taken in the order of their index, so that sets of renamed experts may differ there. A row without
    any mass gives the empty set.

    Args:
        mass: ``[..., expert]``, not negative, such as slots or summed weights.
        p: The share.

    Returns:
        ``[..., expert]`` bool.

    Raises:
        DataError: negative or missing mass.
        ConfigError: ``p`` not above 0, or above 1.

    Source: Jaccard@p of "The Myth of Expert Specialization in MoEs".
    """
    check_share(p, "p")
    values = real_numbers(mass, "mass")
    if values.ndim == 0 or not (values >= 0).all() or np.isinf(values).any():
        raise DataError("mass that is negative, missing or infinite", "numbers of at least 0", "Pass counts.")
    order = np.argsort(-values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1)
    total = ordered.sum(-1, keepdims=True)
    before = np.cumsum(ordered, axis=-1) - ordered
    taken = (before < p * total * (1 - 1e-12)) & (ordered > 0)
    sets = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(sets, order, taken, axis=-1)
    return sets


def jaccard(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """``|A n B| / |A u B|`` along the last axis of boolean sets; NaN where both are empty."""
    left, right = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    both, any_ = (left & right).sum(-1), (left | right).sum(-1)
    return np.where(any_ > 0, both / np.maximum(any_, 1), np.nan)


def expected_jaccard(size_a: ArrayLike, size_b: ArrayLike, n_experts: int) -> FloatArray:
    """The mean Jaccard of two independent uniform sets of these sizes: the overlap is hypergeometric. Exact.

    Raises:
        DataError: sizes that are not whole numbers from 0 to ``n_experts``.
    """
    check_at_least(n_experts, 1, "n_experts")
    one, two = np.broadcast_arrays(np.asarray(size_a), np.asarray(size_b))
    if {one.dtype.kind, two.dtype.kind} - set("iu") or any(((s < 0) | (s > n_experts)).any() for s in (one, two)):
        raise DataError(f"sizes of sets of {n_experts} experts", f"whole numbers from 0 to {n_experts}", "Count sets.")
    table = np.full((n_experts + 1, n_experts + 1), np.nan)
    both = np.arange(n_experts + 1)
    for pair in np.unique(np.stack([one.ravel(), two.ravel()], axis=1), axis=0):
        a, b = int(pair[0]), int(pair[1])
        if a + b:
            chance = scipy_stats.hypergeom.pmf(both, n_experts, a, b)
            table[a, b] = (chance * both / np.maximum(a + b - both, 1)).sum()
    return np.asarray(table[one, two])
