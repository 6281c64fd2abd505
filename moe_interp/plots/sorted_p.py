"""Sorted p-values against the line of Benjamini and Hochberg."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from moe_interp.errors import DataError
from moe_interp.plots.figure import BLUE, GREY, ORANGE, RED, panels
from moe_interp.results.tables import IsolationTables


def sorted_p(
    result: IsolationTables, baseline: str = "natural", mass: str | None = None, alpha: float = 0.05
) -> Figure:
    """All p-values in order, on logarithmic axes, with the line alpha i / m.

    Step-up rejects every test up to the last one under the line (blue). The dashed line is the smallest p that any
    domain can attain; a floor above the line means that single tests cannot be rejected.

    Raises:
        DataError: No domain has enough items for a test.
    """
    table = result.specialization(baseline=baseline, mass=mass, alpha=alpha)
    tested = table[table["q"].notna()].sort_values("p", kind="stable")
    m = len(tested)
    if m == 0:
        raise DataError("no domain with enough items for a test", "at least 6 items at q <= .05", "Add items.")
    rank = np.arange(1, m + 1)
    found = tested["direction"].isin(["helped", "hurt"]).to_numpy()
    figure, (axis,) = panels([f"{m} tests, q ≤ {alpha}: {found.sum()} rejected"], 3.8)
    p = tested["p"].to_numpy()
    for some, colour, label in ((found, BLUE, "rejected"), (~found, ORANGE, "not rejected")):
        if some.any():
            axis.plot(rank[some], p[some], ".", color=colour, label=label, markersize=5)
    axis.plot(rank, alpha * rank / m, color="black", linewidth=1.2, label="alpha i / m")
    floor = table.attrs["smallest_p"]
    if floor > p.min() / 1e3:
        axis.axhline(floor, color=RED, linewidth=1, linestyle="--", label="smallest attainable p")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(color=GREY, alpha=0.2, linewidth=0.5)
    axis.set_xlabel("rank i", fontsize=9)
    axis.set_ylabel("p", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    return figure
