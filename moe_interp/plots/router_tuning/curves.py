"""A router over training: held-out cross-entropy, and which routes it prefers and takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, panels

SHOWN = (("preference", "preference", BLUE), ("adoption", "adoption", ORANGE), ("changed", "route changed", GREEN))


def tuning_curves(result: Any) -> Figure:
    """Held-out cross-entropy, preference and adoption with their intervals, and the training loss, by step.

    Preference that rises while adoption stays near 0 is no better route taken. A half of preference is what an
    untuned router has by definition.
    """
    table, data = result.curve(), result.data
    figure, axes = panels(["Held-out cross-entropy", "Better routes, held-out", "Training loss"], 2.6, share=False)
    steps = table["step"].to_numpy(dtype=float)
    for axis, columns in zip(axes, ((("ce", "cross-entropy", BLUE),), SHOWN)):
        for name, label, colour in columns:
            axis.plot(steps, table[name].to_numpy(dtype=float), "o-", color=colour, markersize=4, label=label)
            low, high = (table[f"{name}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
            known = np.isfinite(low) & np.isfinite(high)
            axis.fill_between(steps[known], low[known], high[known], color=colour, alpha=0.15, linewidth=0)
    axes[0].set_ylabel("nats a token", fontsize=9)
    axes[1].set_ylabel("share of tokens", fontsize=9)
    axes[1].set_ylim(-0.02, 1.02)
    axes[1].legend(fontsize=8, frameon=False)
    axes[2].plot(data["step"].values, data["loss"].values, color=GREY, linewidth=0.8)
    axes[2].set_ylabel(f"{data.attrs['objective']} loss", fontsize=9)
    for axis in axes:
        axis.set_xlabel("step", fontsize=9)
    return figure
