"""Tokens, routes and the legend in words, for the page and the terminal alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from moe_interp.routing_view.panel import Panel
from moe_interp.slots import EMPTY
from moe_interp.types import Layer

# Paul Tol's "light" scheme: fills behind black text that are told apart with every kind of colour vision
COLOURS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#aaaa00", "#dddddd")

_MARKS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}


def colour_of(expert: int) -> int:
    """The place of an expert's colour among :data:`COLOURS`: the same in every prompt, layer and model."""
    return expert % len(COLOURS)


def visible(text: str) -> str:
    """A token's text on one line, with what cannot be seen written out.

    Spaces at its ends are ``␣``, line breaks ``↵``, tabs ``⇥``, an empty text ``∅``; other characters that do not show
    are their code, such as ``<200B>``. A mark that joins the letter before it stands on a dotted circle.
    """
    if not text:
        return "∅"
    inner = text.strip(" ")
    left = len(text) - len(text.lstrip(" ")) if inner else len(text)
    right = len(text) - left - len(inner)
    shown = "".join(_character(c) for c in inner)
    joins = bool(inner) and unicodedata.category(inner[0]).startswith("M")
    return "␣" * left + ("◌" if joins else "") + shown + "␣" * right


def _character(character: str) -> str:
    if character == " " or unicodedata.category(character) not in _UNSEEN:
        return character
    return _MARKS.get(character) or f"<{ord(character):02X}>"


def runs_right_to_left(text: str) -> bool:
    """Whether a text holds a character of a script that is written from right to left."""
    return any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text)


def percent(p: float) -> str:
    """A probability as a percentage of two digits."""
    return f"{100 * p:.0f}%" if p >= 0.0995 else f"{100 * p:.2g}%"


def number(weight: float) -> str:
    """A weight in few characters: ``.52``, ``1.0``, ``2.5``."""
    return f"{weight:.2f}".replace("0.", ".", 1) if abs(weight) < 0.995 else f"{weight:.1f}"


def predicted(panel: Panel, token: int) -> str:
    """The next token that the model finds most probable; empty where it is not known."""
    return "" if panel.predicted is None else visible(panel.predicted[token])


def probability(panel: Panel, token: int) -> str:
    """The probability of that token; empty where it is not known."""
    return "" if panel.predicted_p is None else percent(float(panel.predicted_p[token]))


def details(panel: Panel, token: int, layer: int) -> str:
    """Everything about one cell, a line each: token, layer, every expert with its weight, the predicted token."""
    stack = f"{panel.name} " if panel.name else ""
    lines = [
        f"{visible(panel.tokens[token])} at position {panel.positions[token]}, {stack}layer {panel.numbers[layer]}"
    ]
    for expert, weight in panel.slots(token, layer):
        lines.append(f"expert {expert}" + ("" if weight is None else f": weight {weight:.3f}"))
    if len(lines) == 1:
        lines.append("no expert" if panel.is_recorded(token, layer) else "not recorded")
    if panel.predicted is not None:
        lines.append(f"predicts next: {predicted(panel, token)} {probability(panel, token)}".rstrip())
    return "\n".join(lines)


def title(model: str, panels: Sequence[Panel], layer: Layer | None) -> str:
    """What is shown, on one line."""
    parts = []
    for panel in panels:
        n = len(panel.tokens)
        stack = f"the {panel.name}'s " if panel.name else ""
        experts = "/".join(map(str, sorted(set(panel.n_experts))))
        slots = panel.indices.shape[2]
        where = f"layer {panel.numbers[0]}" if layer is not None else _layers(panel)
        tokens = "1 token" if n == 1 else f"{n} tokens"
        parts.append(f"{tokens} through {stack}{where} ({experts} experts, {slots} a token)")
    return f"{model}: " + ", ".join(parts)


def _layers(panel: Panel) -> str:
    return f"{len(panel.layers)} MoE layers" if len(panel.layers) > 1 else "1 MoE layer"


def legend(panels: Sequence[Panel], layer: Layer | None, weights: bool, hover: bool) -> str:
    """What a row, a column, a cell and a colour mean, in sentences."""
    has_weights = all(panel.weights is not None for panel in panels)
    most = max(max(panel.n_experts) for panel in panels)
    if layer is None:
        which = "the expert of largest weight" if has_weights else "the first expert of the route"
        with_weight = ", with its weight" if weights and has_weights else ""
        said = [f"A row is a token, a column an MoE layer, a cell {which} there{with_weight}."]
    else:
        order = "with its weight, the largest first" if has_weights else "in the router's order"
        said = [f"A row is a token, a cell one of its experts, {order}."]
    repeat = f" ({most} experts share {len(COLOURS)} colours: go by the number)" if most > len(COLOURS) else ""
    unrelated = "; an expert at one layer is unrelated to the same number at another" if layer is None else ""
    said.append(f"Equal numbers have equal colours{repeat}{unrelated}.")
    if any((panel.indices == EMPTY).all(axis=2).any() for panel in panels):
        said.append("A dot is a token that no expert took there.")
    if any((panel.indices < EMPTY).any() for panel in panels):
        said.append("A question mark is a route that was not recorded.")
    marks = {"␣": "a space", "↵": "a line break", "⇥": "a tab"}
    texts = "".join(visible(text) for panel in panels for text in (*panel.tokens, *(panel.predicted or ())))
    if used := [f"{mark} is {name}" for mark, name in marks.items() if mark in texts]:
        said.append(", ".join(used) + ".")
    if hover:
        said.append("Point at a cell for all its experts, their weights and the predicted next token.")
    return " ".join(said)
