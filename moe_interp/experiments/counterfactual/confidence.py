"""Classes of tokens by confidence, in three ways; two of them are free of the published one's selection effect."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.errors import ConfigError, DataError
from moe_interp.results.tables import fresh_second
from moe_interp.stats.checks import FloatArray

By = Literal["resampled", "standard", "entropy"]
WAYS: tuple[By, ...] = ("resampled", "standard", "entropy")
CLASSES = ("fragile", "middle", "confident")
FEWEST_CLASSED = 0.05  # share of the cells (token x layer) that must have a class
Codes = NDArray[np.int64]


def confidence(data: xr.Dataset, by: By = "resampled") -> FloatArray:
    """``[token, layer]``: the probability by which a token is classed at a layer; NaN where it has none.

    - "standard": p0, that of the realized next token under the standard route (the published classes). It selects:
      a low p0 leaves routes that are no better in general room to beat it, so that even with exchangeable routes
      regret is large on fragile tokens and small on confident ones.
    - "resampled": the mean over those routes of a second, independent draw that are neither the standard one nor in the
      main draw (derived). No utility that the tables compare enters; NaN where the second draw has no such route. They
      are routes that the router holds for less likely than the main draw's.
    - "entropy": exp(-H) of the mean prediction over these routes but the draw's first, which "fresh_draw" of
      :func:`.controls.controls` compares (derived). The realized token does not enter, nor does
      any prediction that is compared. (The standard route's own prediction would: where its noise happens to be large
      and sharp, its p is extreme, and other routes lie on one side of it.)

    Raises:
        ConfigError: another way.
        DataError: "resampled" or "entropy" in a run without controls, or in one whose main draw has all but all routes;
            "entropy" in a run that has not kept it.
    """
    check_way(data, by)
    if by == "resampled":
        return fresh_mean(data, "logp_second")
    if by == "entropy":
        return np.asarray(np.exp(-data["entropy_second"].values.astype(np.float64)))
    shape = (data.sizes["token"], data.sizes["layer"])
    return np.broadcast_to(np.exp(data["logp_standard"].values.astype(np.float64))[:, None], shape)


def fresh_mean(data: xr.Dataset, name: str, first: int = 0) -> FloatArray:
    """``[token, layer]``: mean probability over the second draw's routes that the main draw lacks, from the ``first``
    on; ``name`` is ``"logp_second"`` or, of the drawn target, ``"logp_own_second"``. NaN where there is none."""
    is_used = fresh_second(data)[..., first:]
    total = np.where(is_used, np.exp(data[name].values[..., first:].astype(np.float64)), 0.0).sum(-1)
    n = is_used.sum(-1)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def check_way(data: xr.Dataset, by: Any) -> By:
    """Refuse a way that does not exist, or that this run has no data for."""
    if not isinstance(by, str) or by not in WAYS:
        raise ConfigError(f"by={by!r}", f"one of {WAYS}", "Choose another way.")
    if by == "standard":
        return by
    if "logp_second" not in data:
        raise DataError(
            "a run without controls, which has no second draw of routes",
            f'one with controls=True for the classes by "{by}"',
            'Run it with controls; "standard" gives the published classes, which select.',
        )
    if by == "entropy" and "entropy_second" not in data:
        raise DataError(
            "a run that has not kept the entropy of the second draw's mean prediction",
            'the variable "entropy_second" for the classes by "entropy"',
            'Class tokens by "resampled", or repeat the run. (The entropy of the standard route\'s own prediction '
            "would select by that route's noise.)",
        )
    has_class = fresh_second(data).any(-1) if by == "resampled" else ~np.isnan(data["entropy_second"].values)
    if (share := has_class.mean()) < FEWEST_CLASSED:
        raise DataError(
            f"a second draw with a route that the main draw lacks on {share:.0%} of the tokens",
            f'one on at least {FEWEST_CLASSED:.0%} for the classes by "{by}"',
            'Run it with fewer routes than all there are; "standard" gives the published classes, which select.',
        )
    return by


def check_thresholds(thresholds: Any) -> tuple[float, float]:
    """Two probabilities in order."""
    values = tuple(thresholds) if isinstance(thresholds, Sequence | np.ndarray) else ()
    is_given = len(values) == 2 and all(isinstance(value, Real) for value in values)
    if not is_given or not 0 <= values[0] <= values[1] <= 1:
        expected = "two numbers, 0 <= fragile below <= confident from <= 1"
        raise ConfigError(f"thresholds={thresholds!r}", expected, "Correct them.")
    return float(values[0]), float(values[1])


def classes(probability: FloatArray, thresholds: tuple[float, float] = (0.5, 0.9)) -> Codes:
    """Index into ``CLASSES``: fragile below the first threshold, confident from the second on; -1 for NaN."""
    low, high = check_thresholds(thresholds)
    codes = (probability >= low).astype(np.int64) + (probability >= high)
    return np.where(np.isnan(probability), -1, codes)
