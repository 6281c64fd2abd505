"""Overlap of experts, layer by layer: unrelated inputs, the same token, prompt and generation, two models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, panels, thin_ticks
from moe_interp.results.tables import GeometryTables


def depth_overlap(result: GeometryTables) -> Figure:
    """Curves over layers with their intervals over sequences; dotted and dashed lines are chance levels.

    One panel for unrelated inputs, and one more for each of these that the result has: the same token in two contexts
    (against different tokens), a prompt and its generation (against another's), two models (against one on two
    questions).
    """
    data = result.data
    wanted: list[tuple[str, str, list[tuple[str, str, str]], list[tuple[str, str, str]]]] = [
        (
            f"Unrelated inputs: Jaccard@{data.attrs.get('p', 0.8):g}",
            "overlap",
            [("overlap", "measured", BLUE)],
            [("size_matched", "random sets of the sizes", ":"), ("usage_matched", "random, by overall use", "--")],
        ),
        (
            "One token in two contexts: share of experts",
            "same_token",
            [("same_token", "same token", BLUE), ("different_token", "different tokens", ORANGE)],
            [],
        ),
        (
            "Prompt and generation: Jaccard@p",
            "phase_same",
            [("phase_same", "its own", BLUE), ("phase_other", "another's", ORANGE)],
            [],
        ),
        (
            "Two models: Jaccard@p",
            "answer_same",
            [
                ("answer_same", "two models, one question", BLUE),
                ("answer_other", "one model, two questions", ORANGE),
                ("answer_crossed", "two models, two questions", GREEN),
            ],
            [("answer_chance", "random sets of the sizes", ":")],
        ),
    ]
    shown = [part for part in wanted if part[1] in data]
    figure, axes = panels([title for title, *_ in shown], 2.9)
    labels = [str(layer) for layer in data["layer"].values]
    for axis, (_, _, curves, chances) in zip(axes, shown):
        for name, label, colour in curves:
            _curve(axis, data, name, label, colour)
        for name, label, style in chances:
            axis.plot(range(len(labels)), data[name].values, color=GREY, linestyle=style, linewidth=1.4, label=label)
        axis.set_xticks(*thin_ticks(labels, 16))
        axis.set_ylim(0, 1)
        axis.set_xlabel("layer", fontsize=9)
        axis.set_ylabel("overlap", fontsize=9)
        axis.legend(fontsize=7.5, frameon=False, loc="best")
    return figure


def _curve(axis: Axes, data: Any, name: str, label: str, colour: str) -> None:
    places = np.arange(data.sizes["layer"])
    values = data[name].values
    table = pd.DataFrame({"low": data[f"{name}_low"].values, "high": data[f"{name}_high"].values})
    axis.plot(places, values, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
    if table.notna().to_numpy().all():
        axis.fill_between(places, table["low"], table["high"], color=colour, alpha=0.2, linewidth=0)
