"""The view of a prompt's routing: what its cells say, on every width, with every kind of token, escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from moe_interp.routing_view import Panel, RoutingView
from moe_interp.routing_view.terminal import as_text
from moe_interp.routing_view.words import COLOURS, colour_of, visible

TOKENS = [
    *("<bos>", " the", "日本", "\n", "שלום", " مرحبا", "<E2><82>", "a" * 60, "<script>alert(1)</script>"),
    *("\u200b", " ", "", "\u0301x", "\tif", "\"&'", "\x1b[31m", "[bold]x[/]", "\u202eabc"),
]


def view(
    n: int = len(TOKENS), n_layers: int = 26, n_experts: int = 64, k: int = 6, weights: bool = True, **options: Any
) -> RoutingView:
    draw = np.random.default_rng(0)
    tokens = [TOKENS[i % len(TOKENS)] for i in range(n)]
    indices = draw.random((n, n_layers, n_experts)).argsort(-1)[..., :k].astype(np.int32)
    own = draw.dirichlet(np.ones(k), size=(n, n_layers)).astype(np.float32) if weights else None
    following = tokens[1:] + tokens[:1]
    p = draw.random(n).astype(np.float32)
    layers = tuple(range(1, n_layers + 1))
    ids = np.arange(n)
    panel = Panel(layers, (n_experts,) * n_layers, tokens, ids, ids, indices, own, following, ids, p)
    return RoutingView("model", [panel], **options)


class Cells(HTMLParser):
    """The rows of the table's body: text, class and title of every cell; and the names of all elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[dict[str, Any]]] = []
        self.names: set[str] = set()
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append({"text": "", **dict(attrs)})
        self.inside = tag in ("td", "th", "bdi", "small", "span")

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1]["text"] += data


def test_a_cell_is_the_expert_of_largest_weight_in_its_own_colour_with_all_in_its_title() -> None:
    shown = view()
    panel = shown.panels[0]
    head, *rows = Cells(shown.html()).rows
    assert [cell["text"] for cell in head[1:27]] == [str(n) for n in range(1, 27)]
    assert len(rows) == len(TOKENS)
    for token, row in enumerate(rows):
        for layer, cell in enumerate(row[1:27]):
            weights = panel.weights[token, layer]  # type: ignore[index]
            top = int(panel.indices[token, layer, weights.argmax()])
            assert cell["text"] == str(top)
            assert cell["class"] == f"c{top % 9}"
            for expert, weight in zip(panel.indices[token, layer], weights):
                assert f"expert {expert}: weight {weight:.3f}" in cell["title"].split("\n")
            assert cell["title"].split("\n")[-1].startswith("predicts next: ")


def test_one_layer_is_shown_slot_by_slot_the_largest_weight_first() -> None:
    shown = view(n_layers=1, k=3, layer=1, weights=True)
    panel = shown.panels[0]
    for token, row in enumerate(Cells(RoutingView("m", [panel], 1, True).html()).rows[1:]):
        order = np.argsort(-panel.weights[token, 0])  # type: ignore[index]
        wanted = [f"{panel.indices[token, 0, s]}{panel.weights[token, 0, s]:.2f}" for s in order]  # type: ignore[index]
        assert [cell["text"] for cell in row[1:4]] == [text.replace("0.", ".") for text in wanted]


def test_texts_are_escaped_and_the_element_holds_nothing_from_elsewhere() -> None:
    for page in (view().html(), view()._repr_html_()):
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert not re.search(r"""(?:src|href)=|url\(|@import|https?:""", page)
        names = Cells(page).names
        elements = "html head meta title style body div p table thead tbody tr th td span bdi small script"
        assert not [name for name in names if name not in elements.split()]
    assert "<html" not in view()._repr_html_()
    assert "&lt;b&gt;" in RoutingView("<b>", view().panels).html()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *((" the", "␣the"), ("a b", "a b"), ("  ", "␣␣"), ("x ", "x␣"), ("\n\n", "↵↵"), ("\r\n\t", "␍↵⇥"), ("", "∅")),
        *(("\u200b", "<200B>"), ("\u202eabc", "<202E>abc"), ("\x1b[31m", "<1B>[31m"), ("\u0301x", "◌\u0301x")),
        *(("日本", "日本"), ("שלום", "שלום"), ("\u00a0", "<A0>"), ("\ufffd", "\ufffd"), ("👩\u200d", "👩<200D>")),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("width", [20, 40, 79, 80, 81, 132, 250])
def test_no_line_is_wider_than_the_terminal_and_every_cell_is_there(width: int, weights: bool) -> None:
    shown = view(n=12)
    panel = shown.panels[0]
    text = as_text("model", shown.panels, None, weights, None, width, False)
    assert "\x1b" not in text
    assert max(map(cell_len, text.splitlines())) <= width
    found: dict[int, list[str]] = {token: [] for token in range(12)}
    heads: list[str] = []
    for line in text.split("\n\n", 1)[1].splitlines():
        if line.lstrip().startswith("layer"):
            heads += re.sub(r"(predicts)? next", "", line).split()[1:]
        elif match := re.match(r" {0,1}(\d+) ", line):
            # the token's text ends where the first number column begins: only numbers are of interest
            found[int(match[1])].append(line)
    assert heads == [str(n) for n in panel.numbers]
    for token, lines in found.items():
        tops = [str(panel.slots(token, layer)[0][0]) for layer in range(26)]
        body = " ".join(lines)
        place = 0
        for top in tops:
            match = re.compile(rf"(?<![\w.]){top}(?![\w.])").search(body, place)
            assert match, (token, top)
            place = match.end()


def test_layers_fit_side_by_side_where_shorter_texts_make_room() -> None:
    text = as_text("model", view(n_layers=16, k=8).panels, None, False, None, 80, False)
    assert text.count("layer  1") == 1
    assert len([line for line in text.splitlines() if line.lstrip().startswith("layer ")]) == 1


def test_colours_only_in_a_terminal_and_not_where_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = view(n=3, n_layers=2).panels
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    coloured = as_text("model", panels, None, False, None, 80, True)
    top = panels[0].slots(0, 0)[0][0]
    red, green, blue = bytes.fromhex(COLOURS[colour_of(top)][1:])
    assert f"48;2;{red};{green};{blue}" in coloured
    plain = as_text("model", panels, None, False, None, 80, False)
    without = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert [line.rstrip() for line in without.splitlines()] == plain.splitlines()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;" not in as_text("model", panels, None, False, None, 80, True)


def test_it_is_printed_by_print_and_by_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = view(n=3, n_layers=4)
    print(shown)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert printed.rstrip("\n") == repr(shown)
    console = Console(width=60, force_terminal=False)
    with console.capture() as captured:
        console.print(shown)
    assert [line.rstrip() for line in captured.get().splitlines()] == printed.splitlines()


def test_a_long_prompt_is_cut_with_a_note_and_whole_in_the_table() -> None:
    shown = view(n=1000, n_layers=48, n_experts=128, k=8)
    page = shown.html()
    assert len(page) < 3_000_000
    assert "The first 166 of 1000 tokens are shown" in page
    assert len(Cells(page).rows) == 167
    assert len(str(shown).splitlines()) < 260
    assert "of 1000 tokens are shown" in str(shown).replace("\n", " ")
    table = shown.to_dataframe()
    assert len(table) == 1000 * 48 * 8
    chosen = RoutingView("model", shown.panels, shown=[np.arange(990, 1000)])
    assert "10 of 1000 tokens are shown, those asked for." in chosen.html()
    for asked, such_as in ((np.arange(300, 700), "range(466, 632)"), (np.arange(700, 300, -1), "[534, ...]")):
        part = RoutingView("model", shown.panels, shown=[asked]).html()
        assert f"The first 166 of 400 tokens are shown: choose others by positions=, such as {such_as};" in part
    assert [row[0]["text"][:3] for row in Cells(chosen.html()).rows[1:]] == [str(n) for n in range(990, 1000)]


def test_empty_slots_and_routes_that_were_not_recorded_are_told_apart() -> None:
    indices = np.array([[[0], [1]], [[-1], [2]], [[-2], [0]]], dtype=np.int32)
    weights = np.array([[[0.7], [0.6]], [[0.0], [0.5]], [[0.0], [0.4]]], dtype=np.float32)
    panel = Panel((0, 1), (4, 4), ["a", "b", "c"], None, np.arange(3), indices, weights)
    shown = RoutingView("m", [panel])
    cells = [[cell["text"] for cell in row[1:]] for row in Cells(shown.html()).rows[1:]]
    assert cells == [["0", "1"], ["·", "2"], ["?", "0"]]
    text = str(shown)
    assert [line.split()[2:] for line in text.splitlines()[-3:]] == cells
    assert "A dot is a token that no expert took there. A question mark" in text.replace("\n", " ")
    assert "no expert" in shown.html()
    assert "not recorded" in shown.html()
    table = shown.to_dataframe()
    assert table[["position", "layer", "expert"]].to_numpy().tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 2], [2, 1, 0]]
    assert table["predicted"].isna().all()


def test_without_weights_the_router_s_order_decides() -> None:
    shown = view(n=4, n_layers=3, weights=False)
    panel = shown.panels[0]
    rows = Cells(shown.html()).rows[1:]
    assert [[int(cell["text"]) for cell in row[1:4]] for row in rows] == panel.indices[:, :, 0].tolist()
    assert "the first expert of the route" in shown.html()
    assert shown.to_dataframe()["weight"].isna().all()


def test_two_stacks_stand_below_each_other() -> None:
    one = view(n=5, n_layers=2).panels[0]
    stacks = [
        Panel((("encoder", 1), ("encoder", 3)), one.n_experts, one.tokens, one.token_ids, one.positions, one.indices),
        Panel((("decoder", 1), ("decoder", 3)), one.n_experts, one.tokens[:2], None, np.arange(2), one.indices[:2]),
    ]
    shown = RoutingView("t5", stacks)
    text = str(shown)
    assert text.index("\nencoder\n") < text.index("\ndecoder\n")
    assert [row[1]["text"] for row in Cells(shown.html()).rows if row[0].get("scope") == "col"] == ["1", "1"]
    assert set(shown.to_dataframe()["layer"]) == {(stack, n) for stack in ("encoder", "decoder") for n in (1, 3)}
