"""How much experts contribute, and how sure the router is: output norms, router-weighted norms, and margins."""

from __future__ import annotations

import numpy as np
import xarray as xr

from moe_interp.errors import DataError
from moe_interp.stats import ratio_interval
from moe_interp.traces.counts import RoutingCounts, counted
from moe_interp.traces.expert_use import axes, ratio
from moe_interp.traces.trace import RoutingTrace


def expert_norms(source: RoutingTrace | RoutingCounts, level: float = 0.95) -> xr.Dataset:
    """Size of what experts add: mean output norm, and REAP's saliency, the mean of weight times norm.

    Args:
        source: Routes with ``expert_norms``, or the counts of a corpus.
        level: Of the intervals.

    Returns:
        ``norm[layer, expert]`` = mean of ||E_e(x)|| over the tokens that e serves, in units of the residual stream;
        with weights ``saliency[layer, expert]`` = mean over the same tokens of weight * ||E_e(x)||, with
        ``saliency_low`` and ``saliency_high`` over sequences where there are counts of each. NaN for unused experts.

    Raises:
        DataError: The routes have no norms.

    Source: REAP (router-weighted expert activation pruning) for the saliency. What it does not show: what would be lost
    without the expert; another may do the same, and outputs of one token may cancel.
    """
    found = counted(source, "sequences", "norms")
    if not found.has("norm"):
        raise DataError("routes without expert_norms", "norms of the experts' outputs", "Record them with the routes.")
    slots = found.slots.sum(axis=0)
    by_expert = ("layer", "expert")
    data = {"norm": (by_expert, ratio(found.sums("norm"), slots))}
    if found.has("weighted_norm"):
        data["saliency"] = (by_expert, ratio(found.sums("weighted_norm"), slots))
    if found.has("row_weighted_norm") and found.has("row_slots"):
        bounds = np.full((2, *slots.shape), np.nan)
        sums, rows = found.array("row_weighted_norm"), found.array("row_slots")
        for layer in range(len(found.layers)):
            interval = ratio_interval(*by_sequence(found, sums[:, layer], rows[:, layer]), level=level)
            bounds[:, layer] = interval.low, interval.high
        data |= {"saliency_low": (by_expert, bounds[0]), "saliency_high": (by_expert, bounds[1])}
    return xr.Dataset(data, coords=axes(found))


def router_margin(source: RoutingTrace | RoutingCounts, level: float = 0.95) -> xr.Dataset:
    """How far the last expert that was chosen is ahead of the first that was not.

    Args:
        source: Routes with ``router_logits`` or weights, or the counts of a corpus.
        level: Of the intervals.

    Returns:
        With logits ``margin[layer]`` = mean over tokens of (smallest logit in the route - largest logit outside), in
        units of logits, with ``margin_low`` and ``margin_high`` over sequences, and ``negative[layer]``, the share of
        tokens with a margin below 0: there the family ranks by something else than its logits (a bias of the choice,
        groups of experts), or the route was set. With weights ``smallest_weight[layer]``, the mean smallest weight in
        the route, likewise with bounds. The next expert's weight is not recorded; where weights rank experts (softmax
        and sigmoid families without a bias), this is the most that the gap to it can be. Tokens without any expert, or
        with all of them, are skipped.

    Raises:
        DataError: The routes have neither.

    Source: derived. What it does not show: how sure the choice of the first expert is; the margin is about the last.
    """
    found = counted(source, "weights", "margin")
    data: dict[str, np.ndarray] = {}
    if found.has("row_margin"):
        tokens = found.array("row_margin_tokens")
        for name, column in (("margin", "row_margin"), ("negative", "row_margin_negative")):
            data |= _mean(found, name, found.array(column), tokens, level)
    if found.has("row_smallest_weight"):
        data |= _mean(found, "smallest_weight", found.array("row_smallest_weight"), found.array("row_served"), level)
    if not data:
        raise DataError("routes with neither logits nor weights", "one of them", "Record router_logits.")
    return xr.Dataset({name: ("layer", value) for name, value in data.items()}, coords={"layer": list(found.layers)})


def _mean(found: RoutingCounts, name: str, sums: np.ndarray, tokens: np.ndarray, level: float) -> dict[str, np.ndarray]:
    totals, sizes = by_sequence(found, sums, tokens)
    interval = ratio_interval(totals, sizes, level=level)
    return {
        name: ratio(totals.sum(axis=0), sizes.sum(axis=0)),
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
    }


def by_sequence(found: RoutingCounts, *arrays: np.ndarray) -> list[np.ndarray]:
    """Rows of the same sequence (of several labels) added up."""
    sequence = found.array("row_sequence")
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    return [np.add.reduceat(np.asarray(array, dtype=np.float64), starts, axis=0) for array in arrays]
