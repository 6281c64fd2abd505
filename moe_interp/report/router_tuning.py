"""The chapter of a tuned router: what was learned on held-out text, and how training went."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pandas as pd

from moe_interp import plots
from moe_interp.report.html import with_intervals
from moe_interp.report.page import Chapter, render_page, section
from moe_interp.results.tables import RouterTuningTables

_LOSSES = (
    "Change of the next token's cross-entropy (ce change: after tuning minus before, nats; below 0 is better) on text "
    "that was not trained on, by domain and by how sure the untuned model was of the realized token: fragile p < .5, "
    "confident p >= .9. A rise on confident tokens or in another domain is the harm that tuning did. In square "
    "brackets: 95% intervals over sequences."
)
_ROUTES = (
    "Better route: the best of the routes drawn from the untuned router, where it beats the router's own. Preference: "
    "the share of tokens with one whose log-probability rose more for it than for the old route. Adoption: the share "
    "that now takes exactly it. Overlap: the share of its experts in the route now. Changed: the share of all tokens "
    "whose route is another one than before. Preference may rise without adoption: then no better route was learned."
)
_CURVE = (
    "The held-out tokens of the training domains at each evaluation, bands and brackets 95% intervals over sequences; "
    "and the training loss. Weight change: ||dW|| / ||W||. Effective experts: exp(entropy of the load) over the number "
    "of experts. Max violation: the most used expert's load over the mean, less 1."
)


def router_tuning_chapter(result: RouterTuningTables, title: str = "Router tuning") -> Chapter:
    """Findings, the held-out tables, and the curves of training. Every number comes from a table of the result."""
    sections = (
        section(
            "held-out", "What was learned?", _LOSSES, partial(plots.tuning_held_out, result), lambda: _losses(result)
        ),
        section("routes", "Are better routes taken, or only preferred?", _ROUTES, tabulate=lambda: _routes(result)),
        section("curves", "How training went", _CURVE, partial(plots.tuning_curves, result), lambda: _curve(result)),
    )
    headlines = tuple(result.headlines())
    return Chapter(title, result.summary(), sections, headlines, manifest=getattr(result, "manifest", None))


def router_tuning_page(result: RouterTuningTables, *, extra: Mapping[str, str] | None = None) -> str:
    """A page of this chapter alone; ``extra`` as in :func:`moe_interp.report.render_page`."""
    return render_page([router_tuning_chapter(result)], model=result.data.attrs.get("model", ""), extra=extra)


def _losses(result: RouterTuningTables) -> pd.DataFrame:
    return _chosen(result.held_out(), ["domain", "tokens", "n_tokens", "n_sequences"], "ce_before", "ce", "ce_change")


def _routes(result: RouterTuningTables) -> pd.DataFrame:
    table = result.held_out()
    table = table[table["tokens"].isin(["all", "fragile", "confident"])]
    return _chosen(
        table, ["domain", "tokens"], "changed", "preference", "adoption", "overlap_before", "overlap", "entropy"
    )


def _curve(result: RouterTuningTables) -> pd.DataFrame:
    table = _chosen(result.curve(), ["step"], "ce_change", "preference", "adoption", "changed")
    return table.join(result.curve()[["weight_change", "effective_experts", "max_violation"]])


def _chosen(table: pd.DataFrame, columns: list[str], *values: str) -> pd.DataFrame:
    """These columns, and these values with their intervals."""
    return with_intervals(table[[*columns, *(f"{name}{end}" for name in values for end in ("", "_low", "_high"))]])
