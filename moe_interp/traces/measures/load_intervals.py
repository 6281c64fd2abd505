"""Intervals over sequences for how evenly experts are used."""

from __future__ import annotations

import numpy as np
import xarray as xr

from moe_interp.stats import cluster_interval
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.counts import RoutingCounts, counted
from moe_interp.traces.expert_use import entropy, ratio
from moe_interp.traces.measures.outputs import by_sequence
from moe_interp.traces.trace import RoutingTrace


def load_intervals(source: RoutingTrace | RoutingCounts, level: float = 0.95) -> xr.Dataset:
    """``entropy_low`` and ``entropy_high[layer]`` of :func:`moe_interp.traces.load`, over sequences, in nats.

    Jackknife over sequences (:func:`moe_interp.stats.cluster_interval`), NaN with a single one. The largest share and
    the number of dead experts have no such interval: they are no smooth functions of the counts.

    Raises:
        DataError: no counts of sequences.

    Source: derived. What it does not show: the bias of an entropy of few tokens, which is too low by about
    (E - 1) / (2 N) nats for N independent slots.
    """
    found = counted(source, "sequences")
    rows = found.array("row_slots")
    bounds = np.empty((2, len(found.layers)))

    def nats(counts: FloatArray) -> FloatArray:
        return entropy(ratio(counts, counts.sum(axis=-1, keepdims=True)))

    for layer in range(len(found.layers)):
        (slots,) = by_sequence(found, rows[:, layer])
        interval = cluster_interval([slots], nats, sizes=slots.sum(axis=1), level=level)
        bounds[:, layer] = interval.low, interval.high
    data = {"entropy_low": ("layer", bounds[0]), "entropy_high": ("layer", bounds[1])}
    return xr.Dataset(data, coords={"layer": list(found.layers)})
