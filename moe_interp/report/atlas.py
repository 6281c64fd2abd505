"""The chapter of an atlas of recorded routing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd
from markupsafe import Markup

from moe_interp import plots
from moe_interp.report.html import cell, html_table, with_intervals
from moe_interp.report.page import Chapter, Section, render_page, section
from moe_interp.results.tables import AtlasTables

_DOMAINS = (
    "Share of a domain's tokens that an expert serves, less its share of all other tokens. q is by permutation of the "
    "labels over whole sequences (Benjamini-Hochberg over all cells): tokens of one text are no independent evidence."
)
_LOAD = "Share of a layer's slots. Effective experts is exp(entropy) over the number of experts, 1 when use is even."
_PAIRS = (
    "Share of an expert's tokens that another one serves as well, N(i, j) / N(i) over all pairs of slots, less what "
    "random routes of the same size and use would give."
)
_FLOW = "Transitions between consecutive layers that are more frequent than if layers were independent."
_PATHS = (
    "The most common sequences of top-1 experts over consecutive layers, with the share that independent layers would "
    "give. Paths of one cluster differ in at most one layer."
)
_SIDE_BY_SIDE = 8
_LAYERS = "Chance is independence, or labels permuted over sequences. An interval needs several sequences."


def atlas_chapter(result: AtlasTables, title: str = "Atlas of routing") -> Chapter:
    """Findings, figures and tables of what the routes allow, and what they do not."""
    data = result.data
    sections: list[Section] = []
    if "domain_share" in data:
        draw = partial(plots.domain_map, result)
        sections.append(section("atlas-domains", "Which experts serve which domain?", _DOMAINS, draw))
        sections.append(
            section("busiest", "The busiest expert of each domain", "", tabulate=lambda: _intervals(result.busiest()))
        )
    if "domain_difference" in data:
        sections.append(section("specialists", "The largest differences", "", tabulate=result.specialists))
    sections.append(section("atlas-layers", "Through the layers", _LAYERS, partial(plots.layer_curves, result)))
    sections.append(section("atlas-load", "How evenly are experts used?", _LOAD, partial(plots.load_bars, result)))
    if "co_activation" in data:
        draw = partial(plots.co_activation_map, result)
        sections.append(section("atlas-pairs", "Which experts work together?", _PAIRS, draw, lambda: result.pairs(1)))
    if "transition_probability" in data:
        draw = partial(plots.transition_flow, result)
        sections.append(section("atlas-flow", "From layer to layer", _FLOW, draw))
    if "path" in data:
        sections.append(section("atlas-paths", "Common paths", _PATHS, tabulate=result.paths))
    sections.append(Section("Layer by layer", "", table=_by_measure(_intervals(result.by_layer()))))
    if result.not_testable:
        rows = pd.DataFrame({"measure": list(result.not_testable), "why": list(result.not_testable.values())})
        sections.append(section("not-testable", "Not testable", "", tabulate=lambda: rows))
    headlines = tuple(result.headlines())
    return Chapter(title, result.summary(), tuple(sections), headlines, manifest=getattr(result, "manifest", None))


def atlas_page(result: AtlasTables, *, extra: Mapping[str, str] | None = None) -> str:
    """A page of this chapter alone; ``extra`` as in :func:`moe_interp.report.render_page`."""
    return render_page([atlas_chapter(result)], model=str(result.data.attrs.get("model", "")), extra=extra)


def _by_measure(table: pd.DataFrame) -> Markup:
    """A row a measure, a column a layer, eight layers a table: there are more measures than fit side by side."""
    names = [str(name).replace("_", " ") for name in table if name != "layer"]
    shown = pd.DataFrame({"measure": names})
    tables = []
    for start in range(0, len(table), _SIDE_BY_SIDE):
        part = table.iloc[start : start + _SIDE_BY_SIDE]
        columns = {
            f"layer {row['layer']}": [_value(row[name]) for name in table if name != "layer"]
            for row in part.to_dict("records")
        }
        tables.append(html_table(shown.assign(**columns)))
    return Markup("\n").join(tables)


def _value(value: Any) -> str:
    """A dash also for a count of -1: no window of layers begins here."""
    return cell(float("nan")) if isinstance(value, int) and value < 0 else cell(value)


def _intervals(table: pd.DataFrame) -> pd.DataFrame:
    return with_intervals(table)
