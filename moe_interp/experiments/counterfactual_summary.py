"""What a counterfactual run shows, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.experiments.confidence import By

Row = Mapping[Any, Any]


class CounterfactualTables(Protocol):
    """The part of a counterfactual result that its summary reads."""

    data: xr.Dataset

    def by_confidence(self, by: By = ...) -> pd.DataFrame: ...

    def by_layer(self) -> pd.DataFrame: ...

    def controls(self, by: By | None = ...) -> pd.DataFrame: ...


def summary_text(result: CounterfactualTables) -> str:
    """What was scored, regret and its controls, the published pattern, and the noise floor."""
    data = result.data
    by: By = "resampled" if "logp_second" in data else "entropy"
    classes = _rows(result.by_confidence(by), "class")
    lines = [_run_line(data), _regret_line(result), *_control_lines(result), _layer_line(result.by_layer())]
    lines.append(pattern_line(classes, by))
    lines += [_class_line(name, classes[name]) for name in ("confident", "middle", "fragile")]
    lines.append(_noise_line(data))
    return "\n".join(line for line in lines if line)


def pattern_line(classes: Mapping[str, Row], by: By) -> str:
    """Whether the published pattern is there: aligned on confident tokens, uninformative on fragile ones."""
    states, parts = [], []
    for name, claim in (("confident", "aligned"), ("fragile", "uninformative")):
        found = classes[name]["verdict"]
        states.append("confirmed" if found == claim else "undecided" if found == "undecided" else "not confirmed")
        parts.append(f"{name} tokens are {found} (alignment {_interval(classes[name], 'alignment')})")
    overall = next((state for state in ("not confirmed", "undecided") if state in states), "confirmed")
    return (
        f"The published pattern (the router aligned on confident tokens, uninformative on fragile ones) is {overall}, "
        f"with tokens classed by {_WAYS[by]}: {' and '.join(parts)}."
    )


_WAYS = {
    "resampled": "a second draw of routes",
    "entropy": "the prediction's entropy",
    "standard": "their own probability, which selects",
}


def _run_line(data: xr.Dataset) -> str:
    layers = data.sizes["layer"]
    return (
        f"{data.attrs.get('model', 'The model')}: {data.sizes['token']} tokens of "
        f"{len(np.unique(data['sequence'].values))} sequences, at {layers} MoE layer{'s' * (layers != 1)}, with up to "
        f"{data.sizes['route']} routes each from {data.attrs.get('sampler', 'a sampler')}. Intervals are 95%, by "
        f"bootstrap over sequences."
    )


def _regret_line(result: CounterfactualTables) -> str:
    row = _rows(result.controls(), "kind")["router"]
    return (
        f"The best of {row['n_distinct']} other routes beats the standard one by {_interval(row, 'regret')} nats "
        f"(regret) and {_interval(row, 'gap')} in probability (gap). Best-of-many is positive by construction:"
    )


def _control_lines(result: CounterfactualTables) -> list[str]:
    table = _rows(result.controls(), "kind")
    said = {
        "own_prediction": "a next token drawn from the model's own prediction",
        "fresh_draw": "a freshly drawn route in the standard one's place",
        "random": "random instead of the router's routes",
    }
    lines = []
    for kind, words in said.items():
        if kind in table:
            row = table[kind]
            part = f", on the {row['matched']:.1%} of the tokens that can be matched" if row["matched"] < 0.9995 else ""
            lines.append(f"- with {words}, regret is {_interval(row, 'regret')}; {_excess(row)}{part};")
    return lines or ["- this run has no controls, so nothing says how much of it is real."]


def _excess(row: Row) -> str:
    low, high = row["excess_regret_low"], row["excess_regret_high"]
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


def _class_line(name: str, row: Row) -> str:
    if not row["n_cells"]:
        return f"- {name}: no token."
    undefined = f", undefined on {row['alignment_undefined']:.0%}" if row["alignment_undefined"] > 0 else ""
    return (
        f"- {name}: {row['n_tokens']} tokens of {row['n_sequences']} sequences, regret {_interval(row, 'regret')}, a "
        f"better route on {row['positive_rate']:.0%}, the standard route the best on {row['inclusion_1']:.0%}, "
        f"alignment {_interval(row, 'alignment')}{undefined}."
    )


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


def _interval(row: Row, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.3f}" + (" (no interval)" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")
