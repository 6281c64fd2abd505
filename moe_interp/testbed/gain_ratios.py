"""Gains of routers under two strategies, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import mean_interval, verdict
from moe_interp.testbed.shared_direction import GAINS


def log_gains(data: xr.Dataset, gain: str, against: str | None) -> xr.DataArray:
    """``log(gain / against)``, or of the gain alone, on the axes of the gains; NaN where one of them is 0.

    Raises:
        ConfigError: No such gain.
        DataError: The runs did not measure gains.
    """
    for name in (gain, *([] if against is None else [against])):
        if name not in GAINS:
            raise ConfigError(f"gain {name!r}", f"one of {', '.join(GAINS)}", "Choose another.")
    if gain not in data:
        given = "runs with shared_direction=False, or of an earlier version"
        raise DataError(given, "runs that measured gains", "Train with shared_direction=True.")
    ratio = data[gain] if against is None else data[gain] / data[against]
    logs: xr.DataArray = xr.apply_ufunc(np.log, ratio.where(ratio > 0))
    return logs


def ratios_over_seeds(logs: xr.DataArray, seeds: Sequence[int]) -> pd.DataFrame:
    """One row a step (and layer): ``ratio``, the geometric mean over seeds of ``exp(logs)``, its interval, in words.

    Args:
        logs: ``[seed, step]`` or ``[seed, step, layer]``, differences of logarithms.
        seeds: Those that count.
    """
    chosen = logs.sel(seed=list(seeds)).transpose("seed", ...)
    values = chosen.to_numpy()
    usable = np.isfinite(values).all(0)
    found = mean_interval(np.where(usable, values, 0.0), axis=0)
    columns = {"ratio": np.exp(found.estimate), "low": np.exp(found.low), "high": np.exp(found.high)}
    columns = {name: np.where(usable, column, np.nan) for name, column in columns.items()}
    frame = xr.Dataset(
        {name: (chosen.dims[1:], column) for name, column in columns.items()},
        {str(name): chosen[name] for name in chosen.dims[1:]},
    ).to_dataframe()
    frame = frame.reset_index()[[*map(str, chosen.dims[1:]), *columns]]
    frame["seeds"] = len(seeds)
    words = ("larger", "smaller")
    bounds = zip(columns["low"].ravel().tolist(), columns["high"].ravel().tolist())
    frame["verdict"] = [verdict(low, high, n=len(seeds), null=1.0, words=words, units="seeds") for low, high in bounds]
    return frame
