"""What a run shows, in plain words and beside the published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.headlines import isolation_headlines
from moe_interp.experiments.isolation.calibration import ALL
from moe_interp.experiments.isolation.data import chosen, items_by_domain, masses, pooled_name, sign
from moe_interp.experiments.isolation.published import (
    DOMINANT_SHARE,
    LARGE,
    LAYER_IMPACT,
    SMALL,
    SOURCE,
    UNIFORM_SHARE,
    Published,
)
from moe_interp.results.tables import IsolationTables

NOTE = "A comparison, not a reproduction: another model, other items and domains."


def plan_isolation(
    n_items: Mapping[str, int], n_layers: int, n_experts: int, alpha: float = 0.05, method: str = "bh"
) -> str:
    """What the planned tests can show at best, to be read before a run.

    Args:
        n_items: Items per domain.
        n_layers, n_experts: Isolated layers, and experts (or sets) per layer.

    Returns:
        Sentences: the smallest attainable p, how many tests must reach it together, how many items would make one test
        enough, and the power for an effect of half a standard deviation.

    Raises:
        DataError: No items.

    Source: derived. Power is simulated with normal differences; real ones are not.
    """
    if not n_items or min(n_items.values()) < 1:
        raise DataError(f"items per domain {dict(n_items)}", "at least one item in each", "Add items.")
    lines = []
    testable = {d: n for d, n in n_items.items() if stats.smallest_attainable_p(n) <= alpha}
    if left_out := sorted(set(n_items) - set(testable)):
        fewest = next(n for n in range(1, 100) if stats.smallest_attainable_p(n) <= alpha)
        lines.append(f"Too few items for any test at {alpha}, at least {fewest} are needed: {', '.join(left_out)}.")
    if not testable:
        return lines[0]
    m, n = len(testable) * n_layers * n_experts, min(testable.values())
    lines.append(f"{m} tests: {len(testable)} domains x {n_layers} layers x {n_experts} experts.")
    lines.append(stats.plan_wilcoxon(n, m, alpha, method=method))
    needed = stats.items_needed(m, alpha, method=method)
    if needed > n:
        lines.append(f"{needed} items per domain would let a single test be rejected on its own.")
    power = stats.wilcoxon_power(0.5, n, alpha / 10)
    lines.append(
        f"If a tenth of the tests are rejected, an effect of half a standard deviation is found with probability "
        f"{power:.2f} in the smallest domain ({n} items)."
    )
    return " ".join(lines)


def findings_table(result: IsolationTables) -> pd.DataFrame:
    """The published findings on Phi-mini-MoE (10 and 50 items per domain) beside this run's. A comparison, not a
    reproduction: another model, other items and domains.

    Returns:
        finding; value, low, high (of this run, where it is one number); reliability (of quality, for a correlation);
        here, phi_mini_moe_10, phi_mini_moe_50 (text, empty where there is none). ``.attrs``: note and source.
    """
    rows = [_significant_row(result), *_rho_rows(result), _dominance_row(result), *_impact_rows(result)]
    columns = ["finding", "value", "low", "high", "reliability", "here", "phi_mini_moe_10", "phi_mini_moe_50"]
    table = pd.DataFrame(rows, columns=columns)
    texts = columns[:1] + columns[5:]
    table[texts] = table[texts].fillna("")
    table.attrs = {"note": NOTE, "source": SOURCE}
    return table


def _significant_row(result: IsolationTables) -> dict[str, Any]:
    counts = result.specialization(baseline=chosen(result.data, "baseline", None)).attrs
    m, found = counts["n_tests"], counts["helped"] + counts["hurt"]

    def published(run: Published) -> str:
        return f"{run.n_significant}/{run.n_tests} ({run.n_significant / run.n_tests:.0%})"

    return {
        "finding": "tests significant at q <= .05",
        "value": found / m if m else np.nan,
        "here": f"{found}/{m} ({found / m:.0%}): {counts['helped']} helped, {counts['hurt']} hurt" if m else "none",
        "phi_mini_moe_10": published(SMALL),
        "phi_mini_moe_50": published(LARGE),
    }


def _rho_rows(result: IsolationTables) -> list[dict[str, Any]]:
    try:
        table = result.calibration_by_domain()
    except DataError as error:
        return [{"finding": "calibration rho", "here": f"not testable: {error.given}"}]
    rows = []
    seen = set()
    for row in table.to_dict("records"):
        is_all = row["domain"] == pooled_name(result.domains, ALL)
        name = str(row["domain"]).lower()
        seen.add(name)
        rows.append(
            {
                "finding": f"calibration rho, {row['domain']}",
                "value": row["rho"],
                "low": row["low"],
                "high": row["high"],
                "reliability": row["reliability_quality"],
                "here": f"{_interval(row['rho'], row['low'], row['high'])}; {row['verdict']}",
                "phi_mini_moe_10": _number(SMALL.mean_rho if is_all else SMALL.rho.get(name)),
                "phi_mini_moe_50": _number(LARGE.mean_rho if is_all else LARGE.rho.get(name)),
            }
        )
    others = [name for name in SMALL.rho if name not in seen]
    if others:
        text = (", ".join(f"{name} {run.rho[name]:.3f}" for name in others) for run in (SMALL, LARGE))
        rows.append(
            dict(zip(("finding", "phi_mini_moe_10", "phi_mini_moe_50"), ("calibration rho, its domains", *text)))
        )
    return rows


def _dominance_row(result: IsolationTables) -> dict[str, Any]:
    table = result.dominance()
    top = table.iloc[int(table["ratio"].to_numpy().argmax())]
    published = ", ".join(f"{name} {share:.4f}" for name, share in DOMINANT_SHARE.items())
    return {
        "finding": "largest share of the slots, mean over layers",
        "value": top["share"],
        "low": top["low"],
        "high": top["high"],
        "here": f"expert {top['expert']} in {top['domain']}: {top['share']:.4f}, even use {top['uniform']:.4f}",
        "phi_mini_moe_10": f"expert 2: {published}, even use {UNIFORM_SHARE}",
    }


def _impact_rows(result: IsolationTables) -> list[dict[str, Any]]:
    try:
        table = result.layer_impact(baseline=chosen(result.data, "baseline", None))
    except DataError as error:
        return [{"finding": "impact of the layers' best experts", "here": f"not testable: {error.given}"}]
    order = (table["impact"] * sign(result.data)).sort_values(ascending=False, kind="stable").index
    published = ", ".join(f"L{layer} {value:.3f}" for layer, value in LAYER_IMPACT.items())

    def text(column: str) -> str:
        return ", ".join(f"L{row.layer} {getattr(row, column):.3f}" for row in table.loc[order[:7]].itertuples())

    top, regimes = table.loc[order[0]], table.attrs["regimes"]
    return [
        {
            "finding": "impact of the layers' best experts, same items (as published), nats per token",
            "value": top["naive"],
            "here": text("naive"),
            "phi_mini_moe_10": published,
        },
        {
            "finding": "impact of the layers' best experts, cross-fitted (chosen on one half of the items, measured on "
            "the other), nats per token",
            "value": top["impact"],
            "low": top["low"],
            "high": top["high"],
            "here": text("impact"),
        },
        {
            "finding": "early and last layers against the middle, nats per token",
            "value": regimes["difference"],
            "here": _regime_text(regimes),
            "phi_mini_moe_10": "early and last layers larger (not tested)",
        },
    ]


def _regime_text(test: Mapping[str, Any]) -> str:
    if np.isnan(test["difference"]):
        return f"{test['verdict']}, there are not layers of both kinds"
    return f"{test['difference']:.3f}, p = {test['p']:.2g}: {test['verdict']}"


def summary_text(result: IsolationTables, alpha: float = 0.05) -> str:
    """The run in plain words: what was done, what could be shown, what was."""
    data = result.data
    sizes = {domain: len(index) for domain, index in items_by_domain(data).items()}
    done, *found = isolation_headlines(result, alpha)
    lines = [
        done,
        *(f"* {sentence}" for sentence in found),
        "",
        "In detail (intervals are 95%, over items):",
        plan_isolation(sizes, data.sizes["layer"], data.sizes["expert"], alpha),
        _score_line(data),
        *_specialization_lines(result, alpha),
        *_calibration_lines(result),
        *_use_lines(result),
        _domain_line(result),
    ]
    return "\n".join(lines)


def _score_line(data: xr.Dataset) -> str:
    """How well the model answers at all: where it cannot, a better score is no better answer."""
    scores = {name: float(data["score"].values[index].mean()) for name, index in items_by_domain(data).items()}
    text = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
    return f"Log-probability of the right answer under natural routing, nats per token: {text}."


_MASSES = {
    "one": "mass one (the expert's weight is 1)",
    "natural": "mass natural (its weight is the sum that the token's own experts had)",
}


def _specialization_lines(result: IsolationTables, alpha: float) -> list[str]:
    baseline = chosen(result.data, "baseline", None)
    lines = []
    for mass in masses(result.data):
        counts = result.specialization(baseline=baseline, mass=mass, alpha=alpha).attrs
        unused = f"; {counts['unused']} experts never used" if counts["unused"] else ""
        if counts["out_of_reach"]:
            unused += f"; {counts['out_of_reach']} used only where they cannot reach the answer"
        lines.append(
            f"Against {baseline} routing, {_MASSES.get(mass, f'mass {mass}')}: of {counts['n_tests']} tests "
            f"at q <= {alpha}, {counts['helped']} helped and {counts['hurt']} hurt{unused}."
        )
    if len(masses(result.data)) > 1:
        agreement = result.mass_agreement(baseline=baseline, alpha=alpha).attrs
        same = ": here the two masses are one, as the natural weights sum to one" if agreement["same"] else ""
        lines.append(
            f"The masses agree in {agreement['agree']} of {agreement['n']} tests; "
            f"in {agreement['opposite']} they point in opposite directions{same}."
        )
    return lines


def _calibration_lines(result: IsolationTables) -> list[str]:
    try:
        table, items = result.calibration_by_domain(), result.item_calibration()
    except DataError as error:
        return [f"Calibration: not testable, {error.given}; expected {error.expected}."]
    lines = [
        "Calibration (does the router prefer the better experts?), mean rho over layers; corrected for "
        "reliability, the share of the differences between experts that new items would show again:"
    ]
    for row in table.to_dict("records"):
        interval = _interval(row["rho"], row["low"], row["high"])
        lines.append(f"  {row['domain']}: {interval}, p = {row['p']:.2g}. Corrected for reliability: {row['verdict']}.")
    answers = items[items["positions"] == "answer"]
    last = (answers if len(answers) else items).iloc[-1]
    text = f"Within an item ({last['positions']} positions): rho {_interval(last['rho'], last['low'], last['high'])}"
    if not np.isnan(last["specificity"]):
        text += (
            f"; with other items' quality {last['rho_other_items']:.2f}, so what routing knows about the very item is "
            f"{round(last['specificity'], 3) + 0.0:.3f} (p = {last['specificity_p']:.2g})"
        )
    return [*lines, f"{text}."]


def _use_lines(result: IsolationTables) -> list[str]:
    rows = [_dominance_row(result), *_impact_rows(result)[1:]]
    return [*(f"{str(row['finding']).capitalize()}: {row['here']}." for row in rows), *_other_mass_lines(result)]


def _other_mass_lines(result: IsolationTables) -> list[str]:
    """Impact under the masses that the lines above are not about; none where they are the same number."""
    data, baseline = result.data, chosen(result.data, "baseline", None)
    main = chosen(data, "mass", None)
    if len(masses(data)) < 2 or result.mass_agreement(baseline=baseline).attrs["same"]:
        return []
    try:
        tables = {mass: result.layer_impact(baseline=baseline, mass=mass) for mass in masses(data)}
    except DataError:
        return []  # said above
    top = {mass: table.iloc[int((table["impact"] * sign(data)).argmax())] for mass, table in tables.items()}
    return [
        f"Under mass {mass} the layer of the largest impact is L{row['layer']} with {row['impact']:.3f} "
        f"(mass {main}: L{top[main]['layer']} with {top[main]['impact']:.3f})."
        for mass, row in top.items()
        if mass != main
    ]


def _domain_line(result: IsolationTables) -> str:
    try:
        table = result.domain_effect()
    except DataError as error:
        return f"Specialization between domains: not testable, {error.given}; expected {error.expected}."
    if short := table.attrs["too_few"]:
        return (
            f"Specialization between domains: too few items to say in {', '.join(short)}; expected at least "
            f"{stats.FEWEST_UNITS} a domain, and {stats.ITEMS_IF_WIDER} where deltas spread more than in others."
        )
    found = int(table["significant"].sum())
    return (
        f"Specialization between domains: {found} of {len(table)} (layer, expert) pairs help some domains more than "
        f"others at q <= {table.attrs['alpha']}; all at once p = {table.attrs['global_p']:.2g}."
    )


def _interval(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "undefined"
    # adding zero turns -0.00 into 0.00
    text = f"{round(value, 2) + 0.0:.2f}"
    return f"{text} (no interval)" if np.isnan(low) else f"{text} [{low:.2f}, {high:.2f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
