"""What a counterfactual run shows, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp.experiments.counterfactual.confidence import By
from moe_interp.experiments.headlines import route_headlines
from moe_interp.results.tables import unselected

Row = Mapping[Any, Any]


class CounterfactualTables(Protocol):
    """The part of a counterfactual result that its summary reads."""

    data: xr.Dataset

    def by_confidence(self, by: By = ...) -> pd.DataFrame: ...

    def by_layer(self) -> pd.DataFrame: ...

    def controls(self, by: By | None = ...) -> pd.DataFrame: ...

    def prediction_calibration(self) -> pd.DataFrame: ...


def summary_text(result: CounterfactualTables) -> str:
    """What was scored, regret and its controls, the published pattern, and the noise floor."""
    data = result.data
    done, *found = route_headlines(result)
    lines = [
        done,
        *(f"* {sentence}" for sentence in found),
        " ",
        "In detail:",
        _temperature_line(data),
        _regret_line(result),
        *_control_lines(result),
    ]
    lines += [_layer_line(result.by_layer()), *_class_lines(result), _noise_line(data)]
    return "\n".join(line.strip() for line in lines if line)


def _pattern_line(classes: Mapping[str, Row]) -> str:
    """Whether the published pattern is there: aligned on confident tokens, uninformative on fragile ones."""
    states, parts = [], []
    for name, claim in (("confident", "aligned"), ("fragile", "uninformative")):
        row, found = classes[name], classes[name]["verdict"]
        if not row["n_cells"]:
            states.append("empty")
            parts.append(f"of {name} tokens it cannot be said (no token in the class)")
            continue
        is_open = found not in ("aligned", "misaligned", "uninformative")
        states.append("undecided" if is_open else "confirmed" if found == claim else "not confirmed")
        said = f"of {name} tokens there are {found}" if found.startswith("too few") else f"{name} tokens are {found}"
        parts.append(f"{said} (alignment {_interval(row, 'alignment')})")
    order = ("not confirmed", "empty", "undecided", "confirmed")
    overall = next(state for state in order if state in states)
    words = {
        "not confirmed": "is not confirmed",
        "empty": "cannot be said to be there or not",
        "undecided": "is undecided",
        "confirmed": "is confirmed",
    }
    return (
        f"The published pattern (the router aligned on confident tokens, uninformative on fragile ones) "
        f"{words[overall]}, with tokens classed by a second draw of routes: {' and '.join(parts)}."
    )


def _temperature_line(data: xr.Dataset) -> str:
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
        "fresh_draw": "a freshly drawn route in the standard one's place",
        "random": "random instead of the router's routes",
    }
    lines = [f"- with {words}, {_control(table[kind], kind)};" for kind, words in said.items() if kind in table]
    if "own_prediction" in table:
        lines.append(_own_line(table["own_prediction"], result.prediction_calibration()))
    return lines or ["- this run has no controls, so nothing says how much of it is real."]


def _control(row: Row, kind: str) -> str:
    """One control against the run's own on the same tokens."""
    if not row["n_cells"]:
        return "nothing can be said (no token)"
    value = f"regret is {_interval(row, 'regret')}"
    if kind == "fresh_draw":
        value += f", against {_interval(row, 'router_regret')} with the two exchanged"
    found = row["verdict"]
    words = f"the run's own is {found}" if found in ("larger", "smaller") else found
    return f"{value}; {words} (difference {_interval(row, 'excess_regret')})"


def _own_line(row: Row, calibration: pd.DataFrame) -> str:
    """The control by the model's own prediction, which supposes that it is calibrated: no verdict by itself."""
    with_own = "- with a next token drawn from the model's own prediction, "
    if not row["n_cells"]:
        return f"{with_own}nothing can be said (no token could be matched)."
    of = "" if row["matched"] > 0.9995 else f"on the {row['matched']:.1%} of the tokens that can be matched, "
    value = f"regret is {_interval(row, 'regret')} {of}where the run's own is {_interval(row, 'router_regret')}"
    how = _rows(calibration, "predicted")["all"]
    top = (
        ""
        if np.isnan(how["right"])
        else (
            f"its most likely token is right on {how['right']:.1%} of the tokens, with a mean probability of "
            f"{how['p_top']:.1%} (difference {_interval(how, 'calibration_error')}), and "
        )
    )
    return (
        f"{with_own}{value} (difference {_interval(row, 'excess_regret')}). By itself that says nothing of the routes: "
        f"where the prediction is not calibrated, it differs without a better one. Here {top}the realized token is "
        f"less likely than the prediction's entropy says by {_interval(how, 'surprise')} nats."
    )


def _layer_line(table: pd.DataFrame) -> str:
    if len(table) < 2:
        return ""
    rows = sorted(_rows(table, "layer").values(), key=lambda row: row["regret"])
    most, least = rows[-1], rows[0]
    return (
        f"By layer, estimates of regret run from {_interval(least, 'regret')} at layer {least['layer']} to "
        f"{_interval(most, 'regret')} at layer {most['layer']}."
    )


def _class_lines(result: CounterfactualTables) -> list[str]:
    """The published pattern, and its classes, where tokens can be classed without selection."""
    data = result.data
    by = unselected(data)
    if by is None:
        why = (
            "has no second draw of routes"
            if "logp_second" not in data
            else (
                "has a second draw that on most tokens brings no route that the first one lacks: a route in both would "
                "class a token by the very numbers that are compared"
            )
        )
        return [
            f"Whether the published pattern is there (the router aligned on confident tokens, uninformative on fragile "
            f'ones) cannot be said: the run {why}. by_confidence("standard") gives the published classes, which make a '
            "pattern by selection alone."
        ]
    table = result.by_confidence(by)
    classes = _rows(table, "class")
    lines = [_class_line(name, classes[name]) for name in ("confident", "middle", "fragile")]
    return [_pattern_line(classes), *lines, _unclassed_line(table, data)]


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
