"""Classes of tokens by confidence, in three ways; two of them are free of the published one's selection effect."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.errors import ConfigError, DataError

By = Literal["resampled", "standard", "entropy"]
WAYS: tuple[By, ...] = ("resampled", "standard", "entropy")
CLASSES = ("fragile", "middle", "confident")
Codes = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def confidence(data: xr.Dataset, by: By = "resampled") -> FloatArray:
    """``[token, layer]``: the probability by which a token is classed at a layer.

    - "standard": p0, that of the realized next token under the standard route (the published classes). It selects:
      a low p0 leaves routes that are no better in general room to beat it, so that even with exchangeable routes
      regret is large on fragile tokens and small on confident ones.
    - "resampled": the mean over a second, independent draw of routes, which p0 does not enter (derived).
    - "entropy": exp(-H) of the standard prediction, which the realized token does not enter (derived).

    Raises:
        ConfigError: another way.
        DataError: "resampled" in a run without controls.
    """
    check_way(data, by)
    shape = (data.sizes["token"], data.sizes["layer"])
    if by == "resampled":
        return mean_probability(data["logp_second"].values)
    log = data["logp_standard"].values if by == "standard" else -data["entropy"].values
    return np.broadcast_to(np.exp(log.astype(np.float64))[:, None], shape)


def mean_probability(logp: NDArray[Any]) -> FloatArray:
    """Mean of the probabilities over the last axis, absent (NaN) ones left out; NaN where there is none."""
    is_there = ~np.isnan(logp)
    total = np.where(is_there, np.exp(logp.astype(np.float64)), 0.0).sum(-1)
    n = is_there.sum(-1)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def check_way(data: xr.Dataset, by: By) -> None:
    """Refuse a way that does not exist, or that this run has no data for."""
    if by not in WAYS:
        raise ConfigError(f"by={by!r}", f"one of {WAYS}", "Choose another way.")
    if by == "resampled" and "logp_second" not in data:
        raise DataError(
            "a run without controls, which has no second draw of routes",
            'one with controls=True for the classes by "resampled"',
            'Run it with controls, or class tokens by "entropy".',
        )


def classes(probability: FloatArray, thresholds: tuple[float, float] = (0.5, 0.9)) -> Codes:
    """Index into ``CLASSES``: fragile below the first threshold, confident from the second on; -1 for NaN."""
    low, high = thresholds
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"thresholds={thresholds}", "0 <= fragile below <= confident from <= 1", "Correct them.")
    codes = (probability >= low).astype(np.int64) + (probability >= high)
    return np.where(np.isnan(probability), -1, codes)
