"""Sums of decimal numbers that do not depend on the order, nor on how the numbers were split into parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_interp.errors import DataError

LARGE, SMALL = 2.0**20, 2.0**52  # a number is kept as a multiple of 1 / SMALL
LARGEST = 2.0**32  # of a single number, so that 2^20 of them stay exact in float64
AT_ONCE = 2**20


def fixed_point_sums(codes: NDArray[Any], values: NDArray[Any], n_bins: int, what: str) -> NDArray[np.int64]:
    """Sum of the values of each code, ``[bin, 2]``: whole multiples of 2^-20, and the rest in multiples of 2^-52.

    Integers add up the same in every order, which floating-point sums do not. A value is rounded to a multiple of
    2^-52, which loses nothing of a float32 above 2^-29.

    Raises:
        DataError: a value of 2^32 or more.
    """
    sums = np.zeros((n_bins, 2), dtype=np.int64)
    for start in range(0, len(codes), AT_ONCE):
        code, value = codes[start : start + AT_ONCE], values[start : start + AT_ONCE].astype(np.float64)
        if np.abs(value).max(initial=0) >= LARGEST:
            raise DataError(
                f"{what} of {float(np.abs(value).max()):g}", f"numbers below {LARGEST:g}", "Look for overflow."
            )
        large = np.floor(value * LARGE)
        small = np.rint((value - large / LARGE) * SMALL)
        for place, part in enumerate((large, small)):
            sums[:, place] += np.bincount(code, weights=part, minlength=n_bins).astype(np.int64)
    return sums


def as_float(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """``[..., 2]`` fixed-point sums as float64 ``[...]``."""
    carried = sums[..., 1] >> 32  # SMALL / LARGE = 2^32 small units are a large one
    rest = sums[..., 1] - (carried << 32)
    return np.asarray((sums[..., 0] + carried) / LARGE + rest / SMALL)
