"""The chapter of an expert-isolation run: findings, figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from moe_interp import plots
from moe_interp.report.html import html_table, with_intervals
from moe_interp.report.page import Chapter, render_page, section
from moe_interp.results.tables import IsolationTables


def isolation_chapter(result: IsolationTables, title: str = "Expert isolation and router calibration") -> Chapter:
    """Summary, findings beside the published ones, five figures, tables.

    Nothing is computed here; every number comes from a table of the result. A statistic that these items cannot bear is
    replaced by the reason.
    """
    findings = result.findings_table()
    return Chapter(
        title=title,
        summary=result.summary(),
        headlines=tuple(result.headlines()),
        findings=html_table(findings[["finding", *_FINDINGS]].rename(columns=_FINDINGS)),
        findings_note=f"{findings.attrs['note']} Published: {findings.attrs['source']}. In square brackets: 95% "
        "intervals.",
        sections=tuple(
            section(name, heading, text, draw and partial(draw, result), tabulate and partial(tabulate, result))
            for name, heading, text, draw, tabulate in _PARTS
        ),
        manifest=getattr(result, "manifest", None),
    )


def isolation_page(result: IsolationTables, *, extra: Mapping[str, str] | None = None) -> str:
    """A page of this chapter alone; ``extra`` as in :func:`moe_interp.report.render_page`."""
    return render_page([isolation_chapter(result)], model=result.data.attrs.get("model", ""), extra=extra)


_FINDINGS = {  # columns of the findings' table, and their headings on the page
    "here": "here",
    "phi_mini_moe_10": "published, 10 items per domain",
    "phi_mini_moe_50": "published, 50 items per domain",
}
_EACH = 3  # experts of a domain in the first table
_LARGEST = 12  # rows of the table between domains


def _specialized(result: IsolationTables) -> pd.DataFrame:
    table = result.specialization(baseline=_baseline(result))
    table = table[table["direction"].isin(["helped", "hurt"])]
    table = table.iloc[table["mean"].abs().argsort(kind="stable")[::-1]]
    shown = table.groupby("domain", sort=True).head(_EACH).sort_values("domain", kind="stable")
    return with_intervals(shown[["domain", "layer", "expert", "n", "mean", "mean_low", "mean_high", "q", "direction"]])


def _correlations(result: IsolationTables) -> pd.DataFrame:
    columns = ["domain", "n_items", "rho", "low", "high", "p", "reliability_routing", "reliability_quality"]
    columns += ["corrected", "corrected_low", "corrected_high", "verdict"]
    return _as_intervals(result.calibration_by_domain()[columns], rho=("low", "high"))


def _worth(result: IsolationTables) -> pd.DataFrame:
    return _as_intervals(result.layer_impact(baseline=_baseline(result)), impact=("low", "high"))


def _as_intervals(table: pd.DataFrame, **bounds: tuple[str, str]) -> pd.DataFrame:
    """Values and their bounds as one column, also of bounds that are not named after the value."""
    names = {old: f"{name}_{end}" for name, both in bounds.items() for old, end in zip(both, ("low", "high"))}
    return with_intervals(table.rename(columns=names))


def _within_items(result: IsolationTables) -> pd.DataFrame:
    return _as_intervals(result.item_calibration(), rho=("low", "high"))


def _between(result: IsolationTables) -> pd.DataFrame:
    table = result.domain_effect()
    table = table[table["significant"]].sort_values("eta_squared", ascending=False, kind="stable").head(_LARGEST)
    return table.drop(columns=["statistic", "p", "significant", "verdict"])  # all of these differ


def _dominant(result: IsolationTables) -> pd.DataFrame:
    table = result.dominance()
    table = table[table["rank"] <= 3].sort_values(["domain", "rank"], kind="stable")
    return _as_intervals(table, share=("low", "high"))


def _disagreeing(result: IsolationTables) -> pd.DataFrame:
    table = result.mass_agreement(baseline=_baseline(result))
    return table[~table["agree"]]


def _baseline(result: IsolationTables) -> str:
    known = [str(name) for name in result.data["baseline"].values]
    return "natural" if "natural" in known else known[0]


Draw = Callable[[IsolationTables], Figure]
Table = Callable[[IsolationTables], pd.DataFrame]

# name, title, sentence, figure, table
_PARTS: tuple[tuple[str, str, str, Draw | None, Table | None], ...] = (
    (
        "specialization",
        "Which experts help or hurt a domain",
        "Delta: answer log-probability with all tokens of one layer forced through one expert (or with the expert "
        "ablated), minus the baseline's; mass one: the expert's weight is 1, mass natural: the sum that the token's "
        "own experts had. The table lists the largest mean deltas of each domain among the tests that reject, three at "
        "most: picked as the largest, they are likely smaller on new items.",
        lambda r: plots.specialization_map(r, baseline=_baseline(r)),
        _specialized,
    ),
    (
        "sorted-p",
        "All tests at once",
        "The p-values of all tests in order. Those up to the last one under the line are rejected "
        "(Benjamini-Hochberg). A dashed line is the smallest p that so few items allow.",
        lambda r: plots.sorted_p(r, baseline=_baseline(r)),
        None,
    ),
    (
        "masses",
        "Where the two masses disagree",
        "Weight one changes the layer's total weight, the natural sum does not: a conclusion that holds under one of "
        "them only may be about the size of the layer's output.",
        None,
        _disagreeing,
    ),
    (
        "calibration",
        "Does the router prefer the better experts?",
        "rho: rank correlation over the experts of a layer between natural routing and quality, averaged over layers. "
        "Corrected: what it would be without the noise of a finite number of items. Reliability: the share of the "
        "differences between experts that new items would show again; too noisy where it cannot be told from 0.",
        plots.calibration_scatter,
        _correlations,
    ),
    (
        "calibration-layers",
        "Calibration layer by layer",
        "rho: with the mean routing probability over all positions; rho prompt and rho answer: over those of the "
        "prompt and those that predict the answer; rho share: with the share of the slots instead. q: p adjusted for "
        "the number of rows. One layer says little: with 16 experts, p < .05 needs a rho of at least .50.",
        None,
        lambda r: r.calibration(),
    ),
    (
        "item-calibration",
        "Calibration within items",
        "rho: rank correlation over experts between an item's own routing and its own quality, averaged over layers "
        "and items. rho other items: the same with the quality of other items of the domain. Specificity: the "
        "difference, which is what routing knows about the very item.",
        None,
        _within_items,
    ),
    (
        "dominance",
        "Do some experts dominate?",
        "Share of a domain's slots, mean over layers; the table lists the three most used experts. Uniform: the share "
        "if all were used alike. Ratio: share over uniform.",
        plots.dominance,
        _dominant,
    ),
    (
        "layer-impact",
        "What a layer's best expert is worth",
        "Mean over domains of the best expert's delta, cross-fitted: chosen on one half of the items, measured on the "
        "other. Naive: both on the same items, which is optimistic. Best experts: the one most often chosen in each "
        "domain, and the share of the choices that fell on it.",
        lambda r: plots.layer_impact(r, baseline=_baseline(r)),
        _worth,
    ),
    (
        "domain-effect",
        "Specialization between domains",
        "Experts that help some domains more than others, beyond domains being more or less fragile as a whole: of the "
        "pairs that reject, those with the largest share of variance between domains (eta squared). Contrast: "
        "delta less the item's mean over experts, averaged over the domain, minus the same over all items (nats per "
        "token).",
        None,
        _between,
    ),
)
