"""The chapter of a tuned router: findings first, and the numbers of the result's tables."""

from __future__ import annotations

import html
import re

from moe_interp.report import router_tuning_chapter, router_tuning_page
from moe_interp.report.html import with_intervals
from tests.unit.experiments.test_router_tuning_tables import planted


def text_of(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_the_page_begins_with_what_was_found() -> None:
    result = planted(adopted=0.5, worse_when_sure=0.05)
    page = text_of(router_tuning_page(result))
    places = [page.index(" ".join(line.split())) for line in result.headlines()]
    assert places == sorted(places)
    assert places[-1] < page.index("What was learned?") < page.index("Are better routes taken, or only preferred?")
    assert ", and better routes are taken" in page
    assert "sure of (p >= .9): rose: 0.0500 to 0.1000 nats" in page
    assert "Preference rose without adoption" in text_of(router_tuning_page(planted()))


def test_the_tables_of_the_page_are_those_of_the_result() -> None:
    result = planted(adopted=0.5)
    learned, routes, curves = router_tuning_chapter(result).sections
    assert learned.figure is not None and curves.figure is not None  # noqa: PT018
    for table, shown, columns in (
        (result.held_out(), learned.table, ("ce_before", "ce", "ce_change")),
        (result.held_out(), routes.table, ("adoption", "overlap", "entropy")),
        (result.curve(), curves.table, ("ce_change", "preference", "changed")),
    ):
        cells = with_intervals(table)
        for name in columns:
            for cell in cells[f"{name} [95%]"][: 1 if shown is routes.table else None]:
                assert cell in str(shown)
