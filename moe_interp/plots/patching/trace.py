"""What restoring experts brings back, by layer and expert, and by layer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREY, panels, thin_ticks


class TraceTables(Protocol):
    """What the figure reads of a result."""

    data: xr.Dataset

    def recovered(self, metric: str | None = None) -> xr.DataArray: ...


def trace(result: TraceTables, metric: str | None = None) -> Figure:
    """The share of the gap between clean and noised that comes back. Left, one expert; grey = not used or not asked.

    Right, everything that the experts of a layer route.
    """
    recovered, kind = result.recovered(metric), result.data["kind"].values
    alone, whole = recovered.sel(cell=kind == "expert"), recovered.sel(cell=kind == "layer")
    layers = whole["layer"].values.tolist()
    n_experts = int(alone["expert"].max()) + 1 if alone.sizes["cell"] else 1
    grid = np.full((len(layers), n_experts), np.nan)
    for layer, expert, value in zip(alone["layer"].values.tolist(), alone["expert"].values, alone.values):
        if layer in layers:
            grid[layers.index(layer), expert] = value
    figure, (map_, bars) = panels(["one expert restored", "the whole layer restored"], 3.2, share=False)
    map_.set_facecolor("#d9d9d9")
    limit = float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    image = map_.pcolormesh(np.ma.masked_invalid(grid), cmap="RdBu", norm=Normalize(-limit, limit), edgecolors="white")
    figure.colorbar(image, ax=map_, shrink=0.9).set_label("share of the gap", fontsize=9)
    places, texts = thin_ticks([str(expert) for expert in range(n_experts)], 16)
    map_.set_xticks([place + 0.5 for place in places], texts)
    places, texts = thin_ticks([str(layer) for layer in layers], 16)
    map_.set_yticks([place + 0.5 for place in places], texts)
    map_.set_xlabel("expert", fontsize=9)
    map_.set_ylabel("layer", fontsize=9)
    bars.bar(range(len(layers)), whole.values, color=BLUE)
    bars.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    bars.set_xticks(places, texts)
    bars.set_xlabel("layer", fontsize=9)
    bars.set_ylabel("share of the gap", fontsize=9)
    return figure
