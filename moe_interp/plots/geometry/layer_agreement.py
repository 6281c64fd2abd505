"""Do two layers find the same sequences alike: layer by layer."""

from __future__ import annotations

from matplotlib.figure import Figure

from moe_interp.plots.figure import WIDTH, colour_bar, panels, thin_ticks
from moe_interp.results.tables import GeometryTables


def layer_agreement(result: GeometryTables) -> Figure:
    """Correlation, over pairs of sequences, of how alike two layers route them; 1 on the diagonal.

    Experts of different layers have no correspondence, so what is compared is which sequences share experts.
    """
    data = result.data
    values = data["route_agreement"].values
    layers = [str(layer) for layer in data["layer"].values]
    figure, (axis,) = panels(["Which sequences share experts: agreement of layers"], min(WIDTH * 0.6, 5.0))
    figure.set_figwidth(6.2)  # square, without empty space beside it
    image = axis.imshow(values, cmap="RdBu", vmin=-1, vmax=1, origin="lower")
    if len(layers) <= 8:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 else "black"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(*thin_ticks(layers, 16))
    axis.set_yticks(*thin_ticks(layers, 16))
    axis.set_xlabel("layer", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    colour_bar(figure, image, axis, "correlation of route similarity", shrink=0.9, pad=0.02)
    return figure
