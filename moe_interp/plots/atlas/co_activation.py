"""Which experts serve the same tokens."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from moe_interp.errors import DataError
from moe_interp.plots.figure import colour_bar, panels, thin_ticks
from moe_interp.results.tables import AtlasTables

MOST_PANELS = 4


def co_activation_map(result: AtlasTables, layers: tuple[int, ...] | None = None) -> Figure:
    """Share of an expert's tokens that another serves as well, less chance by use; experts that meet stand together.

    By default the layers with the largest mean absolute excess, four of them at most. The order is that of average
    linkage, each layer's own; unused experts are left out.

    Args:
        result: An atlas.
        layers: The layers to draw.

    Raises:
        DataError: no co-activation.
    """
    data = result.data
    if "co_activation" not in data:
        raise DataError("an atlas without co-activation", "counts of pairs", 'Count with tables=["co_activation"].')
    known = data["layer"].values.tolist()
    excess = data["co_activation"].values - data["co_activation_chance"].values
    if layers is None:
        size = np.nan_to_num(np.abs(excess)).mean(axis=(1, 2))
        chosen = sorted(np.argsort(-size, kind="stable")[:MOST_PANELS].tolist())
    else:
        chosen = [known.index(layer) for layer in layers]
    figure, axes = panels([f"layer {known[place]}" for place in chosen], 3.6, 2, share=False)
    limit = float(np.nanquantile(np.abs(excess[chosen]), 0.99)) or 1.0
    for axis, place in zip(axes, chosen):
        used = np.flatnonzero(data["share"].values[place] > 0)
        table = np.nan_to_num(excess[place][np.ix_(used, used)])
        order = _order(table)
        table = table[np.ix_(order, order)]
        np.fill_diagonal(table, np.nan)
        image = axis.pcolormesh(table, cmap="RdBu", norm=Normalize(-limit, limit))
        at, names = thin_ticks([str(data["expert"].values[e]) for e in used[order]], 16)
        axis.set_xticks([x + 0.5 for x in at], names)
        axis.set_yticks([x + 0.5 for x in at], names)
        axis.set_xlabel("also served by expert", fontsize=9)
        axis.set_ylabel("tokens of expert", fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    colour_bar(
        figure,
        image,
        axes,
        "share of tokens, less chance by use",
        extend="both",
        shrink=min(0.9, 4 / figure.get_figheight()),
        aspect=30,
    )
    return figure


def _order(table: np.ndarray) -> np.ndarray:
    if len(table) < 3:
        return np.arange(len(table))
    both = (table + table.T) / 2
    apart = both.max() - both
    return np.asarray(leaves_list(linkage(apart[np.triu_indices(len(table), 1)], "average")))
