"""What a counterfactual run shows, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.experiments.confidence import By
from moe_interp.experiments.counterfactual_tables import FEWEST_SEQUENCES
from moe_interp.results.tables import unselected

Row = Mapping[Any, Any]
FEW_SEQUENCES = 20  # below, intervals by bootstrap over sequences are too short


class CounterfactualTables(Protocol):
    """The part of a counterfactual result that its summary reads."""

    data: xr.Dataset

    def by_confidence(self, by: By = ...) -> pd.DataFrame: ...

    def by_layer(self) -> pd.DataFrame: ...

    def controls(self, by: By | None = ...) -> pd.DataFrame: ...


def summary_text(result: CounterfactualTables) -> str:
    """What was scored, regret and its controls, the published pattern, and the noise floor."""
    data = result.data
    by = unselected(data)
    table = result.by_confidence(by)
    classes = _rows(table, "class")
    lines = [_run_line(data), _heating_line(data), _regret_line(result), *_control_lines(result)]
    lines += [_layer_line(result.by_layer()), pattern_line(classes, by), _fallback_line(data, by)]
    lines += [_class_line(name, classes[name]) for name in ("confident", "middle", "fragile")]
    lines += [_unclassed_line(table, data), _noise_line(data)]
    return "\n".join(line for line in lines if line)


def pattern_line(classes: Mapping[str, Row], by: By) -> str:
    """Whether the published pattern is there: aligned on confident tokens, uninformative on fragile ones."""
    states, parts = [], []
    for name, claim in (("confident", "aligned"), ("fragile", "uninformative")):
        row, found = classes[name], classes[name]["verdict"]
        if not row["n_cells"]:
            states.append("empty")
            parts.append(f"of {name} tokens it cannot be said (no token in the class)")
            continue
        states.append("confirmed" if found == claim else "undecided" if found == "undecided" else "not confirmed")
        few = row["n_sequences"] < FEWEST_SEQUENCES
        why = f", with fewer than {FEWEST_SEQUENCES} sequences" if few else ""
        parts.append(f"{name} tokens are {found} (alignment {_interval(row, 'alignment')}{why})")
    order = ("not confirmed", "empty", "undecided", "confirmed")
    overall = next(state for state in order if state in states)
    said = {
        "not confirmed": "is not confirmed",
        "empty": "cannot be said to be there or not",
        "undecided": "is undecided",
        "confirmed": "is confirmed",
    }
    return (
        f"The published pattern (the router aligned on confident tokens, uninformative on fragile ones) "
        f"{said[overall]}, with tokens classed by {_WAYS[by]}: {' and '.join(parts)}."
    )


_WAYS = {
    "resampled": "a second draw of routes",
    "entropy": "the prediction's entropy",
    "standard": "their own probability, which selects",
}


def _run_line(data: xr.Dataset) -> str:
    n = len(np.unique(data["sequence"].values))
    few = f"; of fewer than {FEW_SEQUENCES} sequences they are too short" if n < FEW_SEQUENCES else ""
    return (
        f"{data.attrs.get('model', 'The model')}: {_count(data.sizes['token'], 'token')} of {_count(n, 'sequence')}, "
        f"at {_count(data.sizes['layer'], 'MoE layer')}, with up to {_count(data.sizes['route'], 'route')} each from "
        f"{data.attrs.get('sampler', 'a sampler')}. Intervals are 95%, by bootstrap over sequences{few}."
    )


def _heating_line(data: xr.Dataset) -> str:
    share = float((data["heating"].values > 1).mean())
    if not share:
        return ""
    said = f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"
    where = f"{said} of the tokens, counted at each layer,"
    return f"{where} needed a higher temperature for some of their routes, so sure is the router."


def _regret_line(result: CounterfactualTables) -> str:
    row = _rows(result.controls(), "kind")["router"]
    m = row["n_distinct"]
    best = f"best of {m} other routes" if m > 1 else "first other route"
    return (
        f"The {best} beats the standard one by {_interval(row, 'regret')} nats (regret) and {_interval(row, 'gap')} in "
        f"probability (gap). Best-of-many is positive by construction:"
    )


def _control_lines(result: CounterfactualTables) -> list[str]:
    table = _rows(result.controls(), "kind")
    said = {
        "own_prediction": "a next token drawn from the model's own prediction",
        "fresh_draw": "a freshly drawn route in the standard one's place",
        "random": "random instead of the router's routes",
    }
    lines = [f"- with {words}, {_control(table[kind], kind)};" for kind, words in said.items() if kind in table]
    return lines or ["- this run has no controls, so nothing says how much of it is real."]


def _control(row: Row, kind: str) -> str:
    """One control against the run's own on the same tokens."""
    if not row["n_cells"]:
        return f"nothing can be said ({'no token could be matched' if kind == 'own_prediction' else 'no token'})"
    value = f"regret is {_interval(row, 'regret')}"
    if kind == "own_prediction" and row["matched"] < 0.9995:
        value += f" on the {row['matched']:.1%} of the tokens that can be matched, where the run's own is "
        value += _interval(row, "router_regret")
    elif kind == "fresh_draw":
        value += f", against {_interval(row, 'router_regret')} with the two exchanged"
    return f"{value}; {_excess(row)}"


def _excess(row: Row) -> str:
    low, high = row["excess_regret_low"], row["excess_regret_high"]
    if np.isnan(low) or np.isnan(high):
        few = "one sequence" if row["n_sequences"] < 2 else "no interval"
        return f"whether they differ cannot be said ({few}; difference {row['excess_regret']:.3f})"
    words = (
        "the run's own is larger" if low > 0 else "the run's own is smaller" if high < 0 else "no difference is seen"
    )
    return f"{words} (difference {_interval(row, 'excess_regret')})"


def _layer_line(table: pd.DataFrame) -> str:
    if len(table) < 2:
        return ""
    rows = sorted(_rows(table, "layer").values(), key=lambda row: row["regret"])
    most, least = rows[-1], rows[0]
    return (
        f"Regret is largest at layer {most['layer']} ({_interval(most, 'regret')}) and smallest at layer "
        f"{least['layer']} ({_interval(least, 'regret')})."
    )


def _fallback_line(data: xr.Dataset, by: By) -> str:
    if by == "resampled" or "logp_second" not in data:
        return ""
    return (
        "They are not classed by the second draw, which on most tokens has no route that the first one lacks: a route "
        "in both would class a token by the very numbers that are compared."
    )


def _class_line(name: str, row: Row) -> str:
    if not row["n_cells"]:
        return f"- {name}: no token."
    undefined = f", undefined on {row['alignment_undefined']:.0%}" if row["alignment_undefined"] > 0 else ""
    return (
        f"- {name}: {_count(row['n_tokens'], 'token')} of {_count(row['n_sequences'], 'sequence')}, regret "
        f"{_interval(row, 'regret')}, a better route on {row['positive_rate']:.0%}, the standard route the best on "
        f"{row['inclusion_1']:.0%}, alignment {_interval(row, 'alignment')}{undefined}."
    )


def _unclassed_line(table: pd.DataFrame, data: xr.Dataset) -> str:
    n, cells = int(table["n_unclassed"].iloc[0]), data.sizes["token"] * data.sizes["layer"]
    if not n:
        return ""
    return f"- in no class: {n / cells:.1%}, whose second draw has no route that the first one lacks."


def _noise_line(data: xr.Dataset) -> str:
    distance = np.abs(data["logp_null"].values - data["logp_standard"].values[:, None])
    slow = sorted(layer for layer, method in data.attrs.get("method", {}).items() if method == "naive")
    words = f" Layers {', '.join(slow)} were scored by one full forward a route." if slow else ""
    return (
        f"Noise floor: the standard route through the same machinery differs by {np.median(distance):.1e} nats in the "
        f"median and {distance.max():.1e} at most.{words}"
    )


def _rows(table: pd.DataFrame, key: str) -> dict[str, Row]:
    """The rows by their name."""
    return {str(row[key]): row for row in table.to_dict("records")}


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _interval(row: Row, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if np.isnan(row[name]):
        return "undefined"
    return f"{row[name]:.3f}" + (" (no interval)" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")
