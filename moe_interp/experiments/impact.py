"""How much a layer's best expert is worth, whether some experts dominate, and whether depth has two regimes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.expert_choice import cross_fitted
from moe_interp.experiments.isolation_data import (
    FloatArray,
    chosen,
    delta_array,
    items_by_domain,
    per_domain,
    quality_array,
    sign,
)

# of the model's depth: in 32 layers the first six and the last two, where the Phi-mini-MoE study saw large deltas
EARLY, LATE = 0.19, 0.0625


def stratified_interval(
    parts: Sequence[FloatArray], level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean over domains of the domains' means over items, with a bootstrap interval: items resampled within a domain.

    Deviations of a resample are widened by sqrt(n / (n - 1)), which a resample of n items lacks; quantiles of the
    whole.

    Args:
        parts: One array ``[item, ...]`` per domain, the same trailing axes, at least 2 items each.

    Returns:
        Estimate, low and high over the trailing axes.

    Source: derived; Davison & Hinkley (1997), section 3.2, for strata.
    """
    estimate = np.mean([part.mean(0) for part in parts], axis=0)
    drawn = np.zeros((n_resamples, *estimate.shape))
    for index, part in enumerate(parts):
        n = len(part)
        counts = stats.derive_rng(seed, "stratified", index).multinomial(n, np.full(n, 1 / n), size=n_resamples)
        drawn += np.tensordot(counts / n, part - part.mean(0), axes=1) * np.sqrt(n / (n - 1)) / len(parts)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return estimate, estimate + low, estimate + high


def dominance_table(data: xr.Dataset, by_layer: bool = False, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Each expert's share of a domain's slots against even use, 1/E.

    The share is taken within an item over its positions 0..T-2, then over items equally, and over layers unless
    ``by_layer``. It needs natural routing only, so it takes no baseline and covers all experts of the router.

    Returns:
        domain, (layer,) expert, share, low, high (bootstrap over items; NaN with one item), uniform = 1/E, ratio =
        share / uniform, rank (1 = most used in its domain and layer).

    Source: the Phi-mini-MoE study; the interval is derived. Expert 3 of one layer has nothing to do with expert 3 of
    another: a mean over layers shows dominance of a number, not of an expert.
    """
    share = data["share_item"].sel(positions="all").transpose("item", "layer", "routed_expert").values
    layers, experts = data["layer"].values, data["routed_expert"].values
    frames = []
    for domain, rows in per_domain(share, items_by_domain(data)).items():
        part = rows if by_layer else rows.mean(1, keepdims=True)
        low, high = np.full((2, *part.shape[1:]), np.nan)
        if len(part) > 1:
            _, low, high = stratified_interval([part], level, seed=seed)
        mean = part.mean(0)
        columns = {"domain": np.full(mean.size, domain)}
        if by_layer:
            columns["layer"] = np.repeat(layers, len(experts))
        columns |= {
            "expert": np.tile(experts, len(mean)),
            "share": mean.ravel(),
            "low": np.maximum(low, 0).ravel(),
            "high": np.minimum(high, 1).ravel(),
            "uniform": np.full(mean.size, 1 / len(experts)),
            "ratio": mean.ravel() * len(experts),
            "rank": (1 + (mean[:, None, :] > mean[:, :, None]).sum(-1)).ravel(),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def layer_impact_table(
    data: xr.Dataset,
    baseline: str | None = "natural",
    mass: str | None = "one",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """What a layer's best expert is worth: the mean over domains of its delta, nats per answer token.

    ``impact`` is cross-fitted: the expert is chosen on one half of a domain's items and measured on the other. The
    published ``naive`` form does both on the same items and is optimistic: with noise alone it is positive. Under
    ablation the best expert is the one whose removal costs most, and impact is what it costs, as a negative delta.

    Returns:
        layer, regime (``"early"`` | ``"middle"`` | ``"late"``), impact, low, high (items reweighted within domains,
        through the choice; none below 4 items in a domain), naive, best_experts (the most often chosen per domain,
        and the share of the choices).
        ``.attrs["regimes"]``: the test of :func:`two_regimes`.

    Raises:
        DataError: A domain with a single item.

    Source: the Phi-mini-MoE study for ``naive``; the rest is derived. One layer is changed at a time: impacts of layers
    do not add up.
    """
    groups = items_by_domain(data)
    if short := [name for name, index in groups.items() if len(index) < 2]:
        raise DataError(f"one item in domain {short[0]!r}", "at least two", "Add items, or drop the domain.")
    baseline, mass = chosen(data, "baseline", baseline), chosen(data, "mass", mass)
    delta, quality = delta_array(data, mass, baseline), quality_array(data, mass)
    fits, naive, favourites = [], [], []
    labels = data["expert"].values.astype(str)
    for domain, index in groups.items():
        fit = cross_fitted(quality[index], delta[index], stats.derive_rng(seed, "layer_impact", domain))
        fits.append(fit)
        best = quality[index].mean(0).argmax(-1)
        naive.append(delta[index].mean(0)[np.arange(len(best)), best])
        top = fit.votes.argmax(-1)
        shares = fit.votes.max(-1) / fit.votes.sum(-1)
        favourites.append([f"{domain} {labels[e]} ({share:.0%})" for e, share in zip(top, shares)])
    impact = np.mean([fit.value for fit in fits], axis=0)
    error = np.sqrt((np.mean([fit.deviations for fit in fits], axis=0) ** 2).mean(0))
    n_min = min(map(len, groups.values()))
    half = scipy_stats.t.ppf((1 + level) / 2, n_min - 1) * error if n_min >= 4 else np.full(len(error), np.nan)
    layers = data["layer"].values
    table = pd.DataFrame(
        {
            "layer": layers,
            "regime": regimes(layers, data.attrs.get("n_layers")),
            "impact": impact,
            "low": impact - half,
            "high": impact + half,
            "naive": np.mean(naive, axis=0),
            "best_experts": [", ".join(words) for words in zip(*favourites)],
        }
    )
    test = two_regimes(table["impact"].to_numpy() * sign(data), table["regime"].to_numpy() != "middle")
    table.attrs = {"baseline": baseline, "mass": mass, "level": level, "regimes": test}
    return table


def regimes(layers: NDArray[np.int64], n_layers: int | None = None) -> list[str]:
    """``"early"``, ``"middle"`` or ``"late"`` by depth in a model of ``n_layers`` (at least up to the last isolated).

    The first 19% and the last 6.25% of the layers, at least one each: fixed before looking, as a test of two groups
    demands.
    """
    depth = max(int(n_layers or 0), int(max(layers)) + 1)
    early, late = max(1, round(EARLY * depth)), max(1, round(LATE * depth))
    return ["early" if layer < early else "late" if layer >= depth - late else "middle" for layer in layers]


def two_regimes(impact: FloatArray, outer: NDArray[np.bool_]) -> dict[str, float | bool | str]:
    """Is impact larger in early and last layers than in the middle? A permutation test over layers.

    Args:
        impact: ``[layer]``, nats, larger = matters more.
        outer: Early and last layers.

    Returns:
        difference of the means (nats), p (two-sided), smallest_p that these layers allow, and a verdict in words.

    Source: the claim is the Phi-mini-MoE study's, the test is derived. Layers are taken as exchangeable.
    """
    if outer.all() or not outer.any() or len(outer) < 3:
        return {"difference": float("nan"), "p": float("nan"), "smallest_p": 1.0, "verdict": "not testable"}
    test = stats.two_group_permutation(impact, outer)
    # the most extreme data: all layers of one group above all others
    smallest = float(stats.two_group_permutation(outer.astype(float), outer).p_value)
    p, difference = float(test.p_value), float(test.statistic)
    if smallest > 0.05:
        verdict = f"not testable: {len(outer)} layers allow no p below {smallest:.2g}"
    elif p <= 0.05:
        verdict = f"larger in {'early and last layers' if difference > 0 else 'the middle'}"
    else:
        verdict = "no difference shown"
    return {"difference": difference, "p": p, "smallest_p": smallest, "verdict": verdict}
