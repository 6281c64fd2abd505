"""Expert by layer heat map of the risk difference between two sets of prompts."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_interp.plots.figure import colour_bar, panels, thin_ticks
from moe_interp.results.tables import ContrastTables


def contrast_map(result: ContrastTables, alpha: float = 0.05) -> Figure:
    """Risk difference of every layer and expert; blue = used more by a, red = by b; a dot marks q <= ``alpha``."""
    table = result.experts(alpha)
    layers, experts = list(result.data["layer"].values), list(result.data["expert"].values)
    shape = (len(layers), len(experts))
    difference, found = (table[name].to_numpy().reshape(shape) for name in ("difference", "found"))
    figure, (axis,) = panels([""], min(max(0.25 * len(layers) + 1.2, 2.2), 8.0), 1)
    limit = float(np.abs(difference).max()) or 1.0
    image = axis.pcolormesh(difference, cmap="RdBu", norm=Normalize(-limit, limit), edgecolors="white", linewidth=0.4)
    row, column = np.nonzero(found != "")
    dark = np.abs(difference[row, column]) > 0.6 * limit
    axis.scatter(column + 0.5, row + 0.5, s=16, c=np.where(dark, "white", "black"), linewidths=0)
    for set_ticks, labels in ((axis.set_xticks, experts), (axis.set_yticks, layers)):
        places, texts = thin_ticks([str(label) for label in labels], 32)
        set_ticks([place + 0.5 for place in places], texts)
    axis.set_xlabel("expert", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    colour_bar(figure, image, axis, "share of tokens, a - b", pad=0.02)
    counts = [int((found == side).sum()) for side in ("a", "b")]
    axis.set_title(
        f"{counts[0]} used more by a, {counts[1]} by b, of {found.size} (dots: q ≤ {alpha:g})", fontsize=10, loc="left"
    )
    return figure
