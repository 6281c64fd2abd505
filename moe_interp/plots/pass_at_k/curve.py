"""pass@K against K."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moe_interp.plots.figure import BLUE, GREEN, GREY, ORANGE, RED, panels
from moe_interp.results.tables import PassAtKTables

_COLOURS = (BLUE, ORANGE, GREEN, RED)


def pass_at_k(result: PassAtKTables, others: dict[str, PassAtKTables] | None = None, label: str = "this run") -> Figure:
    """Mean pass@K over problems for K = 1, 2, 4, ... with 95% bootstrap bands, and the run's own K marked.

    Bands of runs on the same problems move together: whether two of them differ is what ``compare`` says, not whether
    their bands overlap.

    Args:
        result: A run.
        others: Further runs by name, drawn beside it.
        label: What ``result`` is called where there are others.
    """
    figure, (axis,) = panels([""], 3.6)
    largest = 1
    for number, (name, run) in enumerate({label: result, **(others or {})}.items()):
        n, marked = int(run.data["n"].values.min()), [int(k) for k in run.data["k"].values]
        ks = sorted({2**power for power in range(n.bit_length())} | {k for k in marked if k <= n} | {n})
        table = run.curve(ks)
        colour = _COLOURS[number % len(_COLOURS)]
        axis.plot(table["k"], table["mean"], color=colour, label=name)
        axis.fill_between(table["k"], table["ci_low"], table["ci_high"], color=colour, alpha=0.15, linewidth=0)
        own = table[table["k"].isin(marked)]
        axis.plot(own["k"], own["mean"], "o", markersize=4, color=colour)
        largest = max(largest, n)
    ticks = [2**power for power in range(largest.bit_length())]
    axis.set_xscale("log", base=2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_ylim(0, 1.02)
    axis.axhline(1, color=GREY, linewidth=0.5)
    axis.set_xlabel("K, completions that are allowed", fontsize=9)
    axis.set_ylabel("pass@K", fontsize=9)
    if others:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    return figure
