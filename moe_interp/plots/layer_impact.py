"""What each layer's best expert is worth."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREY, ORANGE, panels, thin_ticks, whiskers
from moe_interp.results.tables import IsolationTables


def layer_impact(result: IsolationTables, baseline: str = "natural", mass: str | None = None) -> Figure:
    """Impact by layer: the best expert chosen on one half of the items and measured on the other, with intervals.

    Open circles choose and measure on the same items, which is optimistic. Early and last layers are shaded.
    """
    table = result.layer_impact(baseline=baseline, mass=mass)
    figure, (axis,) = panels([""], 3.6)
    places = np.arange(len(table))
    impact, low, high = (table[name].to_numpy() for name in ("impact", "low", "high"))
    for place in places[table["regime"].to_numpy() != "middle"]:
        axis.axvspan(place - 0.5, place + 0.5, color="#eeeeee", zorder=0, linewidth=0)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.plot(
        places - 0.12,
        table["naive"],
        "o",
        mfc="none",
        color=ORANGE,
        label="same items (optimistic)",
        markersize=7,
        zorder=2,
    )
    axis.errorbar(
        places + 0.12,
        impact,
        yerr=whiskers(impact, low, high),
        fmt="o",
        color=BLUE,
        label="cross-fitted",
        capsize=3,
        zorder=3,
    )
    axis.set_xticks(*thin_ticks([str(layer) for layer in table["layer"]], 32))
    axis.set_xlim(-0.6, len(table) - 0.4)
    axis.set_xlabel("layer (shaded: early and last)", fontsize=9)
    axis.set_ylabel(f"best expert's delta against\n{table.attrs['baseline']} routing (nats per token)", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return figure
