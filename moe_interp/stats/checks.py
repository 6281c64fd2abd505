"""Checks on the arrays that enter a statistic, and the axis convention they share."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_interp.errors import ConfigError, DataError

FloatArray = NDArray[np.float64]


def real_numbers(values: ArrayLike, name: str) -> FloatArray:
    """``values`` as a float64 array.

    Raises:
        DataError: texts, complex numbers, rows of different lengths or other things that are no array of real numbers.
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind == "c":
            raise TypeError("complex")
        return array.astype(np.float64, copy=False)
    except (TypeError, ValueError):
        given = f"{name} that are no array of real numbers ({type(values).__name__})"
        raise DataError(given, "real numbers, rows of one length", f"Correct {name}.") from None


def sample_last(x: ArrayLike, axis: int = -1, name: str = "x") -> FloatArray:
    """``x`` as float64 with the sample axis last. NaN is a missing value; infinity is refused."""
    array = real_numbers(x, name)
    if array.ndim == 0 or not -array.ndim <= axis < array.ndim:
        raise DataError(
            f"{name} has shape {array.shape} and axis is {axis}",
            "an array with at least one axis, and an axis that it has",
            "Pass the samples along an existing axis.",
        )
    if np.isinf(array).any():
        raise DataError(
            f"{name} holds {int(np.isinf(array).sum())} infinite values",
            "finite numbers, or NaN where a value is missing",
            "Find the items whose log-probability is infinite and drop them, or set them to NaN.",
        )
    return np.moveaxis(array, axis, -1)


def check_no_missing(array: FloatArray, name: str) -> None:
    """Refuse NaN, for statistics whose items must be complete."""
    if np.isnan(array).any():
        raise DataError(
            f"{name} holds {int(np.isnan(array).sum())} missing values",
            "a value for every item, layer and expert",
            "Drop the items that are incomplete.",
        )


def check_probability(value: float, name: str) -> None:
    """Refuse a level or rate outside the open interval (0, 1)."""
    try:
        is_inside = 0 < value < 1
    except TypeError:
        is_inside = False
    if not is_inside:
        raise ConfigError(f"{name} is {value}", "a number between 0 and 1", f"Set {name} to, say, 0.05 or 0.95.")


def check_share(value: Any, name: str, remedy: str = "Take 0.8.") -> None:
    """Refuse a share that is not above 0, or above 1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise ConfigError(f"{name}={value!r}", "a share above 0 and at most 1", remedy)


def check_at_least(value: Any, low: int, name: str) -> None:
    """Refuse a count below ``low``."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < low:
        raise ConfigError(
            f"{name} is {value if isinstance(value, Real) else repr(value)}",
            f"a whole number of at least {low}",
            f"Raise {name}.",
        )


def check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    """Refuse an option that does not exist."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}", "one of " + ", ".join(map(repr, choices)), f"Choose another {name}.")
