"""Random halves of the items, and the ranks of experts by their means over each half."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_no_missing, sample_last


def complete_items(x: ArrayLike, name: str, n_min: int = 4) -> FloatArray:
    """``x`` as float64 ``[item, ..., expert]``; refuse missing values and arrays too small to be cut in halves."""
    values = sample_last(x, name=name)
    check_no_missing(values, name)
    if values.ndim < 2 or len(values) < n_min or values.shape[-1] < 3:
        raise DataError(
            f"{name} has shape {values.shape}",
            f"[item, ..., expert] with at least {n_min} items and 3 experts",
            "Add items: a half needs some to average over.",
        )
    return values


def experts_differ(stack: FloatArray) -> NDArray[np.bool_]:
    """Layers of ``[item, layer, expert]`` in which experts differ in some item."""
    return np.asarray((np.ptp(stack, axis=-1) > 0).any(0))


def experts_first(stack: FloatArray) -> FloatArray:
    """``[expert * layer, item]``: means over items are then one matrix product."""
    # (item, layer, expert) -> (expert, layer, item) -> (expert * layer, item)
    return np.ascontiguousarray(stack.transpose(2, 1, 0)).reshape(-1, len(stack))


def random_halves(n: int, n_splits: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """``[split, item]``: which items are in the first half, n // 2 of them."""
    first = np.zeros((n_splits, n), dtype=bool)
    first[:, : n // 2] = True
    return rng.permuted(first, axis=1)


def half_ranks(flat: FloatArray, n_experts: int, halves: NDArray[np.bool_], weights: FloatArray) -> FloatArray:
    """Unit rank vectors of the weighted means of both halves, ``[expert, layer, half, split]``."""
    sides = np.stack([halves, ~halves]) * weights
    sides /= sides.sum(-1, keepdims=True)
    means = flat @ sides.reshape(-1, sides.shape[-1]).T
    return unit_ranks(means.reshape(n_experts, -1)).reshape(n_experts, -1, 2, len(halves))


def unit_ranks(values: FloatArray) -> FloatArray:
    """Centred average ranks along the first axis, scaled to length one; zeros where all are equal."""
    if len(values) > 64:
        ranks = scipy_stats.rankdata(values, axis=0)
    else:  # counting those below and those not above is as fast as sorting, and gives ties their average
        below = (values[:, None] > values).sum(1, dtype=np.uint8)
        ranks = (below + (values[:, None] >= values).sum(1, dtype=np.uint8)) / 2
    ranks -= ranks.mean(0)
    norm = np.sqrt((ranks * ranks).sum(0))
    return np.asarray(ranks / np.where(norm > 0, norm, 1))
