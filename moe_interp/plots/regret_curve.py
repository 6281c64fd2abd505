"""Regret against the number of routes, beside the controls."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, RED, panels, whiskers
from moe_interp.results.tables import CounterfactualTables

_LOOK = {
    "router": (BLUE, "-", "router's routes"),
    "random": (ORANGE, "--", "random routes"),
    "own_prediction": (GREEN, "-.", "target from the model's own prediction"),
    "fresh_draw": (RED, ":", "a fresh route in the standard one's place"),
    "null": (GREY, "-", "null route (one alternative)"),
}
_MATCHED = {
    "own_prediction": "router's routes, on the tokens of the drawn target",
    "fresh_draw": "router's routes, on the tokens of the fresh route",
}


def regret_curve(result: CounterfactualTables) -> Figure:
    """Regret against the best of n distinct routes, for the router's routes and the controls, with intervals.

    The best of n grows with n also where no route is better than another: what counts is the distance between the
    router's routes and the controls at the same n. Two controls compare only some of the tokens (a drawn target within
    bins of its probability; a fresh route where it is another one): each is to be held against the thin line of its own
    colour, the router's routes on the same tokens, not against the line of all tokens.
    """
    table = result.regret_curve()
    figure, (axis,) = panels([""], 4.1)
    of_all = table[table["kind"] == "router"].sort_values("n")["regret"].to_numpy()
    for kind in dict.fromkeys(table["kind"]):
        here = table[table["kind"] == kind].sort_values("n")
        colour, style, label = _LOOK.get(str(kind), (GREY, "-", str(kind).replace("_", " ")))
        axis.plot(here["n"], here["regret"], style, marker="o", markersize=4, color=colour, label=label)
        if len(here) > 1:
            axis.fill_between(here["n"], here["low"], here["high"], color=colour, alpha=0.15, linewidth=0)
        else:
            values, low, high = (here[name].to_numpy(dtype=float) for name in ("regret", "low", "high"))
            axis.errorbar(here["n"], values, yerr=whiskers(values, low, high), fmt="none", color=colour, capsize=3)
        own = here["router_regret"].to_numpy(dtype=float)
        if kind in _MATCHED and not np.allclose(own, of_all, equal_nan=True):
            axis.plot(here["n"], own, "-", marker=".", linewidth=0.8, color=colour, label=_MATCHED[str(kind)])
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    numbers = sorted(set(table["n"]))
    axis.set_xticks(numbers, [str(n) for n in numbers])
    axis.set_xlabel("distinct routes besides the standard one", fontsize=9)
    axis.set_ylabel("regret (nats)", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
