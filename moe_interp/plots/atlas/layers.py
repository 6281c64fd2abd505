"""The measures of an atlas along the depth of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, panels
from moe_interp.results.tables import AtlasTables

# title -> (label, variable, variable by chance or None)
CURVES: dict[str, list[tuple[str, str, str | None]]] = {
    "effective experts (share of all)": [("", "effective_experts", None)],
    "busiest expert above even use (times)": [("", "max_violation", None)],
    "domain told by experts (nats)": [("", "domain_information", "domain_information_null")],
    "vocabulary specialization": [
        ("input id", "vocabulary_input", "vocabulary_input_chance"),
        ("next id", "vocabulary_next", "vocabulary_next_chance"),
        ("predicted id", "vocabulary_predicted", "vocabulary_predicted_chance"),
    ],
    "next layer told by experts (nats)": [("", "transition_information", None)],
    "tokens on the most common paths": [("", "path_covered", "path_covered_expected")],
    "margin (logits)": [("", "margin", None)],
    "smallest weight in use": [("", "smallest_weight", None)],
    "routes shared with the other trace": [("", "saturation", "saturation_chance")],
}


def layer_curves(result: AtlasTables) -> Figure:
    """Every measure that has one number a layer, one panel each; bands: 95% over sequences; dashed: by chance."""
    data = result.data
    shown = {
        title: [line for line in lines if line[1] in data and np.isfinite(data[line[1]].values).any()]
        for title, lines in CURVES.items()
    }
    shown = {title: lines for title, lines in shown.items() if lines}
    figure, axes = panels(list(shown), 1.9, 2, share=False)
    for axis, lines in zip(axes, shown.values()):
        for line, colour in zip(lines, (BLUE, ORANGE, GREEN)):
            _draw(axis, data, line, colour)
        if len(lines) > 1:
            axis.legend(fontsize=8, frameon=False, loc="upper center", ncols=len(lines))
        axis.set_xlabel("layer", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        low, high = axis.get_ylim()
        room = 1.05 if len(lines) == 1 else 1.25  # the legend stands above
        axis.set_ylim(min(0.0, low), low + room * (high - low))
    figure.suptitle("dashed: by chance; bands: 95% over sequences", fontsize=10)
    return figure


def _draw(axis: Axes, data: Any, line: tuple[str, str, str | None], colour: str) -> None:
    label, name, chance = line
    layers = data["layer"].values
    axis.plot(layers, data[name].values, "o-", color=colour, markersize=3, linewidth=1.2, label=label)
    if f"{name}_low" in data:
        low, high = data[f"{name}_low"].values, data[f"{name}_high"].values
        axis.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
    if chance and chance in data:
        colour = colour if label else GREY
        axis.plot(layers, data[chance].values, "--", color=colour, linewidth=1)
