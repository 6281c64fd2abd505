"""Which experts serve which domain, layer by layer."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_interp.errors import DataError
from moe_interp.plots.figure import WIDTH, colour_bar, panels, thin_ticks
from moe_interp.results.tables import AtlasTables


def domain_map(result: AtlasTables, alpha: float = 0.05) -> Figure:
    """Share of a domain's tokens that each expert serves, less that of all other tokens; one panel a domain.

    Blue: the domain uses the expert more than the others; a dot marks q <= ``alpha``. One colour scale, to the 99th
    percentile of the sizes. Without differences (a corpus of few sequences, or counts alone), the share less even use.

    Raises:
        DataError: no domains.
    """
    data = result.data
    if "domain_share" not in data:
        raise DataError("an atlas without domains", "routes with labels", "Pass {domain: trace}.")
    tested = "domain_difference" in data
    if tested:
        values, what = data["domain_difference"].values, "share of tokens, less that of the other domains"
    else:
        values = (data["domain_share"] - data["domain_baseline"]).transpose("domain", "layer", "expert").values
        what = "share of tokens, less even use"
    domains, layers = data["domain"].values.astype(str).tolist(), data["layer"].values.tolist()
    n_experts = data.sizes["expert"]
    columns = 1 if n_experts > 40 else 2
    figure, axes = panels(domains, min(max(0.13 * len(layers) + 1.1, 1.8), 8.0), columns)
    finite = np.abs(values[np.isfinite(values)])
    limit = float(np.quantile(finite, 0.99)) if finite.size else 1.0
    cell = 72 * (WIDTH / min(columns, len(domains)) - 1) / n_experts
    for place, axis in enumerate(axes):
        image = axis.pcolormesh(values[place], cmap="RdBu", norm=Normalize(-(limit or 1.0), limit or 1.0))
        if tested:
            row, column = np.nonzero(np.nan_to_num(data["domain_q"].values[place], nan=1.0) <= alpha)
            axis.scatter(column + 0.5, row + 0.5, s=min(cell * 0.4, 5) ** 2, c="black", linewidths=0)
        at, names = thin_ticks([str(e) for e in data["expert"].values], 16 if columns == 2 else 32)
        axis.set_xticks([x + 0.5 for x in at], names)
        at, names = thin_ticks([str(layer) for layer in layers], 12)
        axis.set_yticks([y + 0.5 for y in at], names)
        axis.set_xlabel("expert", fontsize=9)
        axis.set_ylabel("layer", fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    colour_bar(figure, image, axes, what, extend="both", shrink=min(0.9, 4 / figure.get_figheight()), aspect=30)
    if tested:
        found = int((np.nan_to_num(data["domain_q"].values, nan=1.0) <= alpha).sum())
        figure.suptitle(f"{found} cells (dots) differ, q ≤ {alpha:g}, labels permuted over sequences", fontsize=10)
    return figure
