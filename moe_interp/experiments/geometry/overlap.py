"""How far the experts of two runs, two prompts or two models overlap, layer by layer, and how far by chance."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp import stats
from moe_interp.checks import check_seed, check_whole
from moe_interp.errors import DataError
from moe_interp.experiments.geometry.matching import (
    MOST_SEQUENCES,
    Matching,
    check_matching,
    halves_of,
    matched,
    orders_of_halves,
)
from moe_interp.experiments.geometry.pairs import check_sequences, sequence_pairs
from moe_interp.experiments.geometry.states import check_trace, covered_counts, membership
from moe_interp.stats.checks import FloatArray, check_choice
from moe_interp.stats.geometry.pairs import pairs_of
from moe_interp.traces import RoutingTrace

Counts = NDArray[np.integer]


def depth_overlap(
    trace: RoutingTrace, p: float = 0.8, unrelated: bool = True, n_draws: int = 20, seed: int = 0
) -> xr.Dataset:
    """Do unrelated inputs use the same experts, layer by layer: Jaccard@p over pairs of sequences.

    A sequence's set at a layer is the smallest one with a share ``p`` of its slots; ``overlap`` is the mean of
    ``|A n B| / |A u B|`` over pairs.

    Args:
        trace: At least two sequences. Empty slots and tokens that are not covered are skipped.
        p: Share of a sequence's slots that its set holds, above 0 and at most 1.
        unrelated: Where the trace has domains, compare pairs of different domains only.
        n_draws: Draws of the usage-matched null.
        seed: Of the draws, and of the sequences where there are more than 256.

    Returns:
        By layer: ``overlap`` with its interval over sequences (``overlap_low, overlap_high``); two chance levels:
        ``size_matched``, of uniform random sets of the same sizes (exact), and ``usage_matched``, of sequences whose
        slots are drawn from the layer's overall use; ``set_size``, the mean number of experts in a set. And
        as estimate, low and high: ``deep``, the mean overlap of the last third of layers, ``deep_beyond_chance``, less
        ``size_matched``, and ``deepening``, less the first third. ``attrs`` say which pairs.

    Raises:
        DataError: fewer than two sequences, one domain only where different ones are compared, or a sequence that the
            trace does not cover at some layer.

    Source: "The Myth of Expert Specialization in MoEs" for Jaccard@p by depth; the chance levels are derived. What it
    does not show: that layers treat inputs alike. With few experts, or sets of nearly all, any two sets overlap;
    compare with ``size_matched``. Where the overlap equals ``usage_matched``, unequal load alone explains it.
    """
    variables, attrs = depth_variables(covered_counts(trace), _domains(trace), p, unrelated, n_draws, seed)
    coords = {"layer": list(trace.layers), "bound": ["estimate", "low", "high"]}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def _domains(trace: RoutingTrace) -> NDArray[np.str_] | None:
    if trace.domain is None:
        return None
    return trace.domain[np.searchsorted(trace.sequence, np.arange(len(trace.sequence_lengths)))]


def depth_variables(
    counts: Counts, domain: NDArray[np.str_] | None, p: float, unrelated: bool, n_draws: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables of :func:`depth_overlap` from ``counts[sequence, layer, expert]``, and what they are of."""
    n, n_layers, n_experts = counts.shape
    check_whole(n_draws, "n_draws", 1)
    check_seed(seed)
    check_sequences(n, 2, "an overlap of inputs")
    pairs = sequence_pairs(n, MOST_SEQUENCES, seed)
    first, second, what = pairs.first, pairs.second, "all pairs of sequences"
    if unrelated and domain is not None:
        apart = domain[first] != domain[second]
        if not apart.any():
            raise DataError(
                f"sequences of the domain {domain[0]} alone",
                "at least two domains",
                "Pass unrelated=False for all pairs.",
            )
        first, second, what = first[apart], second[apart], "pairs of sequences of different domains"
    sets = stats.smallest_sets(counts, p)
    size = sets.sum(2)
    overlap = stats.jaccard(sets[first], sets[second]).T  # [layer, pair]
    by_size = stats.expected_jaccard(size[first], size[second], n_experts).T
    found = stats.pair_interval([overlap], first, second, _mean, n_units=n, bounds=(0, 1))
    rng = stats.derive_rng(seed, "usage-matched sets")
    by_use = np.zeros(n_layers)
    total = counts.sum(0)
    for layer in range(n_layers):
        use, slots = total[layer] / total[layer].sum(), counts[:, layer].sum(1)
        for _ in range(n_draws):
            drawn = stats.smallest_sets(rng.multinomial(slots, use), p)
            by_use[layer] += float(stats.jaccard(drawn[first], drawn[second]).mean()) / n_draws
    variables: dict[str, Any] = {
        "overlap": ("layer", found.estimate),
        "overlap_low": ("layer", found.low),
        "overlap_high": ("layer", found.high),
        "size_matched": ("layer", by_size.mean(1)),
        "usage_matched": ("layer", by_use),
        "set_size": ("layer", size.mean(0)),
    }
    third = max(1, n_layers // 3)
    deep, early = overlap[-third:].mean(0), overlap[:third].mean(0)
    beyond = deep - by_size[-third:].mean(0)
    for name, values in (("deep", deep), ("deep_beyond_chance", beyond), ("deepening", deep - early)):
        one = stats.pair_interval([values], first, second, lambda x, m: x / m, n_units=n)
        variables[name] = ("bound", [float(one.estimate), float(one.low), float(one.high)])
    return variables, {"pairs": what, "p": p, "n_sequences": n, "deep_layers": third}


def _mean(total: FloatArray, n: FloatArray) -> FloatArray:
    return total / n[:, None]


def answer_overlap(
    a: RoutingTrace,
    b: RoutingTrace,
    matching: Matching,
    level: Literal["sequence", "token"] = "sequence",
    p: float = 0.8,
    seed: int = 0,
) -> xr.Dataset:
    """Overlap of the experts of two runs or two models on the same sequences, against one run on two sequences.

    Sequence level: Jaccard@p of the sets of a sequence under ``a`` and ``b``. Token level: ``|S_a n S_b| /
    sqrt(|S_a| |S_b|)`` of the same token, averaged over tokens that both traces cover.

    Args:
        a, b: Traces of the same sequences in the same order, and of the same layers. At the token level, of the same
            tokens (one tokenizer); else each model may have its own.
        matching: Which expert of ``b`` is compared with which of ``a``, layer by layer. "identity": the same number,
            for runs of one model. "rank": by rank of total use. "usage": by the Hungarian algorithm on the use that
            they share, found on one half of the sequences and applied to the other, and the other way round, so that
            the overlap is not that of the fit.
        level: "sequence" or "token".
        p: Share of a sequence's slots that its set holds, above 0 and at most 1.
        seed: Of the halves.

    Returns:
        By layer, with intervals over sequences (``_low``, ``_high``): ``same``, of one sequence under both; ``other``,
        of two sequences under ``a`` (one model, two questions); ``crossed``, of two sequences, one under each (two
        models, two questions); ``chance``, of uniform random sets of these sizes. And the means over layers, ``mean_``.

    Raises:
        DataError: layers that one trace lacks, other numbers of sequences, fewer than two of them, at the token level
            other tokens.
        ConfigError: an unknown matching.

    Source: "The Myth of Expert Specialization in MoEs"; matching on one half is derived. What it does not show: that
    matched experts compute alike; the matching knows their use alone.
    """
    check_matching(matching)
    check_choice(level, ("sequence", "token"), "level")
    check_seed(seed)
    _check_comparable(a, b, level)
    n = len(a.sequence_lengths)
    halves = halves_of(n, seed)
    counts = covered_counts(a), covered_counts(b)
    rows: dict[str, list[FloatArray]] = {"same": [], "other": [], "crossed": [], "chance": []}
    first, second = pairs_of(n)
    for layer in range(len(a.layers)):
        shares = [side[:, layer] / np.maximum(side[:, layer].sum(1, keepdims=True), 1) for side in counts]
        orders = orders_of_halves(shares[0], shares[1], halves, matching)
        values = _of_layer(a, b, counts, layer, orders, halves, level, p, first, second)
        for name, found in zip(rows, values):
            rows[name].append(found)
    return _answer_dataset(a, {name: np.stack(values) for name, values in rows.items()}, n, matching, level, p)


def _check_comparable(a: RoutingTrace, b: RoutingTrace, level: str) -> None:
    check_trace(a, "a")
    check_trace(b, "b")
    if a.layers != b.layers:
        odd = sorted(set(a.layers) ^ set(b.layers)) or list(b.layers)
        raise DataError(
            f"layers {odd}, which one of the traces lacks (or orders otherwise)",
            f"traces of the same layers; they have {list(a.layers)} and {list(b.layers)}",
            "Cut both to the layers that they share.",
        )
    n = len(a.sequence_lengths), len(b.sequence_lengths)
    if n[0] != n[1]:
        raise DataError(f"{n[0]} and {n[1]} sequences", "the same sequences in both", "Record both on the same ones.")
    check_sequences(n[0], 2, "an overlap of answers")
    if level != "token":
        return
    known = a.token_ids is not None and b.token_ids is not None
    same = np.array_equal(a.sequence_lengths, b.sequence_lengths)
    same = same and (not known or np.array_equal(a.token_ids, b.token_ids))  # type: ignore[arg-type]
    if not same:
        raise DataError(
            "traces of different tokens, as of two tokenizers, compared token by token",
            "the same token ids in the same order",
            "Compare them sequence by sequence (level='sequence').",
        )


def _of_layer(
    a: RoutingTrace,
    b: RoutingTrace,
    counts: tuple[Counts, Counts],
    layer: int,
    orders: list[NDArray[np.int64]],
    halves: NDArray[np.int64],
    level: str,
    p: float,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
) -> tuple[FloatArray, ...]:
    """``same[sequence], other[pair], crossed[pair], chance[sequence]``."""
    sets_a, sets_b = (stats.smallest_sets(side[:, layer], p) for side in counts)
    width = a.n_experts + max(int((order < 0).sum()) for order in orders)
    wide_a = np.pad(sets_a, ((0, 0), (0, width - a.n_experts)))
    moved = [_wide(matched(sets_b, order, a.n_experts), width) for order in orders]
    in_terms_of_a = np.where(halves[:, None] == 0, moved[0], moved[1]).astype(bool)
    other = stats.jaccard(sets_a[first], sets_a[second])
    crossed = stats.jaccard(wide_a[first], in_terms_of_a[second])
    chance = stats.expected_jaccard(sets_a.sum(1), sets_b.sum(1), max(a.n_experts, b.n_experts))
    if level == "sequence":
        return stats.jaccard(wide_a, in_terms_of_a), other, crossed, chance
    one = membership(a.expert_indices[:, layer], a.n_experts)
    two = membership(b.expert_indices[:, layer], b.n_experts)
    both = np.stack([_wide(matched(two, order, a.n_experts), width) for order in orders])
    there = both[halves[a.sequence], np.arange(len(two))].astype(bool)
    size = np.maximum(one.sum(1) * there.sum(1), 1)
    together = (np.pad(one, ((0, 0), (0, width - a.n_experts))) & there).sum(1) / np.sqrt(size)
    seen = one.any(1) & two.any(1)  # tokens that both traces cover
    n = np.bincount(a.sequence[seen], minlength=len(sets_a))
    if not n.all():
        given = f"sequence {int(np.argmin(n))} without a token that both traces cover at layer {a.layers[layer]}"
        raise DataError(given, "a token of each sequence with experts in both", "Compare them with level='sequence'.")
    by_chance = np.sqrt(size) / max(a.n_experts, b.n_experts)
    means = [np.bincount(a.sequence[seen], weights=values[seen]) / n for values in (together, by_chance)]
    return means[0], other, crossed, means[1]


def _wide(sets: NDArray[Any], width: int) -> NDArray[Any]:
    return np.pad(sets, ((0, 0), (0, width - sets.shape[-1])))


def _answer_dataset(
    a: RoutingTrace, rows: dict[str, FloatArray], n: int, matching: str, level: str, p: float
) -> xr.Dataset:
    first, second = pairs_of(n)
    variables: dict[str, Any] = {}
    for name, values in rows.items():
        if name == "chance":
            variables["chance"], variables["mean_chance"] = ("layer", values.mean(1)), ((), float(values.mean()))
            continue
        units = (np.arange(n), np.arange(n)) if name == "same" else (first, second)
        found = stats.pair_interval([values], *units, _mean, n_units=n, bounds=(0, 1))
        whole = stats.pair_interval([values.mean(0)], *units, lambda x, m: x / m, n_units=n, bounds=(0, 1))
        for suffix, part in (("", "estimate"), ("_low", "low"), ("_high", "high")):
            variables[f"{name}{suffix}"] = ("layer", getattr(found, part))
            variables[f"mean_{name}{suffix}"] = ((), float(getattr(whole, part)))
    difference = _beyond(rows["same"].mean(0), rows["other"].mean(0), first, second)
    for suffix, part in (("", "estimate"), ("_low", "low"), ("_high", "high")):
        variables[f"same_beyond_other{suffix}"] = ((), float(getattr(difference, part)))
    attrs = {"matching": matching, "level": level, "p": p, "n_sequences": n}
    return xr.Dataset(variables, coords={"layer": list(a.layers)}, attrs=attrs)


def _beyond(same: FloatArray, other: FloatArray, first: NDArray[np.int64], second: NDArray[np.int64]) -> stats.Interval:
    """The mean over sequences less that over pairs of sequences, each left out in turn with its pairs."""
    n = len(same)
    of_unit = np.bincount(first, other, n) + np.bincount(second, other, n)
    n_left = len(other) - np.bincount(first, minlength=n) - np.bincount(second, minlength=n)
    with np.errstate(divide="ignore", invalid="ignore"):
        without = (same.sum() - same) / (n - 1) - (other.sum() - of_unit) / n_left
    return stats.jackknife_interval(same.mean() - other.mean(), without)
