"""The routing of a prompt as HTML: a table that is read at a glance, with details under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from moe_interp.routing_view.cut import rows_of
from moe_interp.routing_view.panel import Panel
from moe_interp.routing_view.words import (
    COLOURS,
    colour_of,
    details,
    legend,
    number,
    predicted,
    probability,
    title,
    visible,
)
from moe_interp.types import Layer

MOST_CELLS = 8_000  # of one panel: at eight experts a token about two megabytes


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("moe_interp.routing_view", "")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.get_template("routing.html")


def as_html(
    model: str,
    panels: Sequence[Panel],
    layer: Layer | None,
    weights: bool,
    shown: Sequence[np.ndarray] | None,
    *,
    page: bool,
) -> str:
    """An element for a notebook, or a whole page; every text is escaped, nothing comes from elsewhere.

    Without JavaScript the details appear all the same, as the browser's own tooltips.
    """
    return str(
        _template().render(
            page=page,
            title=title(model, panels, layer),
            legend=legend(panels, layer, weights, hover=True),
            colours=COLOURS,
            panels=[_panel(panels, i, layer, weights, shown) for i in range(len(panels))],
        )
    )


def _panel(
    panels: Sequence[Panel], i: int, layer: Layer | None, weights: bool, shown: Sequence[np.ndarray] | None
) -> dict[str, Any]:
    panel = panels[i]
    n_columns = panel.indices.shape[2] if layer is not None else len(panel.layers)
    rows, note = rows_of(panels, shown, i, MOST_CELLS // n_columns)
    columns = panel.numbers if layer is None else [f"{place + 1}." for place in range(n_columns)]
    cells = _layer_cells if layer is None else _slot_cells
    made = [
        {
            "position": int(panel.positions[token]),
            "token": visible(panel.tokens[token]),
            "id": "" if panel.token_ids is None else int(panel.token_ids[token]),
            "cells": cells(panel, token, weights),
            "predicted": predicted(panel, token),
            "p": probability(panel, token),
        }
        for token in rows.tolist()
    ]
    predicts = panel.predicted is not None
    return {"name": panel.name, "columns": columns, "rows": made, "note": note, "predicts": predicts}


def _layer_cells(panel: Panel, token: int, weights: bool) -> list[dict[str, Any]]:
    """One cell a layer: its top expert."""
    made = []
    for layer in range(len(panel.layers)):
        slots = panel.slots(token, layer)
        top = slots[0] if slots else (None, None)
        made.append(_cell(top, weights, details(panel, token, layer), panel.is_recorded(token, layer)))
    return made


def _slot_cells(panel: Panel, token: int, weights: bool) -> list[dict[str, Any]]:
    """One cell an expert of the one layer."""
    slots: list[tuple[int | None, float | None]] = [*panel.slots(token, 0)]
    slots += [(None, None)] * (panel.indices.shape[2] - len(slots))
    text, recorded = details(panel, token, 0), panel.is_recorded(token, 0)
    return [_cell(slot, weights, text, recorded) for slot in slots]


def _cell(slot: tuple[int | None, float | None], weights: bool, text: str, recorded: bool) -> dict[str, Any]:
    expert, weight = slot
    if expert is None:
        return {"colour": "", "expert": "·" if recorded else "?", "weight": "", "details": text}
    shown = number(weight) if weights and weight is not None else ""
    return {"colour": f"c{colour_of(expert)}", "expert": expert, "weight": shown, "details": text}
