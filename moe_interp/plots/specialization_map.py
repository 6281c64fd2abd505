"""Expert by layer heat maps of delta, one a domain, with significance marks."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_interp.plots.figure import WIDTH, panels, thin_ticks
from moe_interp.results.tables import IsolationTables


def specialization_map(
    result: IsolationTables, baseline: str = "natural", mass: str | None = None, alpha: float = 0.05
) -> Figure:
    """Mean delta of every expert and layer, one panel a domain; blue = better than the baseline, red = worse.

    A triangle marks q <= ``alpha``: upwards helped, downwards hurt. All panels share one colour scale; it ends at the
    98th percentile of abs(mean delta), so that one extreme cell does not hide the rest.
    """
    table = result.specialization(baseline=baseline, mass=mass, alpha=alpha)
    layers, experts = list(result.data["layer"].values), [str(e) for e in result.data["expert"].values]
    domains = list(dict.fromkeys(table["domain"]))
    columns = 1 if len(experts) > 40 else 2
    height = min(max(0.13 * len(layers) + 1.1, 2.0), 8.0)
    figure, axes = panels(domains, height, columns)
    # (domain * layer * expert) -> (domain, layer, expert): the table's order
    shape = (len(domains), len(layers), len(experts))
    mean = table["mean"].to_numpy().reshape(shape)
    words = table["direction"].to_numpy().reshape(shape)
    limit = float(np.quantile(np.abs(mean), 0.98)) or 1.0
    cell = 72 * (WIDTH / min(columns, len(domains)) - 1) / len(experts)  # width in points
    for axis, values, marks in zip(axes, mean, words):
        image = axis.pcolormesh(values, cmap="RdBu", norm=Normalize(-limit, limit), edgecolors="white", linewidth=0.4)
        for word, marker in (("helped", "^"), ("hurt", "v")):
            row, column = np.nonzero(marks == word)
            dark = np.abs(values[row, column]) > 0.6 * limit
            axis.scatter(
                column + 0.5,
                row + 0.5,
                s=min(cell * 0.4, 7) ** 2,
                marker=marker,
                c=np.where(dark, "white", "black"),
                linewidths=0,
                label=word,
            )
        axis.set_xticks(*_centred(thin_ticks(experts, 16 if columns == 2 else 32)))
        axis.set_yticks(*_centred(thin_ticks(layers, 12)))
        axis.set_xlabel("expert", fontsize=9)
        axis.set_ylabel("layer", fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(
        image, ax=axes, extend="both", shrink=min(0.9, 4 / figure.get_figheight()), aspect=30, pad=0.02
    )
    attrs = table.attrs
    bar.set_label(f"mean delta against {attrs['baseline']} routing\n(nats per answer token)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(
        f"{attrs['helped']} helped (▲) and {attrs['hurt']} hurt (▼) of {attrs['n_tests']} tests, q ≤ {alpha}; "
        f"mass {attrs['mass']}",
        fontsize=10,
    )
    return figure


def _centred(ticks: tuple[list[int], list[str]]) -> tuple[list[float], list[str]]:
    return [place + 0.5 for place in ticks[0]], ticks[1]
