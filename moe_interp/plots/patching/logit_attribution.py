"""Who writes a logit difference: by layer and kind, and by layer and expert."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, RED, panels, thin_ticks

_COLOURS = {"attention": ORANGE, "mixer": ORANGE, "expert": BLUE, "shared": GREEN, "mlp": RED}


class AttributionTables(Protocol):
    """What the figure reads of a result."""

    data: xr.Dataset

    def by_kind(self) -> pd.DataFrame: ...


def logit_attribution(result: AttributionTables) -> Figure:
    """Left, mean contributions by layer and kind, side by side; right, each routed expert's, blue = for the answer."""
    table = result.by_kind()
    figure, (bars, map_) = panels(["by layer and kind", "routed experts"], 3.4, share=False)
    layers = table["layer"].unique().tolist()
    kinds = table["kind"].unique().tolist()
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        rows = table[table["kind"] == kind]
        places = [layers.index(layer) + (number - (len(kinds) - 1) / 2) * width for layer in rows["layer"]]
        bars.bar(places, rows["mean"], width, label=kind, color=_COLOURS.get(kind, GREY))
    bars.axhline(0, color=GREY, linewidth=0.8)
    bars.set_xticks(*thin_ticks(["embedding, biases" if layer < 0 else str(layer) for layer in layers], 16))
    bars.set_xlabel("layer", fontsize=9)
    bars.set_ylabel("mean contribution (logits)", fontsize=9)
    bars.legend(fontsize=8, frameon=False)
    data = result.data.sel(component=result.data["kind"].values == "expert")
    rows_of, columns = np.unique(data["layer"].values), np.arange(int(data["expert"].max()) + 1)
    grid = np.full((len(rows_of), len(columns)), np.nan)
    grid[np.searchsorted(rows_of, data["layer"].values), data["expert"].values] = data["effect"].mean("example").values
    limit = float(np.nanmax(np.abs(grid), initial=0.0)) or 1.0
    image = map_.pcolormesh(np.ma.masked_invalid(grid), cmap="RdBu", norm=Normalize(-limit, limit), edgecolors="white")
    for set_ticks, labels in ((map_.set_xticks, columns), (map_.set_yticks, rows_of)):
        places_, texts = thin_ticks([str(label) for label in labels], 16)
        set_ticks([place + 0.5 for place in places_], texts)
    map_.set_xlabel("expert", fontsize=9)
    map_.set_ylabel("layer", fontsize=9)
    figure.colorbar(image, ax=map_, shrink=0.9).set_label("mean contribution (logits)", fontsize=9)
    return figure
