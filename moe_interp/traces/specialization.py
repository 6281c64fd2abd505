"""What do experts go by: the domain, the task?"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import xarray as xr

from moe_interp.errors import ConfigError
from moe_interp.stats import ratio_interval
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.counts import RoutingCounts, counted
from moe_interp.traces.expert_use import axes, ratio
from moe_interp.traces.trace import RoutingTrace


def domain_specialization(source: RoutingTrace | RoutingCounts, level: float = 0.95) -> xr.Dataset:
    """Share of a domain's tokens that an expert serves, against even use.

    Args:
        source: Routes with domain labels, or the counts of a corpus.
        level: Of the intervals.

    Returns:
        ``share[domain, layer, expert]`` = share of the domain's tokens with the expert in their route (rows sum to k);
        ``share_low``, ``share_high``, its interval over sequences, where there are counts of each sequence (NaN in a
        domain of one sequence); ``baseline[layer]`` = k / E, k the mean number of experts per token;
        ``tokens[domain]``, covered at any layer. Tokens without any expert count among the domain's tokens; those not
        covered at a layer do not. NaN for a domain or layer without any token.

    Raises:
        DataError: No labels.

    Source: OLMoE; intervals of :func:`moe_interp.stats.ratio_interval`. What it does not show: specialization by
    itself. An expert in constant use is above the baseline in every domain; compare domains with each other, or see
    :func:`moe_interp.traces.domain_differences`.
    """
    found = counted(source, "sequences")
    found.check_domains()
    counts, tokens = found.slots, found.tokens
    by_expert = ("domain", "layer", "expert")
    data: dict[str, Any] = {
        "share": (by_expert, ratio(counts, tokens[:, :, None])),
        "baseline": ("layer", ratio(counts.sum(axis=(0, 2)), tokens.sum(axis=0)) / found.n_experts),
        "tokens": ("domain", found.array("domain_tokens")),
    }
    if found.has("row_slots"):
        low, high = _share_intervals(found, level)
        data |= {"share_low": (by_expert, low), "share_high": (by_expert, high)}
    return xr.Dataset(data, coords={"domain": list(found.domains)} | axes(found))


def _share_intervals(found: RoutingCounts, level: float) -> tuple[FloatArray, FloatArray]:
    """``[domain, layer, expert]`` bounds over sequences."""
    slots, covered, code = (found.array(name) for name in ("row_slots", "row_covered", "row_domain"))
    bounds = np.full((2, *found.slots.shape), np.nan)
    for domain in range(len(found.domains)):
        rows = np.flatnonzero(code == domain)
        for layer in range(len(found.layers)):  # by layer: floats of all sequences at once are large
            if len(rows):
                sizes = np.broadcast_to(covered[rows, layer, None], (len(rows), found.n_experts))
                interval = ratio_interval(slots[rows, layer], sizes, level=level, bounds=(0.0, 1.0))
                bounds[:, domain, layer] = interval.low, interval.high
    return bounds[0], bounds[1]


def esft_scores(source: RoutingTrace | RoutingCounts) -> xr.Dataset:
    """Relevance of each expert to the task that a trace was recorded on.

    Returns:
        ``token_score[layer, expert]`` = mean over tokens of 1[e in the route] / k, k the token's number of experts;
        ``gate_score[layer, expert]`` = mean over tokens of the expert's weight, 0 where not chosen; only with weights.
        Tokens without any expert at a layer are skipped there; NaN where all are.

    Source: ESFT (expert-specialized fine-tuning). Scores are normalised over experts, which reproduces its released
    files; its public script normalises over layers, which does not. What it does not show: what tuning the experts
    would gain.
    """
    found = counted(source, "weights")
    served = found.array("served").sum(axis=0)
    by_width = found.array("tokens_by_width").sum(axis=0)
    tokens = by_width[:, 1:].sum(axis=1)
    widths = np.arange(1, served.shape[1])
    shares = (served[:, 1:] / widths[:, None]).sum(axis=1)
    scores = {"token_score": (("layer", "expert"), ratio(shares, tokens[:, None]))}
    if found.has("weight"):
        weights = found.sums("weight").sum(axis=0)
        scores["gate_score"] = (("layer", "expert"), ratio(weights, tokens[:, None]))
    return xr.Dataset(scores, coords=axes(found))


def esft_experts(scores: xr.DataArray, p: float = 0.2) -> dict[int, list[int]]:
    """Per layer, the experts to tune: taken from the highest score down until their sum reaches ``p``.

    Args:
        scores: ``[layer, expert]``, one of the variables of :func:`esft_scores`.
        p: Sum to reach; all experts where it is out of reach. Equal scores are taken in the order of their index. None
            at a layer without scores (NaN).

    Raises:
        ConfigError: ``p`` not above 0.

    Source: ESFT.
    """
    if not isinstance(p, Real) or not p > 0:
        raise ConfigError(f"p={p!r}", "a sum of scores above 0", "Take about 0.1 to 0.3 of the scores' sum.")
    chosen = {}
    for layer, row in zip(scores["layer"].values.tolist(), scores.values):
        if np.isnan(row).all():
            chosen[layer] = []
            continue
        order = np.argsort(-row, kind="stable")
        needed = int(np.searchsorted(np.cumsum(row[order]), p - 1e-12)) + 1
        chosen[layer] = scores["expert"].values[order[:needed]].tolist()
    return chosen
