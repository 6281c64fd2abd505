"""Share of the slots of every expert against even use."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREY, ORANGE, panels, thin_ticks, whiskers
from moe_interp.results.tables import IsolationTables


def dominance(result: IsolationTables) -> Figure:
    """Each expert's share of a domain's slots (mean over layers) with its interval, one panel a domain.

    The dashed line is even use, 1/E. Experts of which the table says so are orange: above it by an
    interval that is corrected for the number of experts, of enough items.
    """
    table = result.dominance()
    domains = list(dict.fromkeys(table["domain"]))
    figure, axes = panels(domains, 2.4)
    for axis, domain in zip(axes, domains):
        here = table[table["domain"] == domain]
        share, low, high, even = (here[name].to_numpy() for name in ("share", "low", "high", "uniform"))
        places = np.arange(len(here))
        axis.bar(
            places,
            share,
            yerr=whiskers(share, low, high),
            color=np.where(here["verdict"] == "above even use", ORANGE, BLUE).tolist(),
            width=0.8,
            error_kw={"elinewidth": 0.9, "ecolor": "black"},
        )
        axis.axhline(even[0], color=GREY, linewidth=1, linestyle="--")
        axis.set_xticks(*thin_ticks([str(e) for e in here["expert"]], 16))
        axis.set_xlim(-0.7, len(here) - 0.3)
        axis.set_xlabel("expert", fontsize=9)
        axis.set_ylabel("share of slots", fontsize=9)
    figure.suptitle(
        f"Share of slots, mean over layers; dashed: even use {table['uniform'].iloc[0]:.4f}; "
        "orange: above even use, corrected for the number of experts",
        fontsize=10,
    )
    return figure
