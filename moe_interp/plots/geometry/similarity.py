"""Pairs of tokens: how alike their routes and their states are, and how far apart the router puts them."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moe_interp.errors import DataError
from moe_interp.plots.figure import BLUE, GREY, RED, panels
from moe_interp.results.tables import GeometryTables

MOST_PANELS = 4  # layers that are drawn, evenly spaced


def similarity_scatter(result: GeometryTables) -> Figure:
    """Overlap of two tokens' experts against the cosine of their states, a panel a layer (4 of them at most).

    A point is a pair of tokens of different sequences, its height spread a little, since overlaps are few numbers. The
    line is the mean overlap of tenths of the pairs by cosine. Titles give the correlation over all pairs, and the
    interval over sequences.

    Raises:
        DataError: The routers' weights were not known, so no pairs were kept.
    """
    layers = _layers(result)
    data = result.data
    table = result.similarity()
    table = table[table["level"] == "token"].set_index("layer")
    titles = [
        f"layer {data['layer'].values[i]}: r {row['correlation']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        for i in layers
        for row in [table.loc[data["layer"].values[i]]]
    ]
    figure, axes = panels(titles, 2.7)
    spread = np.random.default_rng(0).uniform(-0.02, 0.02, data.sizes["pair"])
    for axis, i in zip(axes, layers):
        cosine, overlap = data["pair_cosine"].values[i], data["pair_overlap"].values[i]
        axis.scatter(cosine, overlap + spread, s=7, color=BLUE, alpha=0.35, linewidths=0)
        tenths = np.array_split(np.argsort(cosine), 10)
        x, y = ([float(values[part].mean()) for part in tenths if len(part)] for values in (cosine, overlap))
        axis.plot(x, y, color=RED, linewidth=1.8, marker="o", markersize=3.5)
        axis.set_xlabel("cosine of router inputs", fontsize=9)
        axis.set_ylabel("overlap of experts", fontsize=9)
    return figure


def bound_scatter(result: GeometryTables) -> Figure:
    """Distance of two tokens' logits against the distance of their states, a panel a layer (4 of them at most).

    No point can lie above the solid line, the bound ``||W Pi|| ||h_i - h_j||``. The dashed line is what a difference
    would give that is spread evenly over all directions. Titles give the share of the bound that the median pair uses.

    Raises:
        DataError: The routers' weights were not known.
    """
    layers = _layers(result)
    data, table = result.data, result.bound()
    titles = [
        f"layer {data['layer'].values[i]}: median pair at {table['tightness'].iloc[i]:.0%} of the bound" for i in layers
    ]
    figure, axes = panels(titles, 2.7, share=False)
    for axis, i in zip(axes, layers):
        distance, moved = data["pair_distance"].values[i], data["pair_logit_distance"].values[i]
        axis.scatter(distance, moved, s=7, color=BLUE, alpha=0.35, linewidths=0)
        ends = np.array([0.0, float(distance.max()) * 1.05])
        axis.plot(ends, table["bound_upper"].iloc[i] * ends, color=RED, linewidth=1.5, label="bound")
        axis.plot(
            ends,
            table["even_gain"].iloc[i] * ends,
            color=GREY,
            linestyle="--",
            linewidth=1.2,
            label="average direction",
        )
        axis.set_xlim(0, ends[1])
        axis.set_ylim(0, table["bound_upper"].iloc[i] * ends[1] * 1.02)
        axis.set_xlabel("distance of router inputs", fontsize=9)
        axis.set_ylabel("distance of logits", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    return figure


def _layers(result: GeometryTables) -> list[int]:
    """At most so many layers, evenly spaced, the first and the last among them."""
    if "pair_cosine" not in result.data:
        raise DataError("a result without the routers' weights", "weights", "Pass weights=, or the model itself.")
    n = result.data.sizes["layer"]
    return np.unique(np.linspace(0, n - 1, min(n, MOST_PANELS)).round().astype(int)).tolist()
