"""Direct against total effects of experts on later routers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from moe_interp.plots.figure import GREY, panels


class PathTables(Protocol):
    """What the figure reads of a result."""

    data: xr.Dataset

    def table_of_sources(self, layer: int | None = None) -> pd.DataFrame: ...


def paths(result: PathTables) -> Figure:
    """One panel a layer read: each source's mean total effect against its direct one; on the line, all is direct."""
    table = result.table_of_sources()
    layers = table["layer"].unique().tolist()
    figure, axes = panels([f"router of layer {layer}" for layer in layers], 3.0, columns=3)
    limit = float(np.nanmax(table[["direct", "total"]].abs().to_numpy(), initial=0.0)) * 1.1 or 1.0
    from_layer = result.data["source_layer"].to_series()
    for axis, layer in zip(axes, layers):
        rows = table[table["layer"] == layer]
        axis.plot([-limit, limit], [-limit, limit], color=GREY, linewidth=0.8, zorder=1)
        shades = from_layer.loc[rows["source"]].to_numpy()
        image = axis.scatter(
            rows["direct"], rows["total"], c=shades, cmap="viridis", vmin=from_layer.min(), vmax=from_layer.max(), s=18
        )
        axis.set_xlabel("direct effect (logits)", fontsize=9)
        axis.set_ylabel("total effect (logits)", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("layer of the source", fontsize=9)
    return figure
