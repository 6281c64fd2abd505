"""The page of an expert-isolation run: findings, figures and tables in one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from moe_interp import plots
from moe_interp.errors import DataError
from moe_interp.results import Manifest, replacing
from moe_interp.results.tables import IsolationTables

LONGEST = 30  # rows shown of a long table


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title, text: Heading and the sentence under it.
        figure: An SVG element, or None.
        table: An HTML table, or None.
        problem: Why there is neither.
    """

    title: str
    text: str
    figure: Markup | None = None
    table: Markup | None = None
    problem: str | None = None


def isolation_page(
    result: IsolationTables,
    *,
    title: str = "Expert isolation and router calibration",
    manifest: Manifest | None = None,
    extra: Mapping[str, str] | None = None,
) -> str:
    """The whole page as text: summary, findings beside the published ones, five figures, tables, origin.

    Args:
        result: An isolation result.
        manifest: Of the result, for the section on its origin; looked up on ``result`` where None.
        extra: Further lines of the section on the origin, such as the time each stage took.

    Source: nothing is computed here; every number comes from a table of the result. A statistic that these items cannot
    bear is replaced by the reason.
    """
    manifest = manifest or getattr(result, "manifest", None)
    findings = result.findings_table()
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            model=result.data.attrs.get("model", ""),
            summary=result.summary(),
            findings=html_table(findings.drop(columns=["value", "low", "high"])),
            findings_note=f"{findings.attrs['note']} Published: {findings.attrs['source']}.",
            sections=[_section(*parts, result=result) for parts in _PARTS],
            manifest=manifest,
            extra=dict(extra or {}),
        )
    )


def write_page(path: str | Path, result: IsolationTables, **options: Any) -> Path:
    """Write :func:`isolation_page` to ``path``, whole or not at all, and return the path.

    Raises:
        ResultError: The file cannot be written.
    """
    content = isolation_page(result, **options).encode()
    with replacing(path) as file:
        file.write(content)
    return Path(path)


def environment() -> Environment:
    """The templates; values are escaped, unknown names are errors."""
    return Environment(
        loader=PackageLoader("moe_interp.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def html_table(table: pd.DataFrame) -> Markup:
    """A table as HTML: numbers to three digits, truth as yes and no, at most ``LONGEST`` rows."""
    shown = table.head(LONGEST)
    template = environment().get_template("table.html")
    cells = [[(cell(value), isinstance(value, (int, float))) for value in row] for row in shown.itertuples(index=False)]
    left_out = len(table) - len(shown)
    return Markup(template.render(columns=[str(c).replace("_", " ") for c in table], rows=cells, left_out=left_out))


def cell(value: Any) -> str:
    """One value in words: three significant digits, a dash for what is missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3g}"
    return str(value)


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


def _section(
    name: str, title: str, text: str, draw: Draw | None, tabulate: Table | None, *, result: IsolationTables
) -> Section:
    """Draw and tabulate; a statistic that the data cannot bear becomes the reason why not."""
    try:
        figure = Markup(plots.to_svg(draw(result), name)) if draw else None
        rows = tabulate(result) if tabulate else None
    except DataError as error:
        return Section(title, text, problem=str(error))
    if rows is None:
        return Section(title, text, figure)
    if rows.empty:
        return Section(title, text, figure, problem="None.")
    return Section(title, text, figure, html_table(rows))
