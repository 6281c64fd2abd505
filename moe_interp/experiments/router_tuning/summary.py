"""What a tuning run shows, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp import stats
from moe_interp.experiments.router_tuning.data import HELD_OUT

ADOPTED = 0.1  # adoption below it, with a preference above a half, is said in words
Row = Mapping[Any, Any]


class TuningTables(Protocol):
    """The part of a tuning result that its summary reads."""

    data: xr.Dataset

    def held_out(self) -> pd.DataFrame: ...

    def curve(self) -> pd.DataFrame: ...


def summary_text(result: TuningTables) -> str:
    """What was tuned, what it did to held-out cross-entropy, and which routes are really taken."""
    data, table, end = result.data, result.held_out(), result.curve().iloc[-1]
    rows = {(row["domain"], row["tokens"]): row for row in table.to_dict("records")}
    own = rows[HELD_OUT, "all"]
    layers = ", ".join(map(str, data["layer"].values.tolist()))
    lines = [
        f"Router tuning of {data.attrs.get('model', 'a model')}, layer {layers}, objective {data.attrs['objective']}: "
        f"{data.sizes['step']} steps on {data.attrs['n_tokens']} tokens; {own['n_tokens']} held-out tokens of "
        f"{own['n_sequences']} sequences.",
        f"* Held-out cross-entropy {_change(own)}.",
        f"* {_routes_line(own)}",
        f"* {preference_words(own)}",
        f"* The router moved by {end['weight_change']:.2g} of its norm; policy entropy {_shown(own, 'entropy')} nats, "
        f"effective share of experts {end['effective_experts']:.2f}, MaxVio {end['max_violation']:.2f}.",
    ]
    if (HELD_OUT, "confident") in rows:
        lines.append(
            f"* On tokens that the untuned model was sure of (p >= .9): {_change(rows[HELD_OUT, 'confident'])}."
        )
    lines += [
        f"* In {domain}, another domain: {_change(row)}."
        for (domain, tokens), row in rows.items()
        if tokens == "all" and domain != HELD_OUT
    ]
    return "\n".join(lines)


def preference_words(row: Row) -> str:
    """Whether the router prefers the better routes, and whether it takes them."""
    if np.isnan(row["preference"]):
        return "No drawn route was better than the router's own on any held-out token."
    rose, adopted = row["preference_low"] > 0.5, row["adoption"]
    said = f"preference accuracy {_shown(row, 'preference')}, adoption of the better route {_shown(row, 'adoption')}"
    overlap = f"overlap with it {row['overlap_before']:.2f} before, {row['overlap']:.2f} after"
    if rose and adopted < ADOPTED:
        also = " Those others are better than before all the same." if row["ce_change_high"] < 0 else ""
        return (
            f"Preference rose without adoption: {said}; {overlap}. The router ranks better routes higher than it did, "
            f"and takes others.{also}"
        )
    if rose:
        return f"Preference rose, and better routes are taken: {said}; {overlap}."
    return f"Preference did not rise beyond its interval: {said}; {overlap}."


def _routes_line(row: Row) -> str:
    return f"{_shown(row, 'changed')} of the tokens take another route than before."


def _change(row: Row) -> str:
    low, high = row["ce_change_low"], row["ce_change_high"]
    decided = stats.decide(low, high, n=int(row["n_sequences"]))
    words = {
        "below": "fell",
        "above": "rose",
        "within": "did not change",
        "open": "did not change beyond the interval",
        "too few": "changed (too few sequences to say more)",
    }[decided]
    shown = f"{row['ce_change']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"{words}: {row['ce_before']:.4f} to {row['ce']:.4f} nats ({shown})"


def _shown(row: Row, name: str) -> str:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"
