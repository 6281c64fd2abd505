"""Training strategies side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREY, panels


def strategies(result: Any) -> Figure:
    """Each metric of a comparison's ``runs`` at the last step, one panel a metric: a point a seed, a bar their mean."""
    runs = result.runs
    names = list(dict.fromkeys(runs["strategy"]))
    metrics = [name for name in runs.columns[3:] if not runs[name].isna().all() and not name.startswith("loss_")]
    figure, axes = panels([metric.replace("_", " ") for metric in metrics], 1.9, share=False)
    for axis, metric in zip(axes, metrics):
        for place, name in enumerate(names):
            values = runs.loc[runs["strategy"] == name, metric].to_numpy(dtype=float)
            axis.plot(np.full(len(values), place), values, "o", color=BLUE, alpha=0.6, markersize=5)
            axis.plot([place - 0.25, place + 0.25], [values.mean()] * 2, color=GREY)
        axis.set_xticks(
            range(len(names)), names, rotation=20 if len(names) > 3 else 0, ha="right" if len(names) > 3 else "center"
        )
        axis.set_xlim(-0.6, len(names) - 0.4)
    return figure
