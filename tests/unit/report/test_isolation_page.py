"""The page holds everything in itself and shows what the tables say."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from moe_interp.errors import ResultError
from moe_interp.experiments.isolation.result import IsolationResult
from moe_interp.report import counterfactual_chapter, isolation_chapter, isolation_page, render_page, write_page
from moe_interp.report.html import LONGEST, cell, html_table, with_intervals
from moe_interp.report.page import Chapter
from tests.unit.experiments.planted_isolation import planted_isolation
from tests.unit.plots.planted_routes import planted_routes

VOID = {"meta", "br", "link"}


class Nesting(HTMLParser):
    """Every element is closed in its own order; ids are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def planted() -> IsolationResult:
    return planted_isolation(n_items={"code": 12, "math": 14}, n_layers=3, attrs={"model": "<planted & bold>"})


@pytest.fixture(scope="module")
def page(planted) -> str:
    return isolation_page(planted, extra={"isolation": "12.3 s"})


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    parser = Nesting()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))


def test_the_page_needs_nothing_else(page):
    assert page.count("<svg") == 5
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r'(src|href)="(?!#|data:)', without_names)
    assert "<script" not in page
    assert "url(http" not in page
    assert "@import" not in page


def test_the_page_says_what_the_result_says(page, planted):
    assert "&lt;planted &amp; bold&gt;" in page
    assert "<planted" not in page
    assert "A comparison, not a reproduction" in page
    assert "207/896 (23%)" in page
    for row in planted.calibration_by_domain().itertuples():
        assert f"{row.rho:.3f}" in page
    assert "12.3 s" in page
    assert planted.manifest.versions["numpy"] in page


@pytest.fixture(scope="module")
def chapters(planted) -> list[Chapter]:
    return [isolation_chapter(planted), counterfactual_chapter(planted_routes())]


def test_a_page_of_several_chapters_has_contents_whose_links_lead_somewhere(chapters, page):
    both = render_page(chapters, title="Both")
    parser = Nesting()
    parser.feed(both)
    assert len(parser.ids) == len(set(parser.ids))
    contents = both[both.index("<nav") : both.index("</nav>")]
    links = re.findall(r'href="#([^"]+)"', contents)
    assert len(links) == sum(1 + len(chapter.sections) for chapter in chapters) + 1
    assert set(links) <= set(parser.ids)
    assert "Token by token" in contents
    assert "<nav" not in page


def test_what_cannot_be_shown_is_replaced_by_the_reason():
    page = isolation_page(planted_isolation(n_items={"a": 1}, masses=("natural",), baselines=("uniform",), n_layers=2))
    assert page.count("<svg") == 3
    assert "the single domain &#39;a&#39;" in page
    assert "no domain with enough items for a test" in page
    assert "mass &#39;natural&#39; only" in page


def test_a_long_table_says_how_much_is_left_out():
    table = pd.DataFrame({"a_b": range(LONGEST + 5), "c": 0.123456})
    html = html_table(table)
    assert html.count("<tr>") == LONGEST + 1
    assert "5 more rows" in html
    assert '<th scope="col" class="number">a b</th>' in html
    assert [cell(v) for v in (0.123456, float("nan"), True, 3, "x")] == ["0.123", "–", "yes", "3", "x"]


def test_intervals_stand_beside_their_value():
    table = pd.DataFrame(
        {"x": [0.12345, 1.0], "x_low": [0.1, float("nan")], "x_high": [0.2, float("nan")], "y": "long " * 20}
    )
    shown = with_intervals(table)
    assert list(shown) == ["x [95%]", "y"]
    assert shown["x [95%]"].tolist() == ["0.123\u00a0[0.100,\u00a00.200]", "1.000"]
    assert html_table(shown).count('class="long"') == 2


def test_a_page_that_cannot_be_written_says_so(page, tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ResultError, match="could not be written"):
        write_page(tmp_path / "page.html", page)
    assert write_page(tmp_path / "good.html", page).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_page_begins_with_what_was_done_and_three_findings(page, planted):
    done, *found = planted.headlines()
    assert len(found) == 3
    assert done.startswith(
        "Isolation of 16 experts in each of 3 layers of <planted & bold>; 26 items (code 12, math 14)"
    )
    before = page[: page.index("<table")]
    for sentence in (done, *found):
        assert html.escape(sentence) in before
    assert all("26 items" in sentence for sentence in found)
    assert "[95%: " in found[0]
    assert "[95%: " in found[1]
    assert planted.summary().startswith("\n* ".join([done, *found]))


@pytest.mark.parametrize(
    ("router", "said"),
    [
        ("aligned", "The router prefers the better experts: "),
        ("reversed", "The router prefers the worse experts: "),
        ("permuted", "That the router prefers the better experts, or the worse, is not shown: "),
    ],
)
def test_the_first_finding_says_what_was_planted(router, said):
    assert planted_isolation(router=router).headlines()[1].startswith(said)


@pytest.mark.parametrize("n_items", [{"a": 1}, {"a": 3}, {"a": 1, "b": 2}])
def test_with_too_few_items_nothing_is_concluded(n_items):
    found = planted_isolation(n_items=n_items, n_layers=2).headlines()[1:]
    assert found[0].startswith("Whether the router prefers the better experts cannot be said: too noisy to tell (")
    assert found[1].startswith("Which experts help or hurt a domain cannot be said: too few items in every domain")
    assert not any("nan" in sentence for sentence in found)


def test_the_first_table_shows_the_largest_deltas_of_each_domain(page):
    first = page[page.index("Which experts help or hurt a domain") :]
    rows = first[first.index("<tbody>") : first.index("</tbody>")]
    assert rows.count("<tr>") == 6


def test_headings_stand_over_their_numbers_and_short_texts_stay_on_one_line():
    shown = html_table(pd.DataFrame({"n_items": [4], "rho": [0.5], "verdict": ["differs between domains"]}))
    for name in ("n items", "rho"):
        assert f'<th scope="col" class="number">{name}</th>' in shown
    assert '<th scope="col">verdict</th>' in shown
    assert '<td class="short">differs between domains</td>' in shown


def test_no_heading_is_a_bare_bound_or_a_name_of_code(chapters):
    page = render_page(chapters)
    headings = set(re.findall(r'<th scope="col"[^>]*>([^<]*)</th>', page))
    assert {"rho [95%]", "share [95%]", "regret [95%]", "published, 10 items per domain"} <= headings
    assert not any(re.search(r"_|\b(low|high)\b", heading) for heading in headings)
    assert '<td class="short">fresh draw</td>' in page
    assert "fresh_draw" not in re.sub(r"<pre>.*?</pre>|<script.*?</script>", "", page, flags=re.S)
