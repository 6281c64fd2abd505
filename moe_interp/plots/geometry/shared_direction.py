"""How strongly routers read the direction that their inputs share, against other directions."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREY, ORANGE, RED, panels, thin_ticks
from moe_interp.results.tables import GeometryTables

MOST_BARS = 16  # layers drawn as bars; more are points


def shared_direction(result: GeometryTables) -> Figure:
    """Gains ``||Pi_e W u||`` by layer, of the shared direction (bars, or points for many layers) and of its controls.

    The grey band holds 95% of random directions, its line is their root mean square; diamonds are the first principal
    axis of the centred states, dashes what is not shared, weighted as it occurs.

    Raises:
        DataError: The routers' weights were not known.
    """
    table = result.shared_direction()
    places = np.arange(len(table))
    figure, (axis,) = panels(["Gain of the router along the shared direction of its inputs"], 3.4)
    for place, low, high, at_random in zip(places, table["random_low"], table["random_high"], table["random_gain"]):
        is_first = place == 0
        axis.fill_between(
            [place - 0.42, place + 0.42], low, high, color=GREY, alpha=0.25, linewidth=0, zorder=0,
            label="95% of random directions" if is_first else None,
        )  # fmt: skip
        axis.plot([place - 0.42, place + 0.42], [at_random, at_random], color=GREY, linewidth=1.2, zorder=1)
    if len(table) <= MOST_BARS:
        axis.bar(places, table["shared_gain"], width=0.42, color=BLUE, label="shared direction", zorder=2)
    else:
        axis.plot(places, table["shared_gain"], color=BLUE, marker="o", markersize=4, label="shared direction")
    axis.scatter(
        places, table["first_component"], marker="D", s=26, color=ORANGE, label="first principal axis", zorder=3
    )
    axis.scatter(places, table["centred_gain"], marker="_", s=220, color=RED, label="what is not shared", zorder=3)
    axis.set_xticks(*thin_ticks([str(layer) for layer in table["layer"]], 32))
    axis.set_ylim(bottom=0, top=1.25 * float(table[["shared_gain", "first_component", "centred_gain"]].max().max()))
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("gain (logits per unit of state)", fontsize=9)
    axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    return figure
