"""Many tests at once: adjusted p-values, and the plan that says beforehand whether anything can be rejected."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray, check_at_least, check_choice, check_probability
from moe_interp.stats.significance.wilcoxon import smallest_attainable_p

METHODS = ("bh", "by", "holm")
# p-values on the exact boundary (35 floor p-values of 896 give q = alpha) must not be lost to rounding
_ROUNDING = 1e-12


def adjust_p(p: ArrayLike, *, method: str = "bh") -> FloatArray:
    """Adjusted p-values over **all** entries of ``p``, whatever its shape.

    With p_(1) <= ... <= p_(m): ``"bh"`` q_(i) = min over j >= i of p_(j) m / j (Benjamini-Hochberg, step-up);
    ``"by"`` the same times sum 1/j (Benjamini-Yekutieli, any dependence); ``"holm"`` the running maximum of
    p_(i) (m - i + 1) (family-wise error). NaN stays NaN and is not counted in m; a p of 1 is counted.

    Raises:
        DataError: A p-value lies outside [0, 1].

    Source: Benjamini & Hochberg (1995), Benjamini & Yekutieli (2001), Holm (1979). BH controls the expected *share* of
    false rejections, under independence or positive dependence; it does not say which rejections are false.
    """
    check_choice(method, METHODS, "method")
    values = np.asarray(p, dtype=np.float64)
    present = ~np.isnan(values)
    kept = values[present]
    if ((kept < 0) | (kept > 1)).any():
        raise DataError(
            f"p-values between {kept.min():g} and {kept.max():g}", "numbers in [0, 1]", "Pass p-values, not statistics."
        )
    out = np.full(values.shape, np.nan)
    if kept.size:
        out[present] = _holm(kept) if method == "holm" else _step_up(kept, method)
    return out


def rejected(q: ArrayLike, alpha: float = 0.05) -> NDArray[np.bool_]:
    """Adjusted p-values that reject: q <= alpha, allowing for rounding; NaN never rejects."""
    check_probability(alpha, "alpha")
    return np.asarray(q, dtype=np.float64) <= alpha * (1 + _ROUNDING)


def tests_needed_at_floor(n: int, m: int, alpha: float = 0.05, *, method: str = "bh") -> int:  # noqa: PT028
    """How many of ``m`` Wilcoxon tests must reach the smallest attainable p together for any to be rejected.

    The smallest k with floor * m / k <= alpha (BH), floor * m * sum(1/j) / k <= alpha (BY); Holm needs the floor itself
    under alpha / m, so 1 or nothing. A number above ``m`` means that no data of this size can reject anything.
    Source: derived. For two-sided tests without zeros or ties, see :func:`moe_interp.stats.smallest_attainable_p`.
    """
    check_at_least(m, 1, "m")
    check_probability(alpha, "alpha")
    check_choice(method, METHODS, "method")
    burden = smallest_attainable_p(n) * m * _by_factor(m, method) / alpha
    needed = max(1, math.ceil(burden * (1 - _ROUNDING)))
    return needed if method != "holm" or needed == 1 else m + 1


def items_needed(m: int, alpha: float = 0.05, *, at_floor: int = 1, method: str = "bh") -> int:
    """Fewest items per test such that ``at_floor`` of ``m`` tests at the smallest attainable p are rejected.

    The smallest n with :func:`tests_needed_at_floor` (n, m, alpha) <= ``at_floor``. It is a condition for rejecting
    anything at all, not for power: see :func:`wilcoxon_power`. More items need not do better: from 26 on the floor is
    that of the normal law.
    """
    check_at_least(at_floor, 1, "at_floor")
    return next(n for n in range(1, 1000) if tests_needed_at_floor(n, m, alpha, method=method) <= at_floor)


def _by_factor(m: int, method: str) -> float:
    return float((1 / np.arange(1, m + 1)).sum()) if method == "by" else 1.0


def _step_up(p: FloatArray, method: str) -> FloatArray:
    return scipy_stats.false_discovery_control(p, method="by" if method == "by" else "bh")


def _holm(p: FloatArray) -> FloatArray:
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(stepped, 1.0)
    return out
