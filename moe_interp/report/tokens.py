"""The token view: text whose tokens are coloured by regret, with the routes behind each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from moe_interp.report.html import environment, html_table
from moe_interp.results.tables import CounterfactualTables

STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats: equal on every page, so that colours may be compared
MOST_CELLS = 30_000  # tokens times layers on one page: about three megabytes
WORST = 20  # rows of the table that says the same in words


def token_view(result: CounterfactualTables, sequences: Sequence[str] | None = None, most: int = MOST_CELLS) -> Markup:
    """The text of the scored sequences as HTML, to be put into a page; it needs nothing from elsewhere.

    Each token is coloured by the regret of its standard route at the layer chosen (or at the worst of all layers).
    Under the pointer, or with the arrow keys, appear its standard and best routes and the probabilities that they give
    the next token. Below stand the tokens of largest regret as a table. Every text is escaped.

    Args:
        result: A counterfactual result.
        sequences: Ids of those to show; all by default.
        most: Tokens times layers to show at most; whole sequences are left out beyond, and the view says how many.
    """
    table = result.token_table()
    names = list(dict.fromkeys(table["sequence"]))
    asked = names if sequences is None else [name for name in names if name in set(sequences)]
    shown = _fitting(table["sequence"].value_counts(), asked, most)
    table = table[table["sequence"].isin(shown)]
    layers = list(dict.fromkeys(table["layer"]))
    return Markup(
        environment()
        .get_template("tokens.html")
        .render(
            view={"layers": layers, "steps": STEPS, "sequences": _by_sequence(table)},
            steps=_step_labels(),
            layers=layers,
            left_out=len(asked) - len(shown),
            worst=html_table(_worst(table)),
        )
    )


def _fitting(sizes: pd.Series, names: list[str], most: int) -> list[str]:
    """The first sequences, as many as have ``most`` rows together; at least one."""
    total = np.cumsum([sizes[name] for name in names])
    return names[: max(1, int((total <= most).sum()))]


def _by_sequence(table: pd.DataFrame) -> list[dict[str, Any]]:
    """By sequence, its tokens: position, text, next text, p, and by layer ``[regret, best p, standard, best]``."""
    found: dict[str, list[list[Any]]] = {}
    for _, here in table.groupby(["sequence", "pos"], sort=False):
        first = here.iloc[0]
        cells = [
            [_short(regret), _short(p), standard, best]
            for regret, p, standard, best in zip(
                here["regret"], here["p_best"], here["standard_route"], here["best_route"]
            )
        ]
        token = [int(first["pos"]), first["token_text"], first["target_text"], _short(first["p_standard"]), cells]
        found.setdefault(str(first["sequence"]), []).append(token)
    return [{"id": name, "tokens": tokens} for name, tokens in found.items()]


def _worst(table: pd.DataFrame) -> pd.DataFrame:
    columns = ["sequence", "pos", "token_text", "target_text", "layer", "p_standard", "p_best", "regret"]
    worst = table.sort_values("regret", ascending=False, kind="stable").head(WORST)[columns]
    texts = {name: worst[name].map(repr) for name in ("token_text", "target_text")}
    return worst.assign(**texts).rename(columns={"token_text": "token", "target_text": "next"})


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if np.isfinite(value) else None


def _step_labels() -> list[str]:
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(STEPS)]
    return [f"below {STEPS[0]:g}", *inner, f"{STEPS[-1]:g} and more"]
