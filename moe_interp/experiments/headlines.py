"""What a summary and a page begin with: what was done, on which model, and three findings in a sentence each.

Whether something is shown is taken from the verdicts of the tables, so that a sentence holds for every outcome: shown,
the other way round, not shown, too few items, or not testable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.counterfactual.confidence import By
from moe_interp.experiments.isolation.data import chosen, delta_array, items_by_domain, sign
from moe_interp.results.tables import IsolationTables, unselected

Row = Mapping[Any, Any]


class RouteTables(Protocol):
    """The part of a counterfactual result that its headlines read."""

    data: xr.Dataset

    def by_confidence(self, by: By = ...) -> pd.DataFrame: ...

    def controls(self, by: By | None = ...) -> pd.DataFrame: ...


def isolation_headlines(result: IsolationTables, alpha: float = 0.05) -> list[str]:
    """What was isolated, whether the router prefers the better experts, whether single experts help or hurt, and
    whether they serve some domains more than others."""
    data = result.data
    sizes = {domain: len(index) for domain, index in items_by_domain(data).items()}
    how = "taken away from" if sign(data) < 0 else "given"
    done = (
        f"{'Ablation' if sign(data) < 0 else 'Isolation'} of {data.sizes['expert']} experts in each of "
        f"{data.sizes['layer']} layers of {data.attrs.get('model', 'the model')}; {sum(sizes.values())} items "
        f"({', '.join(f'{name} {n}' for name, n in sizes.items())}){_merged(data)}. "
        f"One at a time, each expert is {how} "
        "all tokens of its layer, and the right answers are scored."
    )
    return [done, _preference(result), _single_experts(result, alpha), _between_domains(result)]


def route_headlines(result: RouteTables) -> list[str]:
    """What was scored, whether the router ranks routes by how well they predict, where the model is confident and
    where it is not, and whether its own route beats a fresh draw."""
    data = result.data
    n = len(np.unique(data["sequence"].values))
    merged = sum(len(names) for names in data.attrs.get("merged", {}).values())
    more = f" ({merged} more with the same content are not counted)" if merged else ""
    done = (
        f"Counterfactual routes of {data.attrs.get('model', 'the model')}: {_count(data.sizes['token'], 'token')} of "
        f"{_count(n, 'sequence')}{more}, at {_count(data.sizes['layer'], 'MoE layer')}, with up to "
        f"{_count(data.sizes['route'], 'route')} each from {data.attrs.get('sampler', 'a sampler')}. Intervals are "
        "95%, over sequences."
    )
    controls = {str(row["kind"]): row for row in result.controls().to_dict("records")}
    by = unselected(data)
    if by is None:
        aligned = [
            "Whether the router knows better where the model is confident cannot be said: the run has no second draw "
            "of routes that brings new ones.",
            _best_of_many(controls["router"]),
        ]
    else:
        classes = {str(row["class"]): row for row in result.by_confidence(by).to_dict("records")}
        aligned = [_alignment(name, classes[name]) for name in ("confident", "fragile")]
    return [done, *aligned, _fresh_draw(controls)]


def interval(value: float, low: float, high: float, digits: int = 2) -> str:
    """``0.31 [95%: 0.20, 0.41]``."""
    if np.isnan(value):
        return "undefined"
    # adding zero turns -0.00 into 0.00
    shown = [f"{round(float(x), digits) + 0.0:.{digits}f}" for x in (value, low, high)]
    is_there = np.isfinite(low) and np.isfinite(high)
    return f"{shown[0]} [95%: {shown[1]}, {shown[2]}]" if is_there else f"{shown[0]} (no interval)"


_PREFERS = {
    "positive correlation": "The router prefers the better experts",
    "negative correlation": "The router prefers the worse experts",
    "no clear correlation": "That the router prefers the better experts, or the worse, is not shown",
    "no correlation beyond chance": "That the router prefers the better experts, or the worse, is not shown",
}


def _preference(result: IsolationTables) -> str:
    unknown = "Whether the router prefers the better experts cannot be said"
    try:
        row = result.calibration_by_domain().iloc[-1]
    except DataError as error:
        return f"{unknown}: {error.given}; expected {error.expected}."
    verdict = str(row["verdict"])
    said = next((words for start, words in _PREFERS.items() if verdict.startswith(start)), None)
    rho = (
        f"rank correlation rho of routing and quality {interval(row['rho'], row['low'], row['high'])}, "
        f"{_count(result.data.sizes['layer'], 'layer')}, {_count(int(row['n_items']), 'item')}"
    )
    if said is None:
        return f"{unknown}: {verdict.split(':')[0]} ({rho})."
    corrected = interval(row["corrected"], row["corrected_low"], row["corrected_high"])
    return f"{said}: {rho}; without the noise of so few items {corrected}."


def _single_experts(result: IsolationTables, alpha: float) -> str:
    data, baseline = result.data, chosen(result.data, "baseline", None)
    counts = result.specialization(baseline=baseline, alpha=alpha).attrs
    what = "Taking an expert away" if sign(data) < 0 else "An expert alone"
    means = delta_array(data, chosen(data, "mass", None), baseline).mean((1, 2))
    found, n = stats.mean_interval(means), _count(len(means), "item")
    mean = interval(float(found.estimate), float(found.low), float(found.high))
    on_average = f"the mean change of the answer is {mean} nats per token against {baseline} routing, {n}"
    if not counts["n_tests"]:
        return f"Which experts help or hurt a domain cannot be said: too few items in every domain; {on_average}."
    return (
        f"{what} helps in {counts['helped']} and hurts in {counts['hurt']} of {counts['n_tests']} tests (domain x "
        f"layer x expert, q <= {alpha}); {on_average}."
    )


def _between_domains(result: IsolationTables) -> str:
    try:
        table = result.domain_effect()
    except DataError as error:
        return f"Whether experts serve some domains more than others cannot be said: {error.given}."
    found, n = int(table["significant"].sum()), result.data.sizes["item"]
    said = "Some experts serve some domains more than others" if found else "That an expert serves some domains more "
    said += "" if found else "than others is not shown"
    return (
        f"{said}: {found} of {len(table)} pairs of layer and expert at q <= {table.attrs['alpha']}; all at once "
        f"p = {table.attrs['global_p']:.2g}, {_count(n, 'item')}."
    )


_RANKS = {
    "aligned": "the router prefers the routes that predict the next token better",
    "misaligned": "the router prefers the routes that predict the next token worse",
    "uninformative": "the router's preference says next to nothing of how well a route predicts the next token",
    "undecided": "it is not shown that the router prefers the routes that predict the next token better, or worse",
}


def _alignment(name: str, row: Row) -> str:
    where = {"confident": "Where the model is confident", "fragile": "Where it is not (fragile tokens)"}[name]
    if not row["n_cells"]:
        return f"{where}, nothing can be said of the router: there is no such token."
    verdict = str(row["verdict"])
    said = _RANKS.get(verdict, f"nothing can be said of the router: {verdict}")
    value = interval(row["alignment"], row["alignment_low"], row["alignment_high"])
    return (
        f"{where}, {said}: alignment (rank correlation within a token) {value}, {_count(row['n_tokens'], 'token')} of "
        f"{_count(row['n_sequences'], 'sequence')}."
    )


def _fresh_draw(controls: Mapping[str, Row]) -> str:
    unknown = "Whether the router's own route is better than one drawn afresh by the sampler cannot be said"
    row = controls.get("fresh_draw")
    if row is None:
        return f"{unknown}: this run has no second draw of routes."
    if not row["n_cells"]:
        return f"{unknown}: there is no token to compare."
    said = {
        "smaller": "The router's own route is better than one drawn afresh by the sampler (a fresh draw)",
        "larger": "The router's own route is worse than one drawn afresh by the sampler (a fresh draw)",
        "no difference shown": "The router's own route is not shown to differ from one drawn afresh (a fresh draw)",
    }.get(str(row["verdict"]), f"{unknown}: {row['verdict']}")
    value = interval(row["excess_regret"], row["excess_regret_low"], row["excess_regret_high"], 3)
    return f"{said}: difference in regret {value} nats, {_count(row['n_sequences'], 'sequence')}."


def _best_of_many(row: Row) -> str:
    value = interval(row["regret"], row["regret_low"], row["regret_high"], 3)
    return (
        f"The best of {row['n_distinct']} other routes beats the router's own by {value} nats, "
        f"{_count(row['n_sequences'], 'sequence')}; a best of many is above zero by construction."
    )


def _merged(data: xr.Dataset) -> str:
    """How many items were given under another id as well."""
    n = sum(map(len, data.attrs.get("merged", {}).values()))
    return f"; of the same content as one of them, and not counted: {n} more" if n else ""


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"
