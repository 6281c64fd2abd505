"""Routing probability against quality, one panel a domain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from moe_interp.plots.figure import GREY, panels
from moe_interp.results.tables import IsolationTables


def calibration_scatter(result: IsolationTables, mass: str | None = None) -> Figure:
    """Mean natural routing probability against mean quality; a point is an expert of a layer.

    Probabilities that span a factor of 5 are on a logarithmic scale.
    Quality is centred over the experts of a layer (up = better than the layer's other experts). The dotted line is even
    use, 1/E. Titles give rho averaged over layers with its interval, and whether noise forbids a verdict. rho is taken
    within layers; the cloud of all layers together may look different.
    """
    points, rows = result.calibration_points(mass=mass), result.calibration_by_domain(mass=mass)
    lines = {str(row["domain"]): row for row in rows.to_dict("records")}
    domains = list(dict.fromkeys(points["domain"]))
    figure, axes = panels([_title(lines[domain]) for domain in domains], 2.9)
    low, high = points["routing"].min(), points["routing"].max()
    wide = 0 < 5 * low < high
    routed = "routed_expert" if "routed_expert" in result.data.dims else "expert"
    layers = sorted(points["layer"].unique())
    for axis, domain in zip(axes, domains):
        here = points[points["domain"] == domain]
        drawn = axis.scatter(
            here["routing"],
            here["quality"],
            c=np.searchsorted(layers, here["layer"]),
            cmap="viridis",
            vmin=0,
            vmax=max(1, len(layers) - 1),
            s=22,
            alpha=0.85,
            linewidths=0.3,
            edgecolors="white",
        )
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.axvline(1 / result.data.sizes[routed], color=GREY, linewidth=0.8, linestyle=":")
        if wide:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("natural routing probability", fontsize=9)
        axis.set_ylabel("quality (nats per token)", fontsize=9)
    bar = figure.colorbar(drawn, ax=axes, shrink=min(0.9, 4 / figure.get_figheight()), aspect=30, pad=0.02)
    places = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), 9)).round().astype(int))
    bar.set_ticks(places.tolist(), labels=[str(layers[place]) for place in places])
    bar.set_label("layer", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _title(row: Mapping[Hashable, Any]) -> str:
    text = f"{row['domain']}: rho {row['rho']:.2f}"
    if row["low"] == row["low"]:  # not NaN
        text += f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{text}\n" + ("too noisy to correct" if row["too_noisy"] else f"corrected {row['corrected']:.2f}")
