"""How strongly routers read a direction, over training."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, RED, panels

_COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)
_STYLES = ("-", "--", ":")
NAMES = {
    "shared_gain": "along the mean input",
    "domain_gain": "along the domains' means",
    "principal_gain": "along principal axes",
    "centred_gain": "of centred inputs",
    "random_gain": "along random directions",
    "shared_offset": "of the mean input, in spreads of the logits",
}


def gain_over_training(
    result: Any, gain: str = "shared_gain", against: str | None = "random_gain", baseline: str | None = None
) -> Figure:
    """A comparison's gain divided by another, one panel a layer, one line a strategy: geometric mean and interval.

    Args:
        result: A comparison of training strategies.
        gain, against: As in ``ComparisonResult.gains``.
        baseline: A strategy: lines are the other strategies' gains divided by its own, seed by seed.

    Raises:
        ConfigError: No such gain or strategy.
        DataError: The runs did not measure gains.
    """
    names = [str(name) for name in result.data["strategy"].values if str(name) != baseline]
    layers = [int(layer) for layer in result.data["layer"].values]
    figure, axes = panels([f"layer {layer}" for layer in layers], 2.4)
    for number, name in enumerate(names):
        table = result.gains(name, baseline, gain=gain, against=against)
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]
        for axis, layer in zip(axes, layers):
            here = table[table["layer"] == layer]
            axis.plot(here["step"], here["ratio"], style, color=colour, marker=".", label=name)
            drawn = np.isfinite(here["high"])  # a wide interval over few seeds can be endless on this axis
            axis.fill_between(here["step"], here["low"], here["high"], where=drawn, color=colour, alpha=0.15, lw=0)
    shown = np.concatenate([line.get_ydata() for axis in axes for line in axis.lines] or [np.ones(1)]).astype(float)
    shown = shown[np.isfinite(shown) & (shown > 0)]
    for axis in axes:
        axis.axhline(1, color=GREY, linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(min([1.0, *shown]) / 1.6, max([1.0, *shown]) * 1.6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("step", fontsize=9)
    what = f"gain {NAMES.get(gain, gain)}"
    what += "" if against is None else f"\n/ {NAMES.get(against, against)}"
    axes[0].set_ylabel(what + ("" if baseline is None else f"\n/ that of {baseline}"), fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
