"""Which experts are used, how evenly, together with which others, and the same ones everywhere?"""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError, DataError
from moe_interp.slots import NATIVE
from moe_interp.stats import pair_inclusion, ratio_interval
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.counts import RoutingCounts, counted
from moe_interp.traces.trace import RoutingTrace


def load(source: RoutingTrace | RoutingCounts) -> xr.Dataset:
    """How evenly a trace uses its experts; empty slots and tokens that the trace does not cover are skipped.

    Args:
        source: Routes, or the counts of a corpus.

    Returns:
        ``share[layer, expert]`` q_e, share of the slots in use; ``entropy[layer]`` H(q) in nats;
        ``effective_experts[layer]`` exp(H(q)) / E, from 1/E to 1; ``max_violation[layer]`` (max q - mean q) / mean q,
        0 when even, E - 1 when collapsed; ``dead_experts[layer]``, the number never used; ``dropped_tokens[layer]``,
        the share of tokens without any expert; ``dropped_slots[layer]``, the share of empty slots. NaN for a layer
        without any slot in use.

    What it does not show: whether each batch is balanced; a trace can be even on the whole and uneven at every step.
    """
    found = counted(source)
    counts = found.slots.sum(axis=0)
    share = ratio(counts, counts.sum(axis=1, keepdims=True))
    nats = entropy(share)
    by_width = found.array("tokens_by_width").sum(axis=0)
    tokens = by_width.sum(axis=1)
    return xr.Dataset(
        {
            "share": (("layer", "expert"), share),
            "entropy": ("layer", nats, {"units": "nats"}),
            "effective_experts": ("layer", np.exp(nats) / found.n_experts),
            "max_violation": ("layer", share.max(axis=1) * found.n_experts - 1),
            "dead_experts": ("layer", (counts == 0).sum(axis=1)),
            "dropped_tokens": ("layer", ratio(by_width[:, 0], tokens)),
            "dropped_slots": ("layer", 1 - ratio(counts.sum(axis=1), tokens * found.n_slots)),
        },
        coords=axes(found),
    )


def co_activation(source: RoutingTrace | RoutingCounts, pairs: Literal["all", "adjacent"] = "all") -> xr.Dataset:
    """How often two experts serve the same token: ``N(i, j) / N(i)`` over **all** pairs of slots.

    Args:
        source: Routes, or the counts of a corpus.
        pairs: ``"adjacent"`` counts only experts of neighbouring rank, in either order, as the script does that the
            published OLMoE figures come from: for comparison with those. Slots must be in order of rank.

    Returns:
        ``co_activation[layer, expert, other]``, share of the tokens of ``expert`` that ``other`` serves as well; 1 on
        the diagonal (0 for ``"adjacent"``), NaN in the row of an unused expert. ``chance[layer, expert, other]``: the
        same for random routes in which every expert is used as often as here, by tokens of as many experts: sets drawn
        without replacement, of maximum entropy (:func:`moe_interp.stats.pair_inclusion`) [derived]. For ``"adjacent"``
        times the share of pairs that are neighbours, as if ranks within a route said nothing. ``tokens[layer, expert]``
        is N(i).

    Raises:
        ConfigError: other ``pairs``.

    Source: OLMoE. What it does not show: more than chance, unless compared with ``chance``. Two experts in constant use
    meet often.
    """
    if pairs not in ("all", "adjacent"):
        raise ConfigError(f"pairs={pairs!r}", '"all" or "adjacent"', "Choose one of these.")
    found = counted(source, "co_activation")
    both = found.array("pairs")
    tokens = np.diagonal(both, axis1=1, axis2=2)
    if pairs == "adjacent":
        both = found.array("adjacent_pairs")
        both = both + both.transpose(0, 2, 1)
    share = ratio(both, tokens[:, :, None])
    by_chance = _pairs_by_chance(found)
    apart = ~np.eye(found.n_experts, dtype=bool)
    if pairs == "adjacent":
        neighbours, all_pairs = ((table * apart).sum(axis=(1, 2)) for table in (both, found.array("pairs")))
        by_chance = by_chance * np.nan_to_num(ratio(neighbours, all_pairs))[:, None, None]
    chance = np.where(apart, ratio(by_chance, tokens[:, :, None]), share)
    return xr.Dataset(
        {
            "co_activation": (("layer", "expert", "other"), share),
            "chance": (("layer", "expert", "other"), chance),
            "tokens": (("layer", "expert"), tokens),
        },
        coords=axes(found) | {"other": np.arange(found.n_experts)},
    )


def _pairs_by_chance(found: RoutingCounts) -> FloatArray:
    """``[layer, expert, other]`` tokens that both would serve, tokens of each number of experts by themselves."""
    served, tokens = found.array("served").sum(axis=0), found.array("tokens_by_width").sum(axis=0)
    expected = np.zeros((len(found.layers), found.n_experts, found.n_experts))
    for layer, width in np.argwhere(tokens[:, 2:] > 0) + np.array([0, 2]):
        n = tokens[layer, width]
        expected[layer] += n * pair_inclusion(served[layer, width] / n, int(width))
    return expected


def transitions(source: RoutingTrace | RoutingCounts) -> xr.Dataset:
    """From the experts of one layer to those of the next recorded one, over all pairs of slots of a token.

    Args:
        source: Routes, or the counts of a corpus.

    Returns:
        ``probability[layer, expert, next_expert]`` = N(i at l, j at l+1) / sum_j N(i at l, j at l+1), whose rows sum to
        1; NaN where expert i is unused or its tokens have no expert at the next layer. ``chance[layer, next_expert]``:
        every row, if the layers were independent. ``information[layer]`` = sum p(i, j) log(p(i, j) / p(i) p(j)) in
        nats over pairs of slots, 0 under independence; with few tokens it is above 0 by chance, by about
        (E - 1)^2 / (2 N) for N independent pairs. ``layer`` is the first of two.

    Raises:
        DataError: Fewer than two layers.

    Source: derived. What it does not show: that one layer's choice causes the next; both follow from the token.
    """
    found = counted(source, "transitions")
    if len(found.layers) < 2:
        raise DataError(f"A trace of {len(found.layers)} layer", "at least two layers", "Record more layers.")
    pairs = found.array("transitions")
    joint = ratio(pairs, pairs.sum(axis=(1, 2), keepdims=True))
    first, second = joint.sum(axis=2, keepdims=True), joint.sum(axis=1, keepdims=True)
    expected = first * second
    logs = np.log(np.where(joint > 0, joint, 1) / np.where(joint > 0, expected, 1))
    coords = axes(found) | {"layer": list(found.layers[:-1]), "next_expert": np.arange(found.n_experts)}
    return xr.Dataset(
        {
            "probability": (("layer", "expert", "next_expert"), ratio(pairs, pairs.sum(axis=2, keepdims=True))),
            "chance": (("layer", "next_expert"), second[:, 0]),
            "information": ("layer", (joint * logs).sum(axis=(1, 2)), {"units": "nats"}),
        },
        coords=coords,
    )


def saturation(trace: RoutingTrace, final: RoutingTrace, level: float = 0.95) -> xr.Dataset:
    """Router saturation: how much of the final routing a checkpoint already has, mean of ``|S n S_final| / |S_final|``.

    Args:
        trace: Routes of a checkpoint.
        final: Routes of the last checkpoint on the same tokens.
        level: Of the intervals.

    Returns:
        ``saturation[layer]`` from 0 to 1, over the tokens with an expert in ``final``, with ``saturation_low`` and
        ``saturation_high`` over sequences (NaN with a single one); ``chance[layer]``, its value for independent routes
        of the same widths, mean |S| / E. Tokens that either trace does not cover are skipped.

    Raises:
        DataError: Traces of different layers, numbers of experts or tokens (another tokenizer gives other tokens).

    Source: OLMoE; the interval is derived. What it does not show: that weights or experts have settled; only the choice
    is compared.
    """
    check_same_tokens(trace, final)
    sequence = max(trace.sequence, final.sequence, key=lambda s: s[-1])
    n_sequences = int(sequence[-1]) + 1
    sums = np.zeros((3, n_sequences, len(trace.layers)))
    for layer in range(len(trace.layers)):
        now, then = trace.expert_indices[:, layer], final.expert_indices[:, layer]
        wanted = (then >= 0).sum(axis=1)
        kept = (wanted > 0) & ~(now == NATIVE).any(axis=1)
        shared = np.zeros(len(wanted))
        for slot in then.T:
            shared += ((now == slot[:, None]) & (slot[:, None] >= 0)).any(axis=1)
        values = (shared / np.maximum(wanted, 1), (now >= 0).sum(axis=1) / trace.n_experts, np.ones(len(wanted)))
        for place, value in enumerate(values):
            sums[place, :, layer] = np.bincount(sequence, weights=value * kept, minlength=n_sequences)
    found = ratio_interval(sums[0], sums[2], level=level, bounds=(0.0, 1.0))
    total = sums.sum(axis=1)
    data = {"saturation": ratio(total[0], total[2]), "saturation_low": found.low, "saturation_high": found.high}
    data["chance"] = ratio(total[1], total[2])
    return xr.Dataset({name: ("layer", value) for name, value in data.items()}, coords={"layer": list(trace.layers)})


def check_same_tokens(one: RoutingTrace, other: RoutingTrace) -> None:
    """Refuse two traces that cannot be compared token by token.

    Raises:
        DataError: different layers, numbers of experts, lengths of sequences, or token ids.
    """
    remedy = "Record both models on the same sequences, with the same tokenizer and layers."
    expected = "traces of the same tokens, layers and experts"
    if one.layers != other.layers:
        odd = sorted({*one.layers} ^ {*other.layers}, key=str)
        what = f"layers {odd} of only one of them" if odd else "their layers in different orders"
        raise DataError(f"{one!r} against {other!r}, with {what}", expected, remedy)
    lengths = [trace.sequence_lengths for trace in (one, other)]
    # arrays given without lengths are one sequence
    same = np.array_equal(lengths[0], lengths[1]) or (min(map(len, lengths)) == 1 and one.n_tokens == other.n_tokens)
    if one.n_experts != other.n_experts or not same:
        raise DataError(
            f"{one!r} against {other!r}, with other sequences or experts (another tokenizer gives other tokens)",
            expected,
            remedy,
        )
    if one.token_ids is not None and other.token_ids is not None:
        differs = np.flatnonzero(one.token_ids != other.token_ids)
        if len(differs):
            raise DataError(
                f"{one!r} against {other!r}, whose token ids differ at {len(differs)} tokens, first at token "
                f"{differs[0]}: other texts, or another tokenizer",
                expected,
                remedy,
            )


def standing_committee(
    source: RoutingTrace | RoutingCounts, top: int | None = None, presence: float = 0.8
) -> xr.Dataset:
    """Experts that are among the most used ones in nearly every domain.

    Per layer and domain, experts are ranked by their share of the domain's slots, 1 = most used, ties sharing their
    mean rank. An expert is present in a domain that uses it and whose ``top`` first ranks hold it.

    Args:
        source: Routes with domain labels, or the counts of a corpus.
        top: Ranks that count as present; the number of slots without it.
        presence: Share of domains in which a member is present at least.

    Returns:
        ``rank[domain, layer, expert]``; ``mean_rank, rank_variance`` (over domains) and ``presence[layer, expert]``;
        ``member[layer, expert]``; ``committee_share[layer]``, the members' share of all slots. Domains without any slot
        at a layer are left out there, with NaN ranks.

    Raises:
        DataError: No labels.
        ConfigError: ``top`` or ``presence`` out of range.

    Source: derived, after the standing committee of mixture models. What it does not show: that members do the work;
    often used is not needed.
    """
    trace = counted(source)
    trace.check_domains()
    width = trace.n_slots if top is None else check_whole(top, "top")
    if not isinstance(presence, Real) or not 1 <= width <= trace.n_experts or not 0 < presence <= 1:
        raise ConfigError(
            f"top={width}, presence={presence!r}",
            f"top from 1 to {trace.n_experts}, presence above 0 and at most 1",
            "Choose values in these ranges.",
        )
    counts = trace.slots
    used = counts.sum(axis=2, keepdims=True) > 0  # a domain without slots at a layer has no ranks there
    n_used = used.sum(axis=0)
    rank = np.where(used, mean_ranks(-counts), np.nan)
    present = ratio(((rank <= width) & (counts > 0)).sum(axis=0), n_used)
    mean = ratio(np.where(used, rank, 0).sum(axis=0), n_used)
    member = present >= presence
    slots = counts.sum(axis=0)
    share = ratio((slots * member).sum(axis=1), slots.sum(axis=1))
    by_expert = ("layer", "expert")
    return xr.Dataset(
        {
            "rank": (("domain", *by_expert), rank),
            "mean_rank": (by_expert, mean),
            "rank_variance": (by_expert, ratio(np.where(used, (rank - mean) ** 2, 0).sum(axis=0), n_used)),
            "presence": (by_expert, present),
            "member": (by_expert, member),
            "committee_share": ("layer", share),
        },
        coords={"domain": list(trace.domains)} | axes(trace),
        attrs={"top": width, "presence": presence},
    )


def mean_ranks(values: NDArray[Any]) -> FloatArray:
    """Ranks along the last axis from 1, ties sharing their mean rank."""
    less = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return less + (equal + 1) / 2


def axes(trace: RoutingTrace | RoutingCounts) -> dict[str, Any]:
    """Labels of the layer and expert axes."""
    return {"layer": list(trace.layers), "expert": np.arange(trace.n_experts)}


def ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> FloatArray:
    """Quotient, NaN where the denominator is 0."""
    return numerator / np.where(denominator == 0, np.nan, denominator)


def entropy(p: FloatArray) -> FloatArray:
    """Shannon entropy in nats along the last axis, 0 log 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
