"""Which experts are used, how evenly, together with which others, and the same ones everywhere?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import sparse

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.trace import RoutingTrace


def load(trace: RoutingTrace) -> xr.Dataset:
    """How evenly a trace uses its experts; empty slots and tokens that the trace does not cover are skipped.

    Returns:
        ``share[layer, expert]`` q_e, share of the slots in use; ``entropy[layer]`` H(q) in nats;
        ``effective_experts[layer]`` exp(H(q)) / E, from 1/E to 1; ``max_violation[layer]`` (max q - mean q) / mean q,
        0 when even, E - 1 when collapsed; ``dead_experts[layer]``, the number never used; ``dropped_tokens[layer]``,
        the share of tokens without any expert; ``dropped_slots[layer]``, the share of empty slots. NaN for a layer
        without any slot in use.

    What it does not show: whether each batch is balanced; a trace can be even on the whole and uneven at every step.
    """
    counts = trace.counts()[0]
    share = ratio(counts, counts.sum(axis=1, keepdims=True))
    nats = entropy(share)
    empty = (trace.expert_indices < 0) & trace.covered[..., None]
    covered = trace.covered.sum(axis=0)
    return xr.Dataset(
        {
            "share": (("layer", "expert"), share),
            "entropy": ("layer", nats, {"units": "nats"}),
            "effective_experts": ("layer", np.exp(nats) / trace.n_experts),
            "max_violation": ("layer", share.max(axis=1) * trace.n_experts - 1),
            "dead_experts": ("layer", (counts == 0).sum(axis=1)),
            "dropped_tokens": ("layer", ratio(empty.all(axis=2).sum(axis=0), covered)),
            "dropped_slots": ("layer", ratio(empty.sum(axis=(0, 2)), covered * trace.n_slots)),
        },
        coords=axes(trace),
    )


def co_activation(trace: RoutingTrace) -> xr.Dataset:
    """How often two experts serve the same token: ``N(i, j) / N(i)`` over **all** pairs of slots.

    Returns:
        ``co_activation[layer, expert, other]``, share of the tokens of ``expert`` that ``other`` serves as well; 1 on
        the diagonal, NaN in the row of an unused expert. ``tokens[layer, expert]`` is N(i).

    Source: OLMoE, whose script counts only pairs of adjacent rank. What it does not show: more than chance. Two experts
    in constant use meet often; independent ones at about the share of tokens that ``other`` serves.
    """
    pairs = np.stack([((used := memberships(trace, layer)).T @ used).toarray() for layer in range(len(trace.layers))])
    tokens = np.diagonal(pairs, axis1=1, axis2=2)
    return xr.Dataset(
        {
            "co_activation": (("layer", "expert", "other"), ratio(pairs, tokens[:, :, None])),
            "tokens": (("layer", "expert"), tokens),
        },
        coords=axes(trace) | {"other": np.arange(trace.n_experts)},
    )


def transitions(trace: RoutingTrace) -> xr.Dataset:
    """From the experts of one layer to those of the next recorded one, over all pairs of slots of a token.

    Returns:
        ``probability[layer, expert, next_expert]`` = N(i at l, j at l+1) / sum_j N(i at l, j at l+1), whose rows sum to
        1; NaN where expert i is unused or its tokens have no expert at the next layer. ``layer`` is the first of two.

    Raises:
        DataError: Fewer than two layers.

    Source: derived. What it does not show: that one layer's choice causes the next; both follow from the token.
    """
    if len(trace.layers) < 2:
        raise DataError(f"A trace of {len(trace.layers)} layer", "at least two layers", "Record more layers.")
    used = [memberships(trace, layer) for layer in range(len(trace.layers))]
    pairs = np.stack([(first.T @ second).toarray() for first, second in pairwise(used)])
    coords = axes(trace) | {"layer": list(trace.layers[:-1]), "next_expert": np.arange(trace.n_experts)}
    probability = ratio(pairs, pairs.sum(axis=2, keepdims=True))
    return xr.Dataset({"probability": (("layer", "expert", "next_expert"), probability)}, coords=coords)


def saturation(trace: RoutingTrace, final: RoutingTrace) -> xr.Dataset:
    """Router saturation: how much of the final routing a checkpoint already has, mean of ``|S n S_final| / |S_final|``.

    Args:
        trace: Routes of a checkpoint.
        final: Routes of the last checkpoint on the same tokens.

    Returns:
        ``saturation[layer]`` from 0 to 1, over the tokens that both cover, with an expert in ``final``;
        ``chance[layer]``, its value for independent routes of the same widths, mean |S| / E.

    Raises:
        DataError: Traces of different tokens, layers or numbers of experts.

    Source: OLMoE. What it does not show: that weights or experts have settled; only the choice is compared.
    """
    sizes = [(t.n_tokens, t.layers, t.n_experts) for t in (trace, final)]
    ids = [t.token_ids for t in (trace, final) if t.token_ids is not None]
    if sizes[0] != sizes[1] or (len(ids) == 2 and not np.array_equal(ids[0], ids[1])):
        raise DataError(
            f"{trace!r} against {final!r}",
            "traces of the same tokens, layers and experts",
            "Record both checkpoints on the same sequences.",
        )
    found, chance = [], []
    for layer in range(len(trace.layers)):
        now, then = memberships(trace, layer), memberships(final, layer)
        wanted = then.sum(axis=1)
        kept = (wanted > 0) & trace.covered[:, layer]
        weight = ratio(kept, kept.sum())  # a mean over the tokens with an expert, NaN without any
        found.append((weight * now.multiply(then).sum(axis=1) / np.maximum(wanted, 1)).sum())
        chance.append((weight * now.sum(axis=1)).sum() / trace.n_experts)
    coords = {"layer": list(trace.layers)}
    return xr.Dataset({"saturation": ("layer", found), "chance": ("layer", chance)}, coords=coords)


def standing_committee(trace: RoutingTrace, top: int | None = None, presence: float = 0.8) -> xr.Dataset:
    """Experts that are among the most used ones in nearly every domain.

    Per layer and domain, experts are ranked by their share of the domain's slots, 1 = most used, ties sharing their
    mean rank. An expert is present in a domain whose ``top`` first ranks hold it.

    Args:
        trace: Routes with domain labels.
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
    width = trace.n_slots if top is None else top
    if not 1 <= width <= trace.n_experts or not 0 < presence <= 1:
        raise ConfigError(
            f"top={width}, presence={presence}",
            f"top from 1 to {trace.n_experts}, presence above 0 and at most 1",
            "Choose values in these ranges.",
        )
    counts = trace.counts(trace.domain_codes, len(trace.domains))
    used = counts.sum(axis=2, keepdims=True) > 0  # a domain without slots at a layer has no ranks there
    n_used = used.sum(axis=0)
    rank = np.where(used, mean_ranks(-counts), np.nan)
    present = ratio((rank <= width).sum(axis=0), n_used)
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


def memberships(trace: RoutingTrace, layer: int) -> sparse.csr_array:
    """``[token, expert]`` counts, 1 where the expert is in the token's route at the layer's place in the trace."""
    experts = trace.expert_indices[:, layer]
    token, slot = np.nonzero(experts >= 0)
    ones = np.ones(len(token), dtype=np.int64)
    return sparse.csr_array((ones, (token, experts[token, slot])), shape=(trace.n_tokens, trace.n_experts))


def mean_ranks(values: NDArray[Any]) -> FloatArray:
    """Ranks along the last axis from 1, ties sharing their mean rank."""
    less = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return less + (equal + 1) / 2


def axes(trace: RoutingTrace) -> dict[str, Any]:
    """Labels of the layer and expert axes."""
    return {"layer": list(trace.layers), "expert": np.arange(trace.n_experts)}


def ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> FloatArray:
    """Quotient, NaN where the denominator is 0."""
    return numerator / np.where(denominator == 0, np.nan, denominator)


def entropy(p: FloatArray) -> FloatArray:
    """Shannon entropy in nats along the last axis, 0 log 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
