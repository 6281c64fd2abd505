"""Two corpora or two models side by side: use of experts, and risk differences between sets of prompts."""

from __future__ import annotations

import numpy as np
import xarray as xr

from moe_interp.errors import DataError
from moe_interp.stats import risk_differences, spearman
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.counts import RoutingCounts, counted
from moe_interp.traces.expert_use import axes, ratio
from moe_interp.traces.measures.outputs import by_sequence
from moe_interp.traces.trace import RoutingTrace

Source = RoutingTrace | RoutingCounts


def usage_correlation(one: Source, other: Source) -> xr.Dataset:
    """Are the same experts the busy ones? Spearman's rank correlation of slots over experts.

    Args:
        one, other: Routes or counts of two models (or corpora) with the same layers and experts; tokens may differ.

    Returns:
        ``correlation[domain, layer]`` over the experts of a layer, of the domains that both have; one domain ``all``
        where either has no labels. NaN where a layer uses all experts alike.

    Raises:
        DataError: other layers, numbers of experts, or no domain in common.

    Source: derived. What it does not show: that a token goes to the same experts; and experts of models that do not
    descend from each other have no natural correspondence.
    """
    first, second = counted(one), counted(other)
    _check_alike(first, second)
    shared = [name for name in first.domains if name in second.domains]
    if first.domains and second.domains and not shared:
        raise DataError(f"domains {first.domains} and {second.domains}", "a domain in common", "Label them alike.")
    if shared:
        slots = [c.slots[[c.domains.index(name) for name in shared]] for c in (first, second)]
    else:
        slots = [c.slots.sum(axis=0, keepdims=True) for c in (first, second)]
    rho = np.full(slots[0].shape[:2], np.nan)
    varies = [s.min(axis=2) < s.max(axis=2) for s in slots]
    both = varies[0] & varies[1]
    if both.any():
        rho[both] = spearman(slots[0][both], slots[1][both]).rho
    coords = {"domain": shared or ["all"], "layer": list(first.layers)}
    return xr.Dataset({"correlation": (("domain", "layer"), rho)}, coords=coords)


def risk_difference(a: Source, b: Source, paired: bool = False, alpha: float = 0.05, seed: int = 0) -> xr.Dataset:
    """How much more often the tokens of one set of prompts select an expert than those of another (SteerMoE).

    The share of a sequence's tokens that select an expert is taken within the sequence, then averaged over sequences,
    which are the units; :func:`moe_interp.contrast_experts` does the same on a model.

    Args:
        a, b: Routes or counts of the two sets, with the same layers and experts; at least two sequences each.
        paired: The i-th sequences of both belong together.
        alpha: Level of the false discovery rate.
        seed: Of permutations and resamples.

    Returns:
        ``share_a, share_b, difference`` (a - b), ``low, high, p, q, stability`` and ``found`` (1 used more by a, -1 by
        b, else 0), each ``[layer, expert]``; see :func:`moe_interp.stats.risk_differences`.

    Raises:
        DataError: other layers or experts, fewer than two sequences, or sets of different length that are paired.

    Source: SteerMoE, where tokens are pooled; there a long prompt counts for many. What it does not show: that an
    expert has anything to do with what distinguishes the sets.
    """
    first, second = counted(a, "sequences"), counted(b, "sequences")
    _check_alike(first, second)
    found = risk_differences(sequence_shares(first), sequence_shares(second), paired=paired, alpha=alpha, seed=seed)
    names = ("share_a", "share_b", "difference", "low", "high", "p", "q", "stability", "found")
    data = {name: (("layer", "expert"), getattr(found, name)) for name in names}
    return xr.Dataset(
        data, coords=axes(first), attrs={"smallest_p": found.smallest_p, "n_a": found.n_a, "n_b": found.n_b}
    )


def sequence_shares(counts: RoutingCounts) -> FloatArray:
    """``[sequence, layer, expert]`` share of the sequence's covered tokens that the expert serves; 0 without any."""
    slots, covered = by_sequence(counts, counts.array("row_slots"), counts.array("row_covered"))
    return np.nan_to_num(ratio(slots, covered[:, :, None]))


def _check_alike(one: RoutingCounts, other: RoutingCounts) -> None:
    """Refuse two corpora that cannot be compared expert by expert."""
    if one.n_experts != other.n_experts:
        raise DataError(f"{one.n_experts} and {other.n_experts} experts", "as many in both", "Compare like models.")
    if one.layers != other.layers:
        odd = sorted({*one.layers} ^ {*other.layers}, key=str)
        what = f"layers {odd} of only one of the two" if odd else "the layers in different orders"
        raise DataError(what, "the same layers in both", "Record the same layers, or leave those out.")
