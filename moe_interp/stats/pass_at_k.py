"""pass@K: the chance that at least one of K completions is right, from n of which c are."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray

_NEGLIGIBLE = 50.0  # nats: exp(-50) changes no bit of 1 - exp(-50)
_CELLS_AT_ONCE = 4_000_000


def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> FloatArray | float:
    """Unbiased estimate of pass@K: 1 - C(n - c, k) / C(n, k), which is 1 where n - c < k.

    Computed as -expm1(sum of log(1 - M / (n - j)), j < m) with m = min(c, k) and M = max(c, k): no large number is
    formed, and no digits cancel, also at n = 1e6.

    Args:
        n: Completions of a problem.
        c: How many of them are right, 0 <= c <= n.
        k: Completions that are allowed, 0 <= k <= n (0 gives 0). The three broadcast against each other.

    Returns:
        A probability for each; a float where all three are single numbers.

    Raises:
        DataError: numbers that are not whole or are negative, c > n, or n < k (no unbiased estimate exists then).

    Source: Chen et al. (2021), "Evaluating large language models trained on code". The estimate of one problem says
    nothing of how it varies over problems.
    """
    whole = [_whole(value, name) for value, name in ((n, "n"), (c, "c"), (k, "k"))]
    try:
        total, right, allowed = np.broadcast_arrays(*whole)
    except ValueError:
        shapes = ", ".join(str(array.shape) for array in whole)
        raise DataError(f"n, c and k of shapes {shapes}", "shapes that broadcast", "Give them matching axes.") from None
    _refuse(right > total, total, right, "c", "at most n completions that are right", "Count the right ones again.")
    _refuse(allowed > total, total, allowed, "k", "k of at most n", "Draw more completions, or lower k.")
    found = _estimate(total.ravel(), right.ravel(), allowed.ravel()).reshape(total.shape)
    return float(found) if found.ndim == 0 else found


def _whole(value: ArrayLike, name: str) -> NDArray[np.int64]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(
            f"{name} of rows that differ in length", "whole numbers of 64 bits", "Pass integers."
        ) from error
    if array.dtype.kind not in "iu" and array.size:
        given = f"{name} of type {array.dtype}" + (f" ({array.item()!r})" if array.ndim == 0 else "")
        raise DataError(given, "whole numbers of 64 bits", "Pass integers.")
    if array.dtype.kind == "u" and (array > np.iinfo(np.int64).max).any():
        raise DataError(f"{name}={array.max()}", "whole numbers of 64 bits", "Pass integers.")
    array = array.astype(np.int64)
    if (array < 0).any():
        raise DataError(f"{name}={array.min()}", "a number that is not negative", f"Correct {name}.")
    return array


def _refuse(
    wrong: NDArray[np.bool_], n: NDArray[np.int64], other: NDArray[np.int64], name: str, expected: str, remedy: str
) -> None:
    if wrong.any():
        first = tuple(index[0] for index in np.nonzero(wrong)) if wrong.ndim else ()
        raise DataError(f"{name}={other[first]} with n={n[first]}", expected, remedy)


def _estimate(n: NDArray[np.int64], c: NDArray[np.int64], k: NDArray[np.int64]) -> FloatArray:
    """Of flat arrays that are in order."""
    found = np.ones(n.shape)
    # n - c < k leaves no set of k without a right one: the estimate is 1
    few, many = np.minimum(c, k), np.maximum(c, k)
    found[few == 0] = 0.0
    found[few == 1] = many[few == 1] / n[few == 1]
    undecided = np.flatnonzero((few > 1) & (n - c >= k))
    # every term is at most -M / n, so that few of them decide
    terms = np.minimum(few[undecided], np.ceil(_NEGLIGIBLE * n[undecided] / many[undecided]).astype(np.int64))
    order = np.argsort(terms, kind="stable")
    undecided, terms = undecided[order], terms[order]
    start = 0
    while start < len(undecided):
        stop = start + 1
        while stop < len(undecided) and (stop + 1 - start) * terms[stop] <= _CELLS_AT_ONCE:
            stop += 1
        rows = undecided[start:stop]
        j = np.arange(terms[stop - 1])
        is_term = j < terms[start:stop, None]
        share = many[rows, None] / np.where(is_term, n[rows, None] - j, 2 * many[rows, None])
        found[rows] = -np.expm1(np.where(is_term, np.log1p(-share), 0.0).sum(axis=-1))
        start = stop
    return found
