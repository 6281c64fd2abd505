"""Calibration item by item: does the router prefer the experts that are good for this very item?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.experiments.isolation.calibration import ALL, Pair
from moe_interp.experiments.isolation.data import (
    FloatArray,
    items_by_domain,
    pooled_name,
    quality_array,
    routing_array,
)
from moe_interp.stats import derive_rng, stratified_interval


def item_calibration_table(
    data: xr.Dataset,
    mass: str | None = "one",
    score: str = "mean",
    level: float = 0.95,
    n_permutations: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Spearman's rho over experts within an item, between its own routing and its own quality; averaged.

    Quality is of the answer's tokens (or the first alone), so routing at the positions that predict the answer comes
    closest to calibration per token; routing over all positions is given beside it.

    Args:
        score: ``"mean"`` over the answer's tokens, or its ``"first"`` token.

    Returns:
        domain (and one row for all of at least 2 items), positions (``"all"``, ``"answer"``), n_items; rho, the mean
        over layers and items, with low and high (over items within domains,
        :func:`moe_interp.stats.stratified_interval`); p (expert labels permuted within a layer, the same way for all
        items); rho_other_items, the same with the quality of **other** items of the domain; specificity = rho -
        rho_other_items, what routing knows about the item beyond the domain, with specificity_p (items of a domain
        permuted against each other). A layer where an item's experts are all equal is left out for that item.

    Raises:
        DataError: Fewer than 3 experts.

    Source: derived. A single item's quality is one noisy number per expert: rho is attenuated, a small one is no proof
    of a poor router. Positions share the item's quality: it is not measured per token.
    """
    if data.sizes["expert"] < 3:
        raise DataError(f"{data.sizes['expert']} experts", "at least 3 to rank", "Run isolate_experts on more experts.")
    quality, groups = quality_array(data, mass, score), items_by_domain(data)
    rows = []
    for positions in [name for name in ("all", "answer") if name in data["positions"].values]:
        routing = routing_array(data, positions)
        pairs = {d: (unit_ranks(routing[index]), unit_ranks(quality[index])) for d, index in groups.items()}
        for domain, pair in pairs.items():
            rows.append({"domain": domain, "positions": positions} | _row([pair], level, n_permutations, seed))
        if len(pairs) > 1:
            pooled = [pair for pair in pairs.values() if len(pair[0]) > 1] or list(pairs.values())
            rows.append(
                {"domain": pooled_name(pairs, ALL), "positions": positions} | _row(pooled, level, n_permutations, seed)
            )
    return pd.DataFrame(rows).sort_values("positions", kind="stable", ignore_index=True)


def unit_ranks(rows: FloatArray) -> FloatArray:
    """Centred average ranks along the last axis with length one; zeros where all are equal or one is missing."""
    ranks = scipy_stats.rankdata(rows, axis=-1) - (rows.shape[-1] + 1) / 2
    norm = np.sqrt((ranks**2).sum(-1, keepdims=True))
    known = ~np.isnan(rows).any(-1, keepdims=True)
    return np.where(known & (norm > 0), ranks / np.where(norm > 0, norm, 1), 0)


def _row(pairs: Sequence[Pair], level: float, n_permutations: int, seed: int) -> dict[str, object]:
    """The numbers of one row from unit ranks of routing and quality per domain, ``[item, layer, expert]``."""
    scaled = [_scaled(*pair) for pair in pairs]
    own = [(x * y).sum((1, 2)) for x, y in scaled]
    rho = float(np.mean([values.mean() for values in own]))
    found = stratified_interval(own, level=level, bounds=(-1, 1))
    crossed = [x.reshape(len(x), -1) @ y.reshape(len(y), -1).T for x, y in scaled]  # [item, other item]
    row: dict[str, object] = {
        "n_items": sum(map(len, own)),
        "rho": rho,
        "low": float(found.low),
        "high": float(found.high),
        "p": expert_permutation_p(scaled, n_permutations, seed),
    }
    return row | _specificity(crossed, rho, n_permutations, seed)


def _scaled(x: FloatArray, y: FloatArray) -> Pair:
    """Routing scaled so that the sum over layers and experts of x y is an item's mean over its usable layers."""
    usable = (x.any(-1) & y.any(-1)).sum(1)
    return x / np.maximum(usable, 1)[:, None, None], y


def expert_permutation_p(scaled: Sequence[Pair], n_permutations: int, seed: int) -> float:
    """Two-sided p of the mean rho, with the routing's expert labels permuted within layers, one way for all items.

    The mean over items of sum_e x[i, perm(e)] y[i, e] needs the items' sums of x[i, e] y[i, e'] only.
    """
    product = np.mean([np.einsum("ile,ilf->lef", x, y) / len(x) for x, y in scaled], axis=0)
    n_layers, n_experts = product.shape[:2]
    rng = derive_rng(seed, "expert_permutation")
    order = rng.permuted(np.tile(np.arange(n_experts), (n_permutations, n_layers, 1)), axis=-1)
    null = product[np.arange(n_layers)[:, None], order, np.arange(n_experts)].sum((1, 2))
    observed = abs(float(np.einsum("lee->", product)))
    return float((1 + (np.abs(null) >= observed * (1 - 1e-9)).sum()) / (1 + n_permutations))


def _specificity(crossed: Sequence[FloatArray], rho: float, n_permutations: int, seed: int) -> dict[str, float]:
    """Own items against other items of the domain; NaN where a domain has a single one."""
    if min(map(len, crossed)) < 2:
        return dict.fromkeys(("rho_other_items", "specificity", "specificity_p"), float("nan"))
    other = float(np.mean([(g.sum() - np.trace(g)) / (len(g) * (len(g) - 1)) for g in crossed]))
    centre = float(np.mean([g.mean() for g in crossed]))  # the mean over all permutations
    rng = derive_rng(seed, "item_permutation")
    null = np.zeros(n_permutations)
    for g in crossed:
        order = rng.permuted(np.tile(np.arange(len(g)), (n_permutations, 1)), axis=1)
        null += g[np.arange(len(g)), order].mean(1) / len(crossed)
    extreme = np.abs(null - centre) >= abs(rho - centre) * (1 - 1e-9)
    p = float((1 + extreme.sum()) / (1 + n_permutations))
    return {"rho_other_items": other, "specificity": rho - other, "specificity_p": p}
