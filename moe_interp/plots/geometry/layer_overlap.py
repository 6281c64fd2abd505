"""Do two layers use the same experts for a sequence, once they are matched: layer by layer, of one run or of two."""

from __future__ import annotations

from matplotlib.figure import Figure

from moe_interp.plots.figure import colour_bar, panels, thin_ticks
from moe_interp.results.tables import GeometryTables


def layer_overlap(result: GeometryTables) -> Figure:
    """Jaccard@p of the experts that a sequence uses at two layers, experts matched; the second panel is of two models.

    The title says how experts are matched; a layer with itself is 1 where the run is the same.

    Raises:
        DataError: a result without it.
    """
    table, attrs = result.layer_overlap(), result.data.attrs
    runs = [run for run in ("itself", "other") if (table["run"] == run).any()]
    titles = {
        "itself": "One model (matched by usage)",
        "other": f"Two models (matched by {attrs.get('answer_matching')})",
    }
    figure, axes = panels([titles[run] for run in runs], 3.6)
    if len(runs) == 1:
        figure.set_figwidth(4.9)  # square, without empty space beside it
    for axis, run in zip(axes, runs):
        values = table[table["run"] == run].pivot(index="layer", columns="other_layer", values="overlap").to_numpy()
        layers = [str(layer) for layer in result.data["layer"].values]
        image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1, origin="lower")
        if len(layers) <= 8:
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    colour = "white" if value > 0.6 else "black"
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(*thin_ticks(layers, 16))
        axis.set_yticks(*thin_ticks(layers, 16))
        axis.set_xlabel("layer" if run == "itself" else "layer of the other model", fontsize=9)
        axis.set_ylabel("layer", fontsize=9)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    colour_bar(figure, image, axes, f"Jaccard@{attrs.get('p', 0.8):g}", shrink=0.9, pad=0.02)
    return figure
