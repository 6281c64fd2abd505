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


def headlines(result: TuningTables) -> list[str]:
    """What was tuned; whether held-out cross-entropy fell; whether better routes are taken; whether anything was
    harmed. A sentence or two each."""
    data, rows = result.data, _rows(result)
    own = rows[HELD_OUT, "all"]
    layers = ", ".join(map(str, data["layer"].values.tolist()))
    done = (
        f"Router tuning of {data.attrs.get('model', 'a model')}, layer {layers}, objective {data.attrs['objective']}: "
        f"{_count(data.sizes['step'], 'step')} on {_count(data.attrs['n_tokens'], 'token')}; "
        f"{_count(own['n_tokens'], 'held-out token')} of {_count(own['n_sequences'], 'sequence')}. Intervals are 95%, "
        "over sequences."
    )
    found = [done, f"Held-out cross-entropy {_change(own)}.", preference_words(own)]
    if (HELD_OUT, "confident") in rows:
        found.append(f"On tokens that the untuned model was sure of (p >= .9): {_change(rows[HELD_OUT, 'confident'])}.")
    return found


def summary_text(result: TuningTables) -> str:
    """The headlines, then other domains, and how far the router moved."""
    rows, end = _rows(result), result.curve().iloc[-1]
    own = rows[HELD_OUT, "all"]
    done, *found = headlines(result)
    found += [
        f"In {domain}, another domain: {_change(row)}."
        for (domain, tokens), row in rows.items()
        if tokens == "all" and domain != HELD_OUT
    ]
    found.append(
        f"{_shown(own, 'changed')} of the held-out tokens take another route than before. The router moved by "
        f"{end['weight_change']:.2g} of its norm; policy entropy {_shown(own, 'entropy')} nats, effective share of "
        f"experts {end['effective_experts']:.2f}, MaxVio {end['max_violation']:.2f}."
    )
    return "\n".join([done, *(f"* {line}" for line in found)])


def _rows(result: TuningTables) -> dict[tuple[str, str], Row]:
    return {(row["domain"], row["tokens"]): row for row in result.held_out().to_dict("records")}


def preference_words(row: Row) -> str:
    """Whether the router prefers the better routes, and whether it takes them."""
    if np.isnan(row["preference"]):
        return "No drawn route was better than the router's own on any held-out token."
    found = stats.decide(row["preference_low"], row["preference_high"], n=int(row["n_better"]), null=0.5)
    said = f"preference accuracy {_shown(row, 'preference')}, adoption of the better route {_shown(row, 'adoption')}"
    said += f"; overlap with it {row['overlap_before']:.2f} before, {row['overlap']:.2f} after"
    if found == "above" and row["adoption"] < ADOPTED:
        also = " Those others are better than before all the same." if _decided(row) == "below" else ""
        return (
            f"Preference rose without adoption: {said}. The router ranks better routes higher than it did, and takes "
            f"others.{also}"
        )
    taken = ", and better routes are taken"
    if not row["adoption_low"] >= ADOPTED:
        taken = "; whether better routes are taken is not shown"
    begin = {
        "above": f"Preference rose{taken}",
        "below": "Preference fell: the router moved away from the better routes",
        "too few": "Too few sequences have better routes to say whether preference rose",
    }.get(found, "Preference did not rise beyond its interval")
    return f"{begin}: {said}."


def _decided(row: Row) -> str:
    return stats.decide(row["ce_change_low"], row["ce_change_high"], n=int(row["n_sequences"]))


def _change(row: Row) -> str:
    words = {
        "below": "fell",
        "above": "rose",
        "within": "did not change",
        "open": "did not change beyond the interval",
        "too few": "changed (too few sequences to say more)",
    }[_decided(row)]
    low, high = row["ce_change_low"], row["ce_change_high"]
    bounds = "" if np.isnan(low) or np.isnan(high) else f" [{low:+.4f}, {high:+.4f}]"
    return f"{words}: {row['ce_before']:.4f} to {row['ce']:.4f} nats ({row['ce_change']:+.4f}{bounds})"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _shown(row: Row, name: str) -> str:
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"
