"""The chapter of a pass@K run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pandas as pd

from moe_interp import plots
from moe_interp.report.html import with_intervals
from moe_interp.report.page import Chapter, render_page, section
from moe_interp.results.tables import PassAtKTables

_CURVE = (
    "The share of problems of which at least one of K sampled completions is right: the unbiased estimate "
    "1 - C(n - c, K) / C(n, K) of each problem, averaged. Bands are 95% bootstrap intervals over problems; at several "
    "K they are of the same problems, and move together."
)


def pass_at_k_chapter(result: PassAtKTables, title: str = "pass@K") -> Chapter:
    """Summary, the curve, domains and problems."""
    sections = [
        section(
            "pass-at-k",
            "How much do more tries help?",
            _CURVE,
            partial(plots.pass_at_k, result),
            lambda: _intervals(result.curve()),
        )
    ]
    if len(set(result.data["domain"].values.astype(str))) > 1:
        sections.append(section("domains", "By domain", "", tabulate=lambda: _intervals(result.by_domain())))
    text = "n completions, c right ones, and the estimates."
    sections.append(section("problems", "Problem by problem", text, tabulate=result.by_problem))
    headlines = tuple(result.headlines())
    return Chapter(title, result.summary(), tuple(sections), headlines, manifest=getattr(result, "manifest", None))


def pass_at_k_page(result: PassAtKTables, *, extra: Mapping[str, str] | None = None) -> str:
    """A page of this chapter alone; ``extra`` as in :func:`moe_interp.report.render_page`."""
    return render_page([pass_at_k_chapter(result)], model=result.data.attrs.get("model", ""), extra=extra)


def _intervals(table: pd.DataFrame) -> pd.DataFrame:
    return with_intervals(table.rename(columns={"mean": "pass@K", "ci_low": "pass@K_low", "ci_high": "pass@K_high"}))
