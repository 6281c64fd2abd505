"""Routing against computation, layer by layer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, panels, thin_ticks

_PARTS = {"experts": BLUE, "weights": ORANGE, "computation": GREEN, "interaction": GREY}


class SplitTables(Protocol):
    """What the figure reads of a result."""

    def by_layer(self, metric: str | None = None) -> pd.DataFrame: ...


def decomposition(result: SplitTables, metric: str | None = None) -> Figure:
    """Bars: the mean effect of each factor alone, and their interaction. Diamonds: all together, the bars' sum."""
    table = result.by_layer(metric)
    figure, (axis,) = panels([""], 3.4)
    places, width = np.arange(len(table)), 0.2
    for number, (part, colour) in enumerate(_PARTS.items()):
        axis.bar(places + (number - 1.5) * width, table[part], width, label=part, color=colour)
    axis.plot(places, table["together"], "D", color="black", markersize=5, label="together")
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xticks(*thin_ticks([str(layer) for layer in table["layer"]], 32))
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("change of the metric (patched - corrupted)", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=5, fontsize=8, frameon=False)
    return figure
