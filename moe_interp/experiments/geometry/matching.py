"""Which expert of one model is compared with which of another: experts of two models have no natural correspondence."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats.checks import FloatArray

Matching = Literal["identity", "rank", "usage"]
IntArray = NDArray[np.int64]


def check_matching(matching: str) -> None:
    """Refuse an unknown way of matching.

    Raises:
        ConfigError: it is.
    """
    if matching not in get_args(Matching):
        expected = "'identity' (the same expert: runs of one model), 'rank' or 'usage'"
        raise ConfigError(f"matching={matching!r}", expected, "Say how experts of two models are matched.")


def match_experts(a: FloatArray, b: FloatArray, matching: Matching) -> IntArray:
    """``[expert of b]`` the expert of ``a`` that it is compared with, or -1.

    "identity": the same number. "rank": the experts of the same rank by total use. "usage": the assignment that makes
    the shared use ``sum over questions of min(a, b)`` largest (Hungarian algorithm).

    Args:
        a, b: ``[question, expert]`` shares of slots, of the same questions.

    Raises:
        DataError: "identity" for models with different numbers of experts.
    """
    n_a, n_b = a.shape[1], b.shape[1]
    if matching == "identity":
        if n_a != n_b:
            raise DataError(f"traces with {n_a} and {n_b} experts", "one number", "Match by rank or by usage.")
        return np.arange(n_b)
    found = np.full(n_b, -1)
    if matching == "rank":
        order_a, order_b = (np.argsort(-side.sum(0), kind="stable") for side in (a, b))
        n = min(n_a, n_b)
        found[order_b[:n]] = order_a[:n]
        return found
    together = np.stack([np.minimum(a[:, [e]], b).sum(0) for e in range(n_a)])  # [expert of a, expert of b]
    rows, columns = linear_sum_assignment(together, maximize=True)
    found[columns] = rows
    return found


def matched(values: NDArray[np.generic], order: IntArray, n_experts: int) -> NDArray[np.generic]:
    """``[..., expert of b]`` values under the numbers of ``a``'s experts, then those of b without a match."""
    n_free = int((order < 0).sum())
    place = np.where(order >= 0, order, 0)
    place[order < 0] = n_experts + np.arange(n_free)
    moved = np.zeros((*values.shape[:-1], n_experts + n_free), dtype=values.dtype)
    moved[..., place] = values
    return moved
