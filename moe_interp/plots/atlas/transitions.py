"""Where the tokens of each expert go at the next layer."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from moe_interp.errors import DataError
from moe_interp.plots.figure import BLUE, GREY, panels, thin_ticks
from moe_interp.results.tables import AtlasTables

MOST_LINES = 6  # between two layers


def transition_flow(result: AtlasTables, most: int = MOST_LINES) -> Figure:
    """Experts as dots (size: share of slots), layers from left to right; lines: transitions more frequent than by use.

    Between two layers, the ``most`` transitions are drawn with the largest excess in share of pairs over independence;
    width and darkness grow with the excess.

    Raises:
        DataError: fewer than two layers.
    """
    data = result.data
    if "transition_probability" not in data:
        raise DataError("an atlas without transitions", "at least two layers", "Record more layers.")
    layers, n_experts = data["layer"].values.tolist(), data.sizes["expert"]
    share = data["share"].values
    probability = data["transition_probability"].values[:-1]
    chance = data["transition_chance"].values[:-1]
    excess = np.nan_to_num((probability - chance[:, None, :]) * share[:-1, :, None])
    figure, (axis,) = panels([""], min(max(0.09 * n_experts + 1.5, 3.2), 8.0))
    lines, weights = [], []
    for place, table in enumerate(excess):
        for code in np.argsort(-table.ravel(), kind="stable")[:most]:
            i, j = divmod(int(code), n_experts)
            if table[i, j] > 0:
                lines.append([(place, i), (place + 1, j)])
                weights.append(table[i, j])
    scale = np.array(weights) / max(weights, default=1.0)
    colours = [(0.0, 0.447, 0.698, 0.15 + 0.75 * s) for s in scale]
    axis.add_collection(LineCollection(lines, colors=colours, linewidths=0.4 + 2.6 * scale))
    x, y = np.meshgrid(np.arange(len(layers)), np.arange(n_experts), indexing="ij")
    size = 110 * np.nan_to_num(share) / max(float(np.nanmax(share)), 1e-9)
    axis.scatter(x, y, s=size, c=np.where(share > 0, BLUE, GREY).ravel().tolist(), linewidths=0, zorder=2)
    axis.set_xlim(-0.5, len(layers) - 0.5)
    axis.set_ylim(-1, n_experts)
    axis.set_xticks(*thin_ticks([str(layer) for layer in layers], 24))
    axis.set_yticks(*thin_ticks([str(e) for e in data["expert"].values], 24))
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("expert", fontsize=9)
    axis.set_title(
        f"the {most} transitions most above chance between two layers; dots: share of slots", fontsize=10, loc="left"
    )
    return figure
