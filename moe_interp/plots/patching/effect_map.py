"""Heat maps of patching effects: layers by position or expert, one panel a slot."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_interp.plots.figure import WIDTH, colour_bar, panels, thin_ticks


class EffectTables(Protocol):
    """What the figure reads of a result."""

    data: xr.Dataset

    def mean(self, metric: str | None = None) -> xr.DataArray: ...


def effect_map(result: EffectTables, metric: str | None = None, examples: bool = False) -> Figure:
    """The mean effect of every cell; blue = raises the metric, red = lowers it, grey = no such cell.

    One colour scale for all panels, which ends at the largest effect. A third axis becomes panels where it is ``slot``;
    estimates by layer, expert and position are summed over positions, as they add up.

    Args:
        result: A sweep, or an attribution.
        metric: Of several metrics, which; the first by default.
        examples: Whether to write the number of examples into the title.
    """
    mean = result.mean(metric)
    summed = " summed over positions" if {"expert", "pos"} <= set(mean.dims) else ""
    if summed:
        mean = mean.sum("pos", skipna=True)
    across = next(str(axis) for axis in mean.dims if axis in ("expert", "pos"))
    parts = [mean.sel(slot=slot) for slot in mean["slot"].values] if "slot" in mean.dims else [mean]
    titles = [f"slot {slot}" for slot in mean["slot"].values] if "slot" in mean.dims else [""]
    values = [part.transpose("layer", across).values for part in parts]
    limit = float(np.nanmax(np.abs(np.stack(values)), initial=0.0)) or 1.0
    layers = [str(layer) for layer in mean["layer"].values]
    columns = [str(place) for place in mean[across].values]
    figure, axes = panels(titles, min(max(0.16 * len(layers) + 1.1, 2.0), 8.0), 1 if len(parts) == 1 else 2)
    for axis, shown in zip(axes, values):
        axis.set_facecolor("#d9d9d9")
        image = axis.pcolormesh(
            np.ma.masked_invalid(shown), cmap="RdBu", norm=Normalize(-limit, limit), edgecolors="white", linewidth=0.3
        )
        for set_ticks, labels, most in ((axis.set_xticks, columns, int(WIDTH * 3)), (axis.set_yticks, layers, 12)):
            places, texts = thin_ticks(labels, most)
            set_ticks([place + 0.5 for place in places], texts)
        axis.set_xlabel("position" if across == "pos" else across, fontsize=9)
        axis.set_ylabel("layer", fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    colour_bar(figure, image, axes, "change of the metric", shrink=0.9, aspect=30, pad=0.02)
    attrs = result.data.attrs
    what = attrs.get("what", f"attribution, {attrs.get('method', '')}{summed}")
    of = f", {attrs['n_examples']} examples" if examples else ""
    figure.suptitle(f"{what}: mean effect on {metric or attrs['metrics'][0]}{of}", fontsize=10)
    return figure
