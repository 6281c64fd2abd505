"""The table of a contrast: differences, tests over prompts, and how stable the found experts are."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from moe_interp.errors import DataError
from moe_interp.stats import (
    adjust_p,
    derive_rng,
    mean_interval,
    paired_permutation,
    rejected,
    stratified_interval,
    two_group_permutation,
)
from moe_interp.stats.checks import FloatArray

N_PERMUTATIONS = 9999
N_RESAMPLES = 200
_TIE = 1e-12


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
    difference = a.mean(0) - b.mean(0)
    p = np.stack([_p_values(a[:, layer], b[:, layer], paired, seed) for layer in range(a.shape[1])])
    q = adjust_p(p, method=method)
    bounds = (-1.0, 1.0)
    if paired:
        interval = mean_interval(a - b, axis=0, bounds=bounds)
    else:
        # the mean of two groups' means, one of them with the opposite sign
        interval = stratified_interval([2 * a, -2 * b], bounds=bounds)
    is_found = rejected(q, alpha)
    side = np.where(is_found & (difference > 0), "a", np.where(is_found & (difference < 0), "b", ""))
    stability = stability_of(a, b, int(is_found.sum()), paired, seed)
    layer, expert = np.meshgrid(data["layer"].values, data["expert"].values, indexing="ij")
    columns = {
        "layer": layer,
        "expert": expert,
        "share_a": a.mean(0),
        "share_b": b.mean(0),
        "difference": difference,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "p": p,
        "q": q,
        "stability": stability,
        "found": side,
    }
    table = pd.DataFrame({name: np.asarray(values).ravel() for name, values in columns.items()})
    table.attrs = {
        "alpha": alpha,
        "method": method,
        "n_a": len(a),
        "n_b": len(b),
        "n_tests": int(p.size),
        "smallest_p": smallest_p(len(a), len(b), paired),
    }
    return table


def _p_values(a: FloatArray, b: FloatArray, paired: bool, seed: int) -> FloatArray:
    """``[expert]``, of one layer; the same permutations at every layer."""
    if paired:
        return paired_permutation(a - b, axis=0, n_permutations=N_PERMUTATIONS, seed=seed).p_value
    values, is_a = np.concatenate([a, b]), np.arange(len(a) + len(b)) < len(a)
    return two_group_permutation(values, is_a, axis=0, n_permutations=N_PERMUTATIONS, seed=seed).p_value


def smallest_p(n_a: int, n_b: int, paired: bool) -> float:
    """The smallest p that so many prompts can give."""
    if paired:
        return 2 / 2**n_a if n_a <= 14 else 1 / (1 + N_PERMUTATIONS)
    ways = math.comb(n_a + n_b, n_a)
    return (1 + (n_a == n_b)) / ways if ways <= 20_000 else 1 / (1 + N_PERMUTATIONS)


def stability_of(a: FloatArray, b: FloatArray, n_found: int, paired: bool, seed: int) -> FloatArray:
    """``[layer, expert]``: in what share of resamples an expert is among as many largest differences as were found.

    A resample is half of each set's prompts (of the pairs), drawn without replacement; the difference has the sign that
    it has on all prompts. NaN where nothing was found.

    Source: Meinshausen & Buehlmann (2010), stability selection; the ranking by abs(difference) is derived.
    """
    if not n_found:
        return np.full(a.shape[1:], np.nan)
    rng = derive_rng(seed, "stability of a contrast")
    sign, hits = np.sign(a.mean(0) - b.mean(0)), np.zeros(a.shape[1:])
    for _ in range(N_RESAMPLES):
        rows_a = _half(rng, len(a))
        rows_b = rows_a if paired else _half(rng, len(b))
        size = sign * (a[rows_a].mean(0) - b[rows_b].mean(0))
        least = np.partition(size.ravel(), -n_found)[-n_found]
        hits += (size >= least - _TIE) & (size > 0)
    return hits / N_RESAMPLES


def _half(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    return rng.choice(n, size=max(1, n // 2), replace=False)
