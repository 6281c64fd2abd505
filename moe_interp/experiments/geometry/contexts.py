"""The same token in other contexts, and a prompt against what is generated after it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_interp import stats
from moe_interp.experiments.capture.experiment import capture_routing
from moe_interp.experiments.geometry.pairs import Pairs, overlaps
from moe_interp.experiments.geometry.states import BoolArray, distinct, membership, shared_tokens
from moe_interp.hooks.attach import MoEHooks
from moe_interp.stats.checks import FloatArray
from moe_interp.stats.geometry.pairs import pairs_of
from moe_interp.traces import RoutingTrace

FEWEST_PAIRS = 20


def same_token_pairs(trace: RoutingTrace, is_own: BoolArray, most: int, seed: int) -> Pairs | None:
    """Pairs of one token id in different sequences, after different tokens; each id has a part by its pairs.

    At most ``most``, drawn; at most 20 occurrences of one id, so that a full stop is not all there is. None where the
    trace has no ids, or fewer than 20 pairs.
    """
    if trace.token_ids is None:
        return None
    rng = stats.derive_rng(seed, "same token")
    order = rng.permutation(np.flatnonzero(is_own))
    order = order[np.argsort(trace.token_ids[order], kind="stable")]
    ids = trace.token_ids[order]
    rank = np.arange(len(order)) - np.searchsorted(ids, ids)
    order = order[rank < 20]
    ids = trace.token_ids[order]
    bounds = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1], True])
    found = [order[start:end] for start, end in pairwise(bounds.tolist()) if end - start > 1]
    sides = [np.stack([group[side] for side in pairs_of(len(group))]) for group in found]
    if not sides:
        return None
    first, second = np.concatenate(sides, axis=1)
    apart = trace.sequence[first] != trace.sequence[second]
    first, second = first[apart], second[apart]
    if len(first) < FEWEST_PAIRS:
        return None
    if len(first) > most:
        chosen = np.sort(rng.choice(len(first), most, replace=False))
        first, second = first[chosen], second[chosen]
    return Pairs(first, second, trace.sequence[first], trace.sequence[second])


def same_token(trace: RoutingTrace, is_own: BoolArray, most: int, seed: int) -> dict[str, Any] | None:
    """By layer, the overlap ``|S n S'| / k`` of one token in two contexts, of two different tokens, and the difference.

    Different tokens: the second token of each pair is exchanged for one of another pair of other id (and another
    sequence), so both sides have the same tokens. Intervals are over sequences. None where there are too few pairs.
    """
    pairs = same_token_pairs(trace, is_own, most, seed)
    if pairs is None:
        return None
    other = _exchanged(trace, pairs, seed)
    if other is None:
        return None
    n = len(trace.sequence_lengths)
    same, different = np.empty((2, len(trace.layers), len(pairs.first)))
    for layer in range(len(trace.layers)):
        sets = membership(trace.expert_indices[:, layer], trace.n_experts)
        same[layer], different[layer] = overlaps(sets, pairs), overlaps(sets, other)
    kept = trace.sequence[other.first] != trace.sequence[other.second]
    variables: dict[str, Any] = {}
    excess = same[:, kept] - different[:, kept]
    units = pairs.first_unit[kept], pairs.second_unit[kept]
    rows = {"same_token": same[:, kept], "different_token": different[:, kept], "same_token_excess": excess}
    for name, values in rows.items():
        found = stats.pair_interval([values], *units, _mean, n_units=n)
        for suffix, part in (("", found.estimate), ("_low", found.low), ("_high", found.high)):
            variables[f"{name}{suffix}"] = ("layer", part)
    if len(trace.layers) > 1:
        later = stats.pair_interval([excess[1:].mean(0)], *units, lambda x, m: x / m, n_units=n)
        variables["later_excess"] = ("bound", [float(later.estimate), float(later.low), float(later.high)])
    variables["n_same_token_pairs"] = ((), int(kept.sum()))
    return variables


def _exchanged(trace: RoutingTrace, pairs: Pairs, seed: int) -> Pairs | None:
    """The same pairs with the second tokens permuted, such that ids differ; None where too few are left."""
    assert trace.token_ids is not None
    rng = stats.derive_rng(seed, "different tokens")
    second = pairs.second.copy()
    for _ in range(50):
        wrong = trace.token_ids[second] == trace.token_ids[pairs.first]
        wrong |= trace.sequence[second] == trace.sequence[pairs.first]
        if not wrong.any():
            break
        places = np.flatnonzero(wrong)
        partners = rng.integers(len(second), size=len(places))
        for place, partner in zip(places.tolist(), partners.tolist()):
            second[place], second[partner] = second[partner], second[place]
    differ = (trace.token_ids[second] != trace.token_ids[pairs.first]) & (
        trace.sequence[second] != trace.sequence[pairs.first]
    )
    if differ.sum() < FEWEST_PAIRS:
        return None
    # what could not be exchanged is compared with nothing: marked by a pair within one sequence
    second = np.where(differ, second, pairs.first)
    return Pairs(pairs.first, second, pairs.first_unit, trace.sequence[second])


def _mean(total: FloatArray, n: FloatArray) -> FloatArray:
    return total / n[:, None]


def generated(moe: MoEHooks, sequences: Sequence[Any], n: int, layers: Any, **options: Any) -> RoutingTrace:
    """The trace of prompts and ``n`` tokens generated greedily after each, without repeated sequences."""
    # one label for all: sequences of which some alone have a domain are no mistake here
    found = capture_routing(moe, sequences, layers=layers, generate=n, predictions=False, domain="all", **options)
    assert isinstance(found, RoutingTrace)
    return distinct(found)[0]


def phase_overlap(trace: RoutingTrace, p: float) -> dict[str, Any] | None:
    """By layer, Jaccard@p of a sequence's prefill and its own generation, and of its prefill and another's generation.

    Tokens that another sequence has after the same tokens take no part. None where the trace has no phases, or fewer
    than two sequences have both.
    """
    phase = trace.phase
    if phase is None:
        return None
    n = len(trace.sequence_lengths)
    own = np.ones(trace.n_tokens, dtype=bool) if trace.token_ids is None else ~shared_tokens(trace)
    counts = np.stack([_counts(trace, (phase == name) & own, n) for name in ("prefill", "generation")])
    both = (counts.sum(3) > 0).all((0, 2))
    if both.sum() < 2:
        return None
    sets = stats.smallest_sets(counts[:, both], p)  # [phase, sequence, layer, expert]
    m = int(both.sum())
    first, second = pairs_of(m)
    same = stats.jaccard(sets[0], sets[1]).T
    crossed = (stats.jaccard(sets[0][first], sets[1][second]) + stats.jaccard(sets[0][second], sets[1][first])).T / 2
    variables: dict[str, Any] = {}
    rows = {"phase_same": (same, np.arange(m), np.arange(m)), "phase_other": (crossed, first, second)}
    for name, (values, one, two) in rows.items():
        found = stats.pair_interval([values], one, two, _mean, n_units=m, bounds=(0, 1))
        for suffix, part in (("", found.estimate), ("_low", found.low), ("_high", found.high)):
            variables[f"{name}{suffix}"] = ("layer", part)
    return variables | {"n_phase_sequences": ((), m)}


def _counts(trace: RoutingTrace, mask: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
    if not mask.any():
        return np.zeros((n, len(trace.layers), trace.n_experts), dtype=np.int64)
    groups = np.where(mask, trace.sequence, n)
    return trace.counts(groups, n + 1)[:n]
