"""How evenly each layer uses its experts."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREY, ORANGE, panels, thin_ticks
from moe_interp.results.tables import AtlasTables


def load_bars(result: AtlasTables, layers: tuple[int, ...] | None = None) -> Figure:
    """Share of a layer's slots by expert, sorted from the busiest down, one panel a layer; dashed: even use.

    Orange: more than twice even use. By default the most even layer, the least even, and others in between, six in all.

    Args:
        result: An atlas.
        layers: The layers to draw.
    """
    data = result.data
    known = data["layer"].values.tolist()
    if layers is None:
        order = np.argsort(data["max_violation"].values, kind="stable")
        chosen = sorted({int(order[i]) for i in np.linspace(0, len(order) - 1, min(6, len(order))).round().astype(int)})
    else:
        chosen = [known.index(layer) for layer in layers]
    effective = data["effective_experts"].values
    titles = [f"layer {known[place]}: as {effective[place]:.0%} of the experts" for place in chosen]
    figure, axes = panels(titles, 1.8, 2, share=False)
    even = 1 / data.sizes["expert"]
    for axis, place in zip(axes, chosen):
        share = data["share"].values[place]
        order = np.argsort(-share, kind="stable")
        values = share[order]
        colours = np.where(values > 2 * even, ORANGE, BLUE).tolist()
        axis.bar(np.arange(len(values)), values, color=colours, width=0.85)
        axis.axhline(even, color=GREY, linewidth=1, linestyle="--")
        axis.set_xticks(*thin_ticks([str(data["expert"].values[e]) for e in order], 16))
        axis.set_xlabel("expert, busiest first", fontsize=9)
        axis.set_ylabel("share of slots", fontsize=9)
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:  # one scale; each panel has its own order of experts
        axis.set_ylim(0, top)
    return figure
