"""An atlas in words: the findings first, then what could not be tested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray as xr

ALPHA = 0.05


class Atlas(Protocol):
    """What the words need of a result."""

    data: xr.Dataset

    @property
    def not_testable(self) -> dict[str, str]: ...

    def busiest(self, top: int = ...) -> pd.DataFrame: ...

    def specialists(self, alpha: float = ...) -> pd.DataFrame: ...

    def pairs(self, top: int = ...) -> pd.DataFrame: ...


def findings(result: Atlas) -> list[str]:
    """What it is, the findings, and what is missing, a line each."""
    data, attrs = result.data, result.data.attrs
    sizes = data.sizes
    domains = f", {sizes['domain']} domains" if sizes.get("domain", 0) > 1 else ""
    sequences = f" in {_count(attrs['n_sequences'], 'sequence')}" if attrs.get("n_sequences") else ""
    tokens, layers = _count(attrs.get("n_tokens", 0), "token"), _count(sizes["layer"], "layer")
    lines = [
        f"Routing of {tokens}{sequences}{domains}: {layers} of {sizes['expert']} experts, "
        f"top-{attrs.get('n_slots', '?')}."
    ]
    for said in (_domains, _load, _vocabulary, _pairs, _layers, _committee, _norms, _margin, _comparison):
        lines += said(result)
    if missing := result.not_testable:
        lines.append("Not testable: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + ".")
    return lines


def _domains(result: Atlas) -> Iterator[str]:
    data = result.data
    if "domain_difference" in data:
        table = result.specialists(ALPHA)
        tested, found = int(table["p"].notna().sum()), table[table["found"]]
        n = data.attrs.get("n_permutations", 0)
        line = (
            f"Domains: {len(found)} of {tested} cells (domain x layer x expert) differ from the other domains "
            f"(q <= {ALPHA:g}, labels permuted over sequences {n} times)"
        )
        if len(found):
            top = found.iloc[0]
            more = "more" if top["difference"] > 0 else "less"
            line += (
                f"; the largest: layer {top['layer']} expert {top['expert']} serves {top['share']:.1%} of the tokens "
                f"of {top['domain']}, {abs(100 * top['difference']):.1f} points {more} than of the others"
            )
        yield line + "."
        if data.attrs.get("smallest_p", 0) > ALPHA:
            yield f"So few sequences reach p = {data.attrs['smallest_p']:.2g} at best: nothing found says nothing."
        p, info, null = (data[f"domain_information{end}"].values for end in ("_p", "", "_null"))
        above = int((p <= ALPHA).sum())
        best = int(np.nanargmax(info - null)) if np.isfinite(info).any() else 0
        yield (
            f"The domain is told by the experts in {above} of {len(p)} layers (p <= {ALPHA:g} each); most at layer "
            f"{data['layer'].values[best]}, {info[best]:.3f} nats against {null[best]:.3f} by chance."
        )
    if "domain_share" in data and data.sizes["domain"] > 1:
        table = result.busiest().dropna(subset=["share"])  # a domain without tokens at a layer has none
        top, even = table.iloc[int(table["share"].to_numpy().argmax())], data["domain_baseline"]
        yield (
            f"Busiest: layer {top['layer']} expert {top['expert']} serves {top['share']:.1%}"
            f"{_bounds(top.get('share_low'), top.get('share_high'), '.1%')} of the tokens of {top['domain']} "
            f"(even use: {float(even.sel(layer=top['layer'])):.1%})."
        )


def _load(result: Atlas) -> Iterator[str]:
    data = result.data
    even = data["effective_experts"].values
    if not np.isfinite(even).any():
        return
    low, high = int(np.nanargmin(even)), int(np.nanargmax(even))
    layers = data["layer"].values
    worst = int(np.nanargmax(data["max_violation"].values))
    dead = int(data["dead_experts"].sum())
    yield (
        f"Load: used as if there were {even[low]:.0%} (layer {layers[low]}) to {even[high]:.0%} (layer {layers[high]}) "
        f"of the experts; the busiest takes {1 + float(data['max_violation'][worst]):.1f} times its even share (layer "
        f"{layers[worst]}); {_count(dead, 'expert')} of {data['share'].size} never used."
    )


def _vocabulary(result: Atlas) -> Iterator[str]:
    data = result.data
    parts = []
    for ids in ("input", "next", "predicted"):
        if f"vocabulary_{ids}" in data:
            values, chance = data[f"vocabulary_{ids}"].values, data[f"vocabulary_{ids}_chance"].values
            if np.isfinite(values).any():
                best = data["layer"].values[int(np.nanargmax(values - chance))]
                mean, by_chance = float(np.nanmean(values)), float(np.nanmean(chance))
                parts.append(f"{ids} id {mean:.0%} (chance {by_chance:.0%}, farthest above at layer {best})")
    if parts:
        yield "Vocabulary: mean share of an id's tokens at its most frequent top-1 expert: " + "; ".join(parts) + "."


def _pairs(result: Atlas) -> Iterator[str]:
    if "co_activation" not in result.data:
        return
    table = result.pairs(1)
    if len(table):
        top = table.iloc[int(table["excess"].to_numpy().argmax())]
        yield (
            f"Co-activation: at layer {int(top['layer'])}, {top['share']:.0%} of the tokens of expert "
            f"{int(top['expert'])} also go to expert {int(top['other'])} (random routes of the same use: "
            f"{top['chance']:.0%})."
        )


def _layers(result: Atlas) -> Iterator[str]:
    data = result.data
    if "transition_information" in data:
        values = data["transition_information"].values
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            yield (
                f"From layer to layer: one layer's experts tell {np.nanmean(values):.2f} nats of the next one's on "
                f"average, {values[best]:.2f} after layer {data['layer'].values[best]} (0 if independent)."
            )
    if "path_covered" in data:
        covered, expected = data["path_covered"].values, data["path_covered_expected"].values
        if np.isfinite(covered).any():
            yield (
                f"Paths: the {data.sizes['rank']} most common of {data.sizes['step']} layers hold "
                f"{np.nanmean(covered):.0%} of the tokens on average over windows; as many would hold "
                f"{np.nanmean(expected):.0%} if layers were independent."
            )


def _committee(result: Atlas) -> Iterator[str]:
    data = result.data
    if "committee_member" not in data:
        return
    members, share = data["committee_member"].sum("expert").values, data["committee_share"].values
    members, share = members[np.isfinite(share)], share[np.isfinite(share)]
    if not len(share):
        return
    low, high = int(members.min()), int(members.max())
    experts = f"{low} to {high} experts" if low < high else f"{low} expert{'' if low == 1 else 's'}"
    if not high:
        yield (
            f"Standing committee: none; no expert of a layer is among the {data.attrs['committee_top']} most used in "
            f"{data.attrs['committee_presence']:.0%} of the domains."
        )
        return
    yield (
        f"Standing committee: {experts} a layer are among the "
        f"{data.attrs['committee_top']} most used in {data.attrs['committee_presence']:.0%} of the domains; they take "
        f"{share.mean():.0%} of the slots on average."
    )


def _norms(result: Atlas) -> Iterator[str]:
    data = result.data
    name = "saliency" if "saliency" in data else "norm"
    if name not in data or not np.isfinite(data[name].values).any():
        return
    layers = np.isfinite(data[name].values).any(axis=1)
    data = data.isel(layer=layers)
    values = data[name].values
    middle = np.nanmedian(values, axis=1)
    if not (middle > 0).any():
        return
    spread = np.nanmax(values, axis=1) / np.where(middle > 0, middle, np.nan)
    best = int(np.nanargmax(spread))
    what = "weight times output norm" if name == "saliency" else "output norm"
    yield (
        f"Outputs: the largest mean {what} of a layer is up to {spread[best]:.1f} times the median one (layer "
        f"{data['layer'].values[best]} expert {int(np.nanargmax(values[best]))})."
    )


def _margin(result: Atlas) -> Iterator[str]:
    data = result.data
    if "margin" in data and np.isfinite(data["margin"].values).any():
        values, negative = data["margin"].values, data["negative"].values
        low = int(np.nanargmin(values))
        line = (
            f"Margin: the last chosen expert's logit is {np.nanmean(values):.3f} above the next one's on average, "
            f"least at layer {data['layer'].values[low]} ({values[low]:.3f})"
        )
        if np.nanmax(negative) > 0:
            line += f"; below it for up to {np.nanmax(negative):.0%} of a layer's tokens, so other things rank"
        yield line + "."


def _comparison(result: Atlas) -> Iterator[str]:
    data = result.data
    if "saturation" in data and np.isfinite(data["saturation"].values).any():
        values, chance = data["saturation"].values, data["saturation_chance"].values
        low = int(np.nanargmin(values))
        yield (
            f"Against the other trace: {np.nanmean(values):.0%} of its routes are shared on average (independent: "
            f"{np.nanmean(chance):.0%}), least at layer {data['layer'].values[low]} ({values[low]:.0%})."
        )
    if "usage_correlation" in data and np.isfinite(data["usage_correlation"].values).any():
        values = data["usage_correlation"].values
        yield f"Use of experts correlates with the other's at {np.nanmean(values):.3f} (ranks, mean over layers)."
    if "risk_found" in data:
        found = data["risk_found"].values
        first, second = (str(name) for name in data["domain"].values)
        yield (
            f"Risk differences within sequences: {int((found > 0).sum())} experts are used more by {first}, "
            f"{int((found < 0).sum())} more by {second} (q <= {ALPHA:g})."
        )


def _bounds(low: Any, high: Any, digits: str) -> str:
    return "" if low is None or not np.isfinite(low) else f" [{low:{digits}}, {high:{digits}}]"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"
