"""``RoutingView``: the routing of a prompt, which shows itself in a notebook and in a terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_interp.routing_view.html import as_html
from moe_interp.routing_view.panel import Panel
from moe_interp.routing_view.terminal import as_text, renderables
from moe_interp.types import Layer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True, eq=False, repr=False)
class RoutingView:
    """The routing of one prompt, token by layer by expert; what ``moe.show(text)`` returns.

    A notebook shows it as a table with details under the pointer, a terminal as coloured text. The output of a cell
    needs nothing from elsewhere. ``print(view)`` writes the text; ``rich.print(view)`` and ``str(view)`` work likewise.
    Long prompts are cut in what is shown, with a note; :meth:`to_dataframe` always has every token.

    Attributes:
        model: The model's name.
        panels: One a stack: one for most models, encoder and decoder for an encoder-decoder.
        layer: The one layer that is shown slot by slot; None where all are shown, by their top expert.
        weights: Whether the cells hold weights.
        shown: Indices of the tokens to show, by panel; None for all, as many as fit.

    What it does not show: what the experts compute, and by how little another expert was passed over.
    """

    model: str
    panels: Sequence[Panel]
    layer: Layer | None = None
    weights: bool = False
    shown: Sequence[np.ndarray] | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row a token, layer and slot, empty slots left out.

        Columns: ``position, token_id, token, layer, slot, expert, weight, predicted_id, predicted, predicted_p``.
        Layers of an encoder-decoder are ``("encoder", 1)``; the encoder's rows hold the prompt's tokens, the decoder's
        its own. What was not recorded is missing (None or NaN).
        """
        return pd.concat([_rows(panel) for panel in self.panels], ignore_index=True)

    def html(self, page: bool = True) -> str:
        """The view as HTML that needs nothing from elsewhere.

        Args:
            page: As a whole document, to be written to a file; else the element alone, as a notebook shows it.
        """
        return as_html(self.model, self.panels, self.layer, self.weights, self.shown, page=page)

    def _repr_html_(self) -> str:
        return self.html(page=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from renderables(self.model, self.panels, self.layer, self.weights, self.shown, options.max_width)

    def __str__(self) -> str:
        """The text that a terminal shows, as wide as the terminal; coloured where the output is one."""
        width = shutil.get_terminal_size().columns
        is_terminal = bool(getattr(sys.stdout, "isatty", bool)())
        return as_text(self.model, self.panels, self.layer, self.weights, self.shown, width, is_terminal)

    __repr__ = __str__


def _rows(panel: Panel) -> pd.DataFrame:
    """The rows of :meth:`RoutingView.to_dataframe` for one stack."""
    token, layer, slot = np.nonzero(panel.indices >= 0)

    def of_token(values: Any) -> Any:
        return None if values is None else np.asarray(values)[token]

    labels = np.empty(len(panel.layers), dtype=object)
    labels[:] = panel.layers
    columns = {
        "position": panel.positions[token],
        "token_id": of_token(panel.token_ids),
        "token": np.asarray(panel.tokens, dtype=object)[token],
        "layer": labels[layer] if panel.name else np.asarray(panel.layers)[layer],
        "slot": slot,
        "expert": panel.indices[token, layer, slot],
        "weight": np.nan if panel.weights is None else panel.weights[token, layer, slot],
        "predicted_id": of_token(panel.predicted_ids),
        "predicted": None if panel.predicted is None else np.asarray(panel.predicted, dtype=object)[token],
        "predicted_p": np.nan if panel.predicted_p is None else panel.predicted_p[token],
    }
    return pd.DataFrame(columns)
