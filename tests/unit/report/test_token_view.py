"""The token view: what it holds, that nothing escapes it, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_interp.experiments.counterfactual.result import CounterfactualResult
from moe_interp.report import counterfactual_page, isolation_page, token_view
from moe_interp.report.tokens import STEPS
from tests.unit.experiments.planted_isolation import planted_isolation
from tests.unit.plots.planted_routes import REGRETTED, TEXTS, planted_routes
from tests.unit.report.test_isolation_page import Nesting

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def page() -> str:
    return counterfactual_page(planted_routes(), extra={"scoring": "1.2 s"})


def held(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" class="data">(.*?)</script>', page, re.S).group(1))


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    parser = Nesting()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r'(src|href)="(?!#|data:)', without_names)
    assert not re.search(r"https?://|@import|fetch\(|innerHTML|eval\(", without_names)
    assert page.count("<svg") == 3
    assert "&lt;planted&gt;" in page
    assert "<planted>" not in page


def test_it_holds_every_token_with_its_routes():
    result = planted_routes()
    view = held(str(token_view(result)))
    assert view["layers"] == [1, 3, 5]
    assert view["steps"] == list(STEPS)
    assert [one["id"] for one in view["sequences"]] == [f"s{i}" for i in range(12)]
    table = result.token_table()
    name, position, layer = REGRETTED
    token = next(t for t in view["sequences"][3]["tokens"] if t[0] == position)
    regret, best, standard, other = token[4][layer]
    assert (regret, best, token[3]) == (2.5, 0.607, 0.0498)
    row = table[(table["sequence"] == name) & (table["pos"] == position) & (table["layer"] == 3)].iloc[0]
    assert (standard, other) == (row["standard_route"], row["best_route"])
    texts = [t[1] for one in view["sequences"] for t in one["tokens"]]
    assert texts == [TEXTS[i % len(TEXTS)] for i in range(96)]


def test_the_origin_says_everything_once():
    data = planted_routes().data
    result = CounterfactualResult(
        data, config={"seed": 7, "sequences": "a1b2", "model": "m"}, seeds=7, data_checksum="a1b2"
    )
    page = counterfactual_page(result)
    origin = page[page.index('id="origin"') :]
    assert origin.count(">seed<") == origin.count(">7<") == origin.count("a1b2") == origin.count(">model<") == 1


def test_text_cannot_leave_the_script_or_the_table(page):
    # the data's own closing tag would end the script
    assert page.count("</script>") == page.count("<script") == 2
    assert "<b>" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    start = page.index("<details>")
    worst = page[start : page.index("</details>", start)]
    assert "2.5" in worst.split("<tr>")[2]  # the first row
    assert worst.count("<tr>") == 21


def test_whole_sequences_are_left_out_of_a_long_view():
    result = planted_routes()
    text = str(token_view(result, most=2 * 8 * 3))
    assert len(held(text)["sequences"]) == 2
    assert "10 more sequences" in text
    some = held(str(token_view(result, sequences=["s7", "s2"])))
    assert [one["id"] for one in some["sequences"]] == ["s2", "s7"]


ASK = """<script>addEventListener("load", () => {
const tokens = [...document.querySelectorAll(".token")], say = {};
const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
say.text = document.querySelectorAll(".text")[0].textContent;
say.tabbable = tokens.filter(t => t.tabIndex === 0).length;
tokens[0].focus(); press("ArrowRight"); press("ArrowRight");
say.moved = document.activeElement === tokens[2];
press("End"); say.end = document.activeElement === tokens.at(-1);
press("Home"); say.home = document.activeElement === tokens[0];
const tip = document.querySelector(".tip");
say.shown = !tip.hidden; press("Escape"); say.escaped = tip.hidden;
const worst = document.querySelector(".token.s5");
say.worst = worst.getAttribute("aria-label");
worst.focus(); say.tip = tip.innerText;
const select = document.querySelector("select");
select.value = "0"; select.dispatchEvent(new Event("change"));
say.elsewhere = worst.className;
select.value = "1"; select.dispatchEvent(new Event("change"));
say.back = worst.className;
say.colours = new Set([...document.querySelectorAll(".legend li")].map(l => getComputedStyle(l).backgroundColor)).size;
say.wide = document.documentElement.scrollWidth <= innerWidth;
document.body.textContent = "ANSWER" + JSON.stringify(say) + "ANSWER";
});</script></body>"""


def asked(page: str, question: str, folder: Path, width: int = 1000) -> dict:
    """What a browser of this width answers."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", question), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--window-size={width},900", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    return json.loads(html.unescape(done.stdout.split("ANSWER")[1]))


@pytest.mark.skipif(not CHROMIUM, reason="no chromium to open the page in")
def test_a_browser_shows_it_and_the_keyboard_reaches_every_token(page, tmp_path: Path):
    said = asked(page, ASK, tmp_path)
    # the first sequence starts at position 2; a line break breaks the line, what cannot be seen is marked
    assert said["text"].startswith('⋯<b> &amp;↵\n→\t∅"]</script>␣x')
    assert said["tabbable"] == 1
    assert all(said[name] for name in ("moved", "end", "home", "shown", "escaped", "wide"))
    assert "regret 2.5 nats at layer 3" in said["worst"]
    assert "Best other route" in said["worst"]
    assert "2.5 nats" in said["tip"]
    assert "61%" in said["tip"]
    assert "5.0%" in said["tip"]
    assert said["elsewhere"] == "token s0"
    assert said["back"] == "token s5"
    assert said["colours"] == 7


MEASURE = """<script>addEventListener("load", () => {
const whole = part => part.scrollWidth <= part.clientWidth;
const say = {
  tables: [...document.querySelectorAll(".scroll")].every(whole),
  page: document.documentElement.scrollWidth <= innerWidth,
  drawn: Math.min(...[...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect().width))};
document.body.textContent = "ANSWER" + JSON.stringify(say) + "ANSWER";
});</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium to open the page in")
@pytest.mark.parametrize("kind", ["counterfactual", "isolation"])
def test_tables_are_whole_on_a_wide_page_and_figures_readable_on_a_narrow_one(page, tmp_path: Path, kind):
    shown = page if kind == "counterfactual" else isolation_page(planted_isolation())
    for width in (1200, 500):
        said = asked(shown, MEASURE, tmp_path, width)
        assert said["page"]
        assert said["tables"] or width < 1200
        assert said["drawn"] >= 640  # of 900: text of eight points stays above five


def luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance of #rgb or #rrggbb."""
    digits = colour.lstrip("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    linear = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in linear]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("scheme", "strong"), [(0, "#fff"), (1, "#111")])
def test_text_is_readable_on_every_colour(page, scheme, strong):
    ink = re.findall(r"--ink: (#\w+)", page)[scheme]
    steps = [re.findall(rf"--s{step}: (#\w+)", page)[scheme] for step in range(1, 7)]
    steps.insert(0, re.findall(r"--page: (#\w+)", page)[scheme])
    text = [ink] * 5 + [strong] * 2
    for back, front in zip(steps, text):
        low, high = sorted((luminance(back), luminance(front)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (back, front)
    # darker with regret in the light, lighter in the dark
    assert sorted(map(luminance, steps), reverse=scheme == 0) == list(map(luminance, steps))
