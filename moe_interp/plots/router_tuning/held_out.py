"""What tuning a router did to tokens that it was not tuned on."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_interp.plots.figure import BLUE, GREY, panels, whiskers


def tuning_held_out(result: Any) -> Figure:
    """Change of cross-entropy by domain and by the untuned model's confidence, with intervals over sequences.

    Below 0 is better. A rise on confident tokens or in another domain is the harm that tuning did.
    """
    table = result.held_out()
    figure, (axis,) = panels([""], 0.6 + 0.28 * len(table))
    change, low, high = (table[name].to_numpy(dtype=float) for name in ("ce_change", "ce_change_low", "ce_change_high"))
    places = np.arange(len(table))[::-1]
    axis.errorbar(change, places, xerr=whiskers(change, low, high), fmt="o", color=BLUE, capsize=3, markersize=5)
    axis.axvline(0, color=GREY, linewidth=0.8)
    labels = [f"{row['domain']}, {row['tokens']} ({row['n_tokens']})" for row in table.to_dict("records")]
    axis.set_yticks(places, labels)
    axis.set_ylim(-0.6, len(table) - 0.4)
    axis.set_xlabel("change of cross-entropy (nats a token)", fontsize=9)
    return figure
