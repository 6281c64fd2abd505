"""The chapter of a counterfactual-routes run: figures, tables, and the text with its tokens coloured by regret."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from moe_interp import plots
from moe_interp.report.html import with_intervals
from moe_interp.report.page import Chapter, Section, render_page, section
from moe_interp.report.tokens import token_view
from moe_interp.results.tables import CounterfactualTables, classed_by


def counterfactual_chapter(result: CounterfactualTables, title: str = "Counterfactual routes") -> Chapter:
    """Summary, three figures, tables, and the token view. Every number comes from a table of the result."""
    sections = [
        section(name, heading, text, draw and partial(draw, result), tabulate and partial(_tabulate, tabulate, result))
        for name, heading, text, draw, tabulate in _PARTS
    ]
    sections.append(Section("Token by token", "", view=token_view(result)))
    return Chapter(
        title,
        result.summary(),
        tuple(sections),
        headlines=tuple(result.headlines()),
        manifest=getattr(result, "manifest", None),
    )


def counterfactual_page(result: CounterfactualTables, *, extra: Mapping[str, str] | None = None) -> str:
    """A page of this chapter alone; ``extra`` as in :func:`moe_interp.report.render_page`."""
    return render_page([counterfactual_chapter(result)], model=result.data.attrs.get("model", ""), extra=extra)


def _tabulate(tabulate: Table, result: CounterfactualTables) -> pd.DataFrame:
    table = tabulate(result)
    if "kind" in table:
        table = table.assign(kind=table["kind"].str.replace("_", " "))
    return with_intervals(table[[c for c in table if str(c).removesuffix("_low").removesuffix("_high") in _SHOWN]])


# the widest table that still fits a page; the rest is in the result
_SHOWN = {
    *("class", "kind", "layer", "token_type", "positions", "n_tokens", "n_distinct", "matched"),
    *("regret", "excess_regret", "positive_rate", "inclusion_1", "alignment", "verdict"),
}
Draw = Callable[[CounterfactualTables], Figure]
Table = Callable[[CounterfactualTables], pd.DataFrame]

# name, title, sentence, figure, table
_PARTS: tuple[tuple[str, str, str, Draw | None, Table | None], ...] = (
    (
        "confidence",
        "Is the router right where the model is confident?",
        "Alignment: rank correlation, within a token, of the router's log-probability of a route and how well the "
        "route predicts the next token. Regret: what the best route scored would have gained. Positive rate: the "
        "share of tokens with a better route than the standard one, the router's own. Inclusion 1: the share whose "
        "standard route is the best of those scored. N distinct: other routes per token. The table's classes are by "
        "a second draw of routes, free of the selection that classing by the standard route's own p brings; by that "
        "p where the run has no such draw.",
        plots.confidence,
        lambda r: r.by_confidence(by=classed_by(r.data)),
    ),
    (
        "regret-curve",
        "Is that regret more than luck?",
        "The best of many routes is better than one by chance alone. So the same is asked of a next token drawn from "
        "the model's own prediction (which is a null only where that prediction is calibrated), of random routes, of a "
        "fresh draw of routes (another draw by the same sampler, one of which takes the standard route's place), and "
        "of the standard route itself. Excess regret: the run's regret minus that of the row. N distinct: other routes "
        "per token. Matched: the share of tokens that can be compared.",
        plots.regret_curve,
        lambda r: r.controls(),
    ),
    (
        "layer-regret",
        "Layer by layer",
        "Means over tokens; columns as above.",
        plots.layer_regret,
        lambda r: r.by_layer(),
    ),
    ("token-types", "By the kind of the next token", "Columns as above.", None, lambda r: r.by_token_type()),
    (
        "positions",
        "By position",
        "Columns as above; the position is that of the token whose routes are scored.",
        None,
        lambda r: r.by_position(),
    ),
)
