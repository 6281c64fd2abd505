"""How much a layer's best expert is worth, whether some experts dominate, and whether depth has two regimes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.best_experts import cross_fitted
from moe_interp.experiments.isolation.data import (
    FloatArray,
    chosen,
    delta_array,
    items_by_domain,
    per_domain,
    quality_array,
    routed_axis,
    sign,
)

# of the model's depth: in 32 layers the first six and the last two, where the Phi-mini-MoE study saw large deltas
EARLY, LATE = 0.19, 0.0625
EVEN_USE = ("above even use", "below even use")
REGIMES = ("larger in early and last layers", "larger in the middle")


def dominance_table(data: xr.Dataset, by_layer: bool = False, level: float = 0.95) -> pd.DataFrame:
    """Each expert's share of a domain's slots against even use, 1/E.

    The share is taken within an item over its positions 0..T-2, then over items equally, and over layers unless
    ``by_layer``. It needs natural routing only, so it takes no baseline and covers all experts of the router.

    Returns:
        domain, (layer,) expert, share, low, high (over items, :func:`moe_interp.stats.mean_interval`; NaN with one
        item), uniform = 1/E, ratio = share / uniform, rank (1 = most used in its domain and layer), verdict (by
        an interval at 1 - (1 - level) / E, Bonferroni over the experts of a domain and layer: with even use, .05 of
        these have any expert with a word).

    Source: the Phi-mini-MoE study; the interval is derived. Expert 3 of one layer has nothing to do with expert 3 of
    another: a mean over layers shows dominance of a number, not of an expert.
    """
    axis = routed_axis(data)
    share = data["share_item"].sel(positions="all").transpose("item", "layer", axis).values
    layers, experts = data["layer"].values, data[axis].values
    n_experts = data.attrs.get("n_experts", len(experts))  # of the model, also where a user has selected some
    frames = []
    for domain, rows in per_domain(share, items_by_domain(data)).items():
        part = rows if by_layer else rows.mean(1, keepdims=True)
        found = stats.mean_interval(part, axis=0, level=level, bounds=(0, 1))
        mean, even = found.estimate, 1 / n_experts
        wide = stats.mean_interval(part, axis=0, level=1 - (1 - level) * even, bounds=(0, 1))
        columns: dict[str, Any] = {"domain": np.full(mean.size, domain)}
        if by_layer:
            columns["layer"] = np.repeat(layers, len(experts))
        columns |= {
            "expert": np.tile(experts, len(mean)),
            "share": mean.ravel(),
            "low": found.low.ravel(),
            "high": found.high.ravel(),
            "uniform": np.full(mean.size, even),
            "ratio": mean.ravel() / even,
            "rank": (1 + (mean[:, None, :] > mean[:, :, None]).sum(-1)).ravel(),
            "verdict": [
                stats.verdict(low, high, n=len(part), words=EVEN_USE, null=even)
                for low, high in zip(wide.low.ravel().tolist(), wide.high.ravel().tolist())
            ],
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
    fits, naive, best = [], [], []
    labels = data["expert"].values
    for domain, index in groups.items():
        fit = cross_fitted(quality[index], delta[index], stats.derive_rng(seed, "layer_impact", domain))
        fits.append(fit)
        highest = quality[index].mean(0).argmax(-1)
        naive.append(delta[index].mean(0)[np.arange(len(highest)), highest])
        top = fit.votes.argmax(-1)
        shares = fit.votes.max(-1) / fit.votes.sum(-1)
        best.append([f"{domain} {labels[e]} ({share:.0%})" for e, share in zip(top, shares)])
    impact = np.mean([fit.value for fit in fits], axis=0)
    deviations = np.mean([fit.deviations for fit in fits], axis=0)  # [resample, layer]
    n_min = min(map(len, groups.values()))
    quantile = scipy_stats.t.ppf((1 + level) / 2, n_min - 1) if n_min >= 4 else np.nan
    half = quantile * np.sqrt((deviations**2).mean(0))
    layers = data["layer"].values
    table = pd.DataFrame(
        {
            "layer": layers,
            "regime": regimes(layers, data.attrs.get("n_layers")),
            "impact": impact,
            "low": impact - half,
            "high": impact + half,
            "naive": np.mean(naive, axis=0),
            "best_experts": [", ".join(words) for words in zip(*best)],
        }
    )
    outer = table["regime"].to_numpy() != "middle"
    apart = deviations[:, outer].mean(1) - deviations[:, ~outer].mean(1) if outer.any() and not outer.all() else np.nan
    width = float(quantile * np.sqrt(np.mean(np.square(apart))))
    test = two_regimes(table["impact"].to_numpy() * sign(data), outer, width, n_min)
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


def two_regimes(
    impact: FloatArray, outer: NDArray[np.bool_], half_width: float = 0.0, n_items: int | None = None
) -> dict[str, float | bool | str]:
    """Is impact larger in early and last layers than in the middle?

    Layers next to each other are alike, in this as in most else, and a test that takes them as exchangeable then calls
    chance a regime (with a random walk over 32 layers in 48% of the runs, with an autocorrelation of .5 in 19%). So the
    verdict asks for three things: that p, that the labels shifted along the layers (which keeps what neighbours
    share) give no larger difference, and that the difference is beyond what other items would change.

    Args:
        impact: ``[layer]``, nats, larger = matters more; layers in order of depth.
        outer: Early and last layers.
        half_width: Of the difference's interval over items.
        n_items: Items behind it, of the smallest domain; not asked about where None.

    Returns:
        difference of the means (nats) with low and high (over items); p (two-sided, layers exchangeable) and smallest_p
        that these layers allow; p_shifted (two-sided, labels shifted cyclically: at least 1 / layers, so that 20 layers
        are needed); and a verdict in words.

    Source: the claim is the Phi-mini-MoE study's, the tests are derived.
    """
    if outer.all() or not outer.any() or len(outer) < 3:
        return {"difference": float("nan"), "p": float("nan"), "smallest_p": 1.0, "verdict": "not testable"}
    test = stats.two_group_permutation(impact, outer)
    # the most extreme data: all layers of one group above all others
    extreme = outer.astype(float)
    smallest = float(stats.two_group_permutation(extreme, outer).p_value)
    shifted, least = (float(stats.shifted_group_test(x, outer).p_value) for x in (impact, extreme))
    p, difference = float(test.p_value), float(test.statistic)
    low, high = difference - half_width, difference + half_width
    if max(smallest, least) > 0.05:
        bound, why = (smallest, "") if smallest > 0.05 else (least, ", as layers next to each other may be alike")
        verdict = f"not testable: {len(outer)} layers allow no p below {bound:.2g}{why}"
    else:
        n = stats.FEWEST_UNITS if n_items is None else n_items
        verdict = stats.verdict(low, high, n=n, words=REGIMES, units="items in a domain", p=max(p, shifted))
    found = {"difference": difference, "low": low, "high": high, "p": p, "smallest_p": smallest, "p_shifted": shifted}
    return found | {"verdict": verdict}
