"""The routing of a prompt as text for a terminal: as many layers side by side as its width takes, the others below."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_interp.routing_view.cut import rows_of
from moe_interp.routing_view.panel import Panel
from moe_interp.routing_view.words import (
    COLOURS,
    colour_of,
    legend,
    number,
    predicted,
    probability,
    runs_right_to_left,
    title,
    visible,
)
from moe_interp.types import Layer

if TYPE_CHECKING:
    from rich.text import Text

MOST_LINES = 200
_LONGEST_TOKEN, _LONGEST_NEXT = 20, 24  # columns of the terminal
_LEFT_TO_RIGHT = "\u200e"  # after a right-to-left token, so that the numbers behind it stay in their order


def as_text(
    model: str,
    panels: Sequence[Panel],
    layer: Layer | None,
    weights: bool,
    shown: Sequence[np.ndarray] | None,
    width: int,
    is_terminal: bool,
) -> str:
    """The lines of :func:`renderables`, coloured where they go to a terminal and ``NO_COLOR`` is not set."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=width, legacy_windows=False, highlight=False)
    if not is_terminal:
        console.no_color = True
    for text in renderables(model, panels, layer, weights, shown, width):
        console.print(text)
    lines = file.getvalue().rstrip("\n").split("\n")
    return "\n".join(lines if is_terminal else map(str.rstrip, lines))


def renderables(
    model: str,
    panels: Sequence[Panel],
    layer: Layer | None,
    weights: bool,
    shown: Sequence[np.ndarray] | None,
    width: int,
) -> Iterator[Text]:
    """Title, legend, and for each panel its lines, none wider than ``width`` columns."""
    from rich.text import Text

    yield Text(title(model, panels, layer), style="bold", overflow="fold")
    yield Text(legend(panels, layer, weights, hover=False), style="dim", overflow="fold")
    for i, panel in enumerate(panels):
        if panel.name:
            yield Text(f"\n{panel.name}", style="bold")
        yield from _panel(panels, i, layer, weights, shown, width)


def _panel(
    panels: Sequence[Panel],
    i: int,
    layer: Layer | None,
    weights: bool,
    shown: Sequence[np.ndarray] | None,
    width: int,
) -> Iterator[Text]:
    from rich.text import Text

    panel = panels[i]
    n_columns = len(panel.layers) if layer is None else panel.indices.shape[2]
    heads = [str(n) for n in panel.numbers] if layer is None else [f"{place + 1}." for place in range(n_columns)]
    with_weights = weights and panel.weights is not None
    at, cell = len(str(int(panel.positions.max(initial=0)))), _cell_width(panel, heads, with_weights)
    longest = max([3, *(_width(visible(text)) for text in panel.tokens)])
    room = _token_room(width - at - 1, min(_LONGEST_TOKEN, longest), cell, n_columns)
    a_block = max(1, (width - at - 1 - room) // cell)
    blocks = [range(start, min(start + a_block, n_columns)) for start in range(0, n_columns, a_block)]
    rows, note = rows_of(panels, shown, i, MOST_LINES // len(blocks))
    if note:
        yield Text(note, style="dim")
    for block in blocks:
        left = width - at - 1 - room - cell * len(block)
        is_last = block is blocks[-1] and panel.predicted is not None
        next_room = min(_LONGEST_NEXT, left - 1) if is_last and left > 10 else 0
        yield Text()
        label = "layer" if layer is None else "expert"
        line = Text(label.rjust(at + 1 + room), style="dim", no_wrap=True)
        line.append("".join(heads[c].rjust(cell) for c in block))
        yield _ended(line, " predicts next" if next_room > 12 else " next" if next_room else "", width)
        for token in rows.tolist():
            line = Text(str(int(panel.positions[token])).rjust(at) + " ", style="dim", no_wrap=True)
            line.append(_fitted(visible(panel.tokens[token]), room), style="not dim")
            for column in block:
                _append_cell(line, panel, token, column, layer, with_weights, cell)
            yield _ended(line, " " + _next(panel, token, next_room) if next_room else "", width)


def _token_room(width: int, longest: int, cell: int, n_columns: int) -> int:
    """Columns for the tokens' texts: fewer where that puts all layers into fewer blocks."""
    most = max(3, min(longest, width // 3))

    def blocks(room: int) -> int:
        return -(-n_columns // max(1, (width - room) // cell))

    return min(range(min(8, most), most + 1), key=lambda room: (blocks(room), -room))


def _next(panel: Panel, token: int, room: int) -> str:
    """The predicted token and its probability in so many columns."""
    text, p = predicted(panel, token), probability(panel, token)
    text_room = room - (len(p) + 1 if p else 0)
    return " ".join(filter(None, [_fitted(text, min(text_room, _width(text))), p]))


def _ended(line: Text, end: str, width: int) -> Text:
    line.append(end.rstrip(), style="dim")
    line.truncate(width)
    return line


def _append_cell(
    line: Text, panel: Panel, token: int, column: int, layer: Layer | None, weights: bool, width: int
) -> None:
    """One cell: the top expert of a layer, or one of the experts of the one layer."""
    slots = panel.slots(token, column if layer is None else 0)
    place = 0 if layer is None else column
    if place >= len(slots):
        recorded = panel.is_recorded(token, column if layer is None else 0)
        line.append(("·" if recorded else "?").rjust(width), style="dim")
        return
    expert, weight = slots[place]
    text = str(expert) + (f" {number(weight):>3}" if weights and weight is not None else "")
    line.append(" ")
    line.append(text.rjust(width - 1), style=f"not dim #000000 on {COLOURS[colour_of(expert)]}")


def _cell_width(panel: Panel, heads: Sequence[str], weights: bool) -> int:
    """Columns of a cell, with the blank before it."""
    widest = len(str(max(panel.n_experts) - 1))
    if weights and panel.weights is not None and panel.weights.size:
        widest += 1 + max(3, *(len(number(float(w))) for w in (panel.weights.min(), panel.weights.max())))
    return 1 + max(2, widest, *map(len, heads))


def _fitted(text: str, width: int) -> str:
    """A text of exactly so many columns, cut with … where it is longer."""
    from rich.cells import set_cell_size

    cut = text if _width(text) <= width else set_cell_size(text, width - 1) + "…"
    mark = _LEFT_TO_RIGHT if runs_right_to_left(cut) else ""
    return set_cell_size(cut, width) + mark


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
