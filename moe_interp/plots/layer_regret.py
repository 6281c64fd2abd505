"""Regret of the standard routes, layer by layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, panels, thin_ticks, whiskers
from moe_interp.results.tables import CounterfactualTables


def layer_regret(result: CounterfactualTables) -> Figure:
    """Mean regret of each layer with its interval.

    Regret of a best of many routes is above zero even where no route is better than another: compare layers with each
    other, and the height with the controls of :func:`moe_interp.plots.regret_curve`.
    """
    table = result.by_layer()
    figure, (axis,) = panels([""], 3.2)
    regret, low, high = (table[name].to_numpy(dtype=float) for name in ("regret", "regret_low", "regret_high"))
    places = np.arange(len(table))
    axis.errorbar(places, regret, yerr=whiskers(regret, low, high), fmt="o", color=BLUE, capsize=3, markersize=6)
    axis.set_xticks(*thin_ticks([str(layer) for layer in table["layer"]], 32))
    axis.set_xlim(-0.6, len(table) - 0.4)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("regret (nats)", fontsize=9)
    return figure
