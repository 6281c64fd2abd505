"""The chapter of an expert-isolation run: findings, figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from moe_interp import plots
from moe_interp.report.html import html_table
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
        findings=html_table(findings.drop(columns=["value", "low", "high"])),
        findings_note=f"{findings.attrs['note']} Published: {findings.attrs['source']}.",
        sections=tuple(
            section(name, heading, text, draw and partial(draw, result), tabulate and partial(tabulate, result))
            for name, heading, text, draw, tabulate in _PARTS
        ),
        manifest=getattr(result, "manifest", None),
    )


def isolation_page(result: IsolationTables, *, extra: Mapping[str, str] | None = None) -> str:
    """A page of this chapter alone; ``extra`` as in :func:`moe_interp.report.render_page`."""
    return render_page([isolation_chapter(result)], model=result.data.attrs.get("model", ""), extra=extra)


def _specialized(result: IsolationTables) -> pd.DataFrame:
    table = result.specialization(baseline=_baseline(result))
    return table[table["direction"].isin(["helped", "hurt"])].sort_values(["q", "p"], kind="stable")


def _between(result: IsolationTables) -> pd.DataFrame:
    table = result.domain_effect()
    return table[table["significant"]].sort_values(["q", "eta_squared"], ascending=[True, False], kind="stable")


def _dominant(result: IsolationTables) -> pd.DataFrame:
    table = result.dominance()
    return table[table["rank"] <= 3].sort_values(["domain", "rank"], kind="stable")


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
        "ablated), minus the baseline's. The table lists the tests that reject, smallest q first.",
        lambda r: plots.specialization_map(r, baseline=_baseline(r)),
        _specialized,
    ),
    (
        "sorted-p",
        "All tests at once",
        "Step-up rejects every test up to the last one under the line.",
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
        "Corrected: what it would be without the noise of a finite number of items.",
        plots.calibration_scatter,
        lambda r: r.calibration_by_domain(),
    ),
    (
        "calibration-layers",
        "Calibration layer by layer",
        "One layer says little: with 16 experts p < .05 needs a rho of at least .50.",
        None,
        lambda r: r.calibration(),
    ),
    (
        "item-calibration",
        "Calibration within items",
        "rho between an item's own routing and its own quality. Specificity: how much of it is about the very item.",
        None,
        lambda r: r.item_calibration(),
    ),
    (
        "dominance",
        "Do some experts dominate?",
        "Share of a domain's slots, mean over layers; the table lists the three most used experts.",
        plots.dominance,
        _dominant,
    ),
    (
        "layer-impact",
        "What a layer's best expert is worth",
        "Mean over domains of the best expert's delta; chosen on one half of the items, measured on the other.",
        lambda r: plots.layer_impact(r, baseline=_baseline(r)),
        lambda r: r.layer_impact(baseline=_baseline(r)),
    ),
    (
        "domain-effect",
        "Specialization between domains",
        "Experts that help some domains more than others, beyond domains being more or less fragile as a whole.",
        None,
        _between,
    ),
)
