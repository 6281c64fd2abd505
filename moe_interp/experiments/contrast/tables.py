"""The table of a contrast: differences, tests over prompts, and how stable the found experts are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.errors import DataError
from moe_interp.stats import risk_differences
from moe_interp.stats.checks import FloatArray


def check_contrast(data: xr.Dataset) -> None:
    """Refuse a dataset that is not one of a contrast.

    Raises:
        DataError: The variable, its axes or the groups are missing, or a group has fewer than two prompts.
    """
    if "selection" not in data or set(data["selection"].dims) != {"prompt", "layer", "expert"}:
        raise DataError(
            "a dataset without selection[prompt, layer, expert]", "that variable", "Pass what contrast_experts makes."
        )
    labels = data["group"].values.astype(str) if "group" in data.coords else np.array([])
    counts = {name: int((labels == name).sum()) for name in ("a", "b")}
    if min(counts.values()) < 2 or sum(counts.values()) != data.sizes["prompt"]:
        raise DataError(f"groups with {counts} prompts", 'at least two in "a" and in "b"', "Add prompts.")


def groups(data: xr.Dataset) -> tuple[FloatArray, FloatArray]:
    """The shares ``[prompt, layer, expert]`` of both sets; pairs stand in the same place."""
    values = np.asarray(data["selection"].transpose("prompt", "layer", "expert").values, dtype=np.float64)
    is_a = data["group"].values.astype(str) == "a"
    return values[is_a], values[~is_a]


def expert_table(data: xr.Dataset, alpha: float = 0.05, method: str = "bh") -> pd.DataFrame:
    """A row a layer and expert; see :meth:`.result.ContrastResult.experts`."""
    a, b = groups(data)
    seed, paired = int(data.attrs.get("seed", 0)), bool(data.attrs.get("paired", 0))
    of = risk_differences(a, b, paired=paired, alpha=alpha, method=method, seed=seed)
    layer, expert = np.meshgrid(data["layer"].values, data["expert"].values, indexing="ij")
    columns = {
        "layer": layer,
        "expert": expert,
        "share_a": of.share_a,
        "share_b": of.share_b,
        "difference": of.difference,
        "ci_low": of.low,
        "ci_high": of.high,
        "p": of.p,
        "q": of.q,
        "stability": of.stability,
        "found": np.select([of.found > 0, of.found < 0], ["a", "b"], ""),
    }
    table = pd.DataFrame({name: np.asarray(values).ravel() for name, values in columns.items()})
    table.attrs = {
        "alpha": alpha,
        "method": method,
        "n_a": of.n_a,
        "n_b": of.n_b,
        "n_tests": int(of.p.size),
        "smallest_p": of.smallest_p,
    }
    return table
