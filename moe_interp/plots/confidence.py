"""Alignment and regret of the classes of confidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_interp.errors import DataError
from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, panels, whiskers
from moe_interp.results.tables import Classing, CounterfactualTables

_LOOK: dict[Classing, tuple[str, str, str]] = {
    "resampled": (BLUE, "o", "by other routes' mean p"),
    "entropy": (GREEN, "s", "by entropy of other routes' mean prediction"),
    "standard": (ORANGE, "^", "by p of the standard route (selects)"),
}


def confidence(result: CounterfactualTables, by: Sequence[Classing] = tuple(_LOOK)) -> Figure:
    """Alignment (left) and regret (right) of fragile, middle and confident tokens, with intervals.

    The ways of classing stand side by side: classing by the standard route's own p makes regret fall with confidence by
    selection alone. A way that the result has no data for is left out; a panel without any value says "undefined" (an
    alignment needs three routes).

    Raises:
        DataError: no way of classing is left.
    """
    tables = {name: table for name in by if (table := _table(result, name)) is not None}
    if not tables:
        raise DataError(f"classes {tuple(by)}", "data for at least one way of classing", "Score a second draw.")
    titles = ["alignment of the router with utility", "regret of the standard route"]
    figure, axes = panels(titles, 3.4, share=False)
    for number, (name, table) in enumerate(tables.items()):
        shift = 0.18 * (number - (len(tables) - 1) / 2)
        for axis, column in zip(axes, ("alignment", "regret")):
            _points(axis, table, column, name, shift)
    first = next(iter(tables.values()))
    for axis, column, label in zip(axes, ("alignment", "regret"), ("Spearman's rho within a token", "nats")):
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set_xticks(range(len(first)), [str(name) for name in first["class"]])
        axis.set_xlim(-0.5, len(first) - 0.5)
        axis.set_ylabel(label, fontsize=9)
        if all(table[column].isna().all() for table in tables.values()):
            axis.text(0.5, 0.5, "undefined", transform=axis.transAxes, ha="center", va="center", color=GREY)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _table(result: CounterfactualTables, by: Classing) -> pd.DataFrame | None:
    try:
        return result.by_confidence(by=by)
    except DataError:
        return None


def _points(axis: Axes, table: pd.DataFrame, column: str, by: Classing, shift: float) -> None:
    colour, marker, label = _LOOK[by]
    values, low, high = (table[name].to_numpy(dtype=float) for name in (column, f"{column}_low", f"{column}_high"))
    axis.errorbar(
        np.arange(len(table)) + shift,
        values,
        yerr=whiskers(values, low, high),
        fmt=marker,
        color=colour,
        label=label,
        capsize=3,
        markersize=6,
    )
