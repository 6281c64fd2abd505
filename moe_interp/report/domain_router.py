"""The chapter of the routers put in the place of the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pandas as pd

from moe_interp import plots
from moe_interp.report.html import with_intervals
from moe_interp.report.page import Chapter, render_page, section
from moe_interp.results.tables import RouterTables

_TEXT = (
    "Difference in score (mean log-probability of the answer's tokens, in nats) to natural routing. domain: every "
    "token goes to the experts that served the item's domain best alone, chosen on the half of the items that the item "
    "is not in. random: as many experts drawn at random. Means over items, each with its 95% interval; the last row of "
    "a router is all items."
)


def domain_router_chapter(result: RouterTables, title: str = "The router replaced") -> Chapter:
    """Summary, a figure and the comparison of :meth:`compare` as a table."""
    routers = section(
        "router-scores",
        "Would the best experts of a domain serve it better?",
        _TEXT,
        partial(plots.router_scores, result),
        partial(_compared, result),
    )
    headlines = tuple(result.headlines())
    return Chapter(title, result.summary(), (routers,), headlines, manifest=getattr(result, "manifest", None))


def domain_router_page(result: RouterTables, *, extra: Mapping[str, str] | None = None) -> str:
    """A page of this chapter alone; ``extra`` as in :func:`moe_interp.report.render_page`."""
    return render_page([domain_router_chapter(result)], model=result.data.attrs.get("model", ""), extra=extra)


def _compared(result: RouterTables) -> pd.DataFrame:
    table = result.compare().rename(columns={"ci_low": "mean_low", "ci_high": "mean_high"})
    return with_intervals(table.drop(columns="against"))
