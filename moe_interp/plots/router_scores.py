"""What other routers change in the answers, domain by domain."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, panels, whiskers
from moe_interp.results.tables import RouterTables

_COLOURS = (BLUE, ORANGE, GREEN)


def router_scores(result: RouterTables, against: str = "natural") -> Figure:
    """Mean difference in score to the router ``against``, with 95% intervals over items; above zero = better.

    A group of points is a domain; the last one is all items.
    """
    table = result.compare(against=against)
    figure, (axis,) = panels([""], 3.2)
    routers, domains = list(dict.fromkeys(table["router"])), list(dict.fromkeys(table["domain"]))
    for number, router in enumerate(routers):
        rows = table[table["router"] == router]
        mean, low, high = (rows[name].to_numpy(dtype=float) for name in ("mean", "ci_low", "ci_high"))
        axis.errorbar(
            np.arange(len(rows)) + 0.18 * (number - (len(routers) - 1) / 2),
            mean,
            yerr=whiskers(mean, low, high),
            fmt="o",
            color=_COLOURS[number % len(_COLOURS)],
            label=router,
            capsize=3,
        )
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xticks(range(len(domains)), domains)
    axis.set_xlim(-0.6, len(domains) - 0.4)
    axis.set_ylabel(f"score against {against} routing\n(nats per answer token)", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    return figure
