"""What is counted of one part of a corpus, whole sequences: arrays by name, with their axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_interp.errors import DataError
from moe_interp.traces.tallies.fixed_point import fixed_point_sums
from moe_interp.traces.tallies.sparse import SparseCounts
from moe_interp.traces.trace import RoutingTrace

Arrays = dict[str, NDArray[Any]]
FEW_SLOTS = 16  # up to so many, pairs of slots are counted one by one; wider routes by matrix products
TOKENS_AT_ONCE = 4096  # of those products: their one-hot rows
ID_KINDS = ("input", "next", "predicted")


class Part:
    """A part of a corpus with what all tables need of it.

    Attributes:
        experts: ``[token, layer, slot]``; ids below 0 are empty.
        covered: ``[token, layer]``, whether the trace covers the token there (native rows are not).
        width: ``[token, layer]`` experts in use.
        first: ``[token, layer]`` the expert of largest weight, or of the first slot without weights; -1 without any.
        domain: ``[token]`` code of the token's label.
        row: ``[token]`` number of the token's run of one sequence and label; a sequence of one label is one run.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace
        self.experts = trace.expert_indices
        used = self.experts >= 0
        self.covered = trace.covered
        self.width = used.sum(axis=2, dtype=np.int32)
        self.first = first_experts(self.experts, trace.expert_weights)
        self.n_domains = max(1, len(trace.domains))
        self.domain = trace.domain_codes if trace.domains else np.zeros(trace.n_tokens, dtype=np.int64)
        keys, self.row = np.unique(trace.sequence * self.n_domains + self.domain, return_inverse=True)
        self.row_sequence, self.row_domain = np.divmod(keys, self.n_domains)
        self.shape = (len(trace.layers), trace.n_experts)


def first_experts(experts: NDArray[Any], weights: NDArray[Any] | None) -> NDArray[Any]:
    """``[token, layer]`` the expert of largest weight, or of the first filled slot without weights; -1 without any."""
    used = experts >= 0
    slot = used.argmax(axis=2) if weights is None else np.where(used, weights, -np.inf).argmax(axis=2)
    chosen = np.take_along_axis(experts, slot[..., None], axis=2)[..., 0]
    return np.where(used.any(axis=2), chosen, -1)


def count_use(part: Part) -> Arrays:
    """Slots by domain, layer, number of experts of the token, and expert; tokens by that number; top-1 experts."""
    (n_layers, n_experts), n_domains, most = part.shape, part.n_domains, part.trace.n_slots
    served = np.zeros((n_domains, n_layers, most + 1, n_experts), dtype=np.int64)
    by_width = np.zeros((n_domains, n_layers, most + 1), dtype=np.int64)
    first = np.zeros((n_domains, n_layers, n_experts), dtype=np.int64)
    for layer in range(n_layers):
        cell = part.domain * (most + 1) + part.width[:, layer]
        experts = part.experts[:, layer]
        codes = cell[:, None] * n_experts + experts
        codes = codes.ravel() if (experts >= 0).all() else codes[experts >= 0]
        served[:, layer] = np.bincount(codes, minlength=n_domains * (most + 1) * n_experts).reshape(
            n_domains, most + 1, n_experts
        )
        kept = part.covered[:, layer]
        by_width[:, layer] = np.bincount(cell[kept], minlength=n_domains * (most + 1)).reshape(n_domains, most + 1)
        top = part.first[:, layer]
        codes = (part.domain * n_experts + top)[top >= 0]
        first[:, layer] = np.bincount(codes, minlength=n_domains * n_experts).reshape(n_domains, n_experts)
    tokens = np.bincount(part.domain[part.covered.any(axis=1)], minlength=n_domains)
    return {"served": served, "tokens_by_width": by_width, "top1": first, "domain_tokens": tokens}


def count_rows(part: Part) -> Arrays:
    """Of each run of a sequence: its tokens, and its slots by layer and expert in the smallest type that holds them."""
    (n_layers, n_experts), n_rows = part.shape, len(part.row_domain)
    tokens = np.bincount(part.row, minlength=n_rows)
    kind = np.uint16 if tokens.max() < 2**16 else np.uint32
    slots = np.empty((n_rows, n_layers, n_experts), dtype=kind)
    covered = np.empty((n_rows, n_layers), dtype=np.int64)
    for layer in range(n_layers):
        experts = part.experts[:, layer]
        codes = part.row[:, None] * n_experts + experts
        codes = codes.ravel() if (experts >= 0).all() else codes[experts >= 0]
        slots[:, layer] = np.bincount(codes, minlength=n_rows * n_experts).reshape(n_rows, n_experts)
        covered[:, layer] = np.bincount(part.row[part.covered[:, layer]], minlength=n_rows)
    return {"row_slots": slots, "row_covered": covered}


def sum_weights(part: Part) -> Arrays:
    """Weights by domain, layer and expert, in fixed point; and by run the smallest weight of each token."""
    weights = part.trace.expert_weights
    if weights is None:
        return {}
    (n_layers, n_experts), n_domains, n_rows = part.shape, part.n_domains, len(part.row_domain)
    total = np.empty((n_domains, n_layers, n_experts, 2), dtype=np.int64)
    smallest = np.empty((n_rows, n_layers))
    for layer in range(n_layers):
        experts = part.experts[:, layer]
        used = experts >= 0
        codes = (part.domain[:, None] * n_experts + experts)[used]
        values = weights[:, layer]
        sums = fixed_point_sums(codes, values[used], n_domains * n_experts, "expert_weights")
        total[:, layer] = sums.reshape(n_domains, n_experts, 2)
        least = np.where(used, values, np.inf).min(axis=1)
        least[~used.any(axis=1)] = 0
        smallest[:, layer] = np.bincount(part.row, weights=least, minlength=n_rows)
    served = np.stack([np.bincount(part.row, weights=n > 0, minlength=n_rows) for n in part.width.T], axis=1)
    return {"weight": total, "row_smallest_weight": smallest, "row_served": served}


def count_pairs(part: Part) -> Arrays:
    """``[layer, expert, other]``: tokens that both serve; and how often ``other`` has the rank after ``expert``."""
    (n_layers, n_experts), most = part.shape, part.trace.n_slots
    both = np.zeros((n_layers, n_experts, n_experts), dtype=np.int64)
    adjacent = np.zeros_like(both)
    for layer in range(n_layers):
        experts = part.experts[:, layer]
        both[layer] = co_occurrences(experts, experts, n_experts)
        for slot in range(most - 1):
            adjacent[layer] += pair_counts(experts[:, slot], experts[:, slot + 1], n_experts)
    return {"pairs": both, "adjacent_pairs": adjacent}


def count_transitions(part: Part) -> Arrays:
    """``[layer, expert, next expert]``: tokens that the one serves at a layer and the other at the next recorded."""
    (n_layers, n_experts) = part.shape
    counts = np.zeros((n_layers - 1, n_experts, n_experts), dtype=np.int64)
    for layer in range(n_layers - 1):
        counts[layer] = co_occurrences(part.experts[:, layer], part.experts[:, layer + 1], n_experts)
    return {"transitions": counts}


def co_occurrences(one: NDArray[Any], other: NDArray[Any], n_experts: int) -> NDArray[np.int64]:
    """``[expert, other]``: rows of ``[token, slot]`` with an expert in the one and another in the other."""
    total = np.zeros((n_experts, n_experts), dtype=np.int64)
    same = one is other
    if one.shape[1] * other.shape[1] > FEW_SLOTS**2:
        for start in range(0, len(one), TOKENS_AT_ONCE):
            a = one_hot(one[start : start + TOKENS_AT_ONCE], n_experts)
            b = a if same else one_hot(other[start : start + TOKENS_AT_ONCE], n_experts)
            total += np.rint(a.T @ b).astype(np.int64)
        return total
    # one contiguous column a slot
    left, right = one.T.astype(np.int32), other.T.astype(np.int32)
    if not same:
        for a in left:
            for b in right:
                total += pair_counts(a, b, n_experts)
        return total
    for slot, a in enumerate(left):
        for b in right[slot + 1 :]:
            total += pair_counts(a, b, n_experts)
    used = one[one >= 0]
    return total + total.T + np.diag(np.bincount(used, minlength=n_experts))


def pair_counts(a: NDArray[Any], b: NDArray[Any], n_experts: int) -> NDArray[np.int64]:
    """``[expert, other]``: how often the first holds an expert where the second holds the other."""
    kept = (a >= 0) & (b >= 0)
    codes = a.astype(np.int32) * n_experts + b
    codes = codes if kept.all() else codes[kept]
    return np.bincount(codes, minlength=n_experts**2).reshape(n_experts, n_experts)


def one_hot(experts: NDArray[Any], n_experts: int) -> NDArray[np.float32]:
    """``[token, expert]`` 1 where the expert is in the token's route."""
    rows = np.zeros((len(experts), n_experts), dtype=np.float32)
    token, slot = np.nonzero(experts >= 0)
    rows[token, experts[token, slot]] = 1
    return rows


def count_vocabulary(part: Part) -> dict[str, SparseCounts]:
    """How often each token id goes to each top-1 expert, by layer; codes (id * layers + layer) * experts + expert.

    The next id is the input id that follows in the same sequence.
    """
    trace = part.trace
    kinds: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    if trace.token_ids is not None:
        kinds["input"] = (trace.token_ids, part.first)
        follows = trace.sequence[1:] == trace.sequence[:-1]
        kinds["next"] = (trace.token_ids[1:][follows], part.first[:-1][follows])
    if trace.predicted_ids is not None:
        kinds["predicted"] = (trace.predicted_ids, part.first)
    n_layers, n_experts = part.shape
    found = {}
    for kind, (ids, first) in kinds.items():
        if int(np.abs(ids).max(initial=0)) >= 2**62 // (n_layers * n_experts):
            raise DataError(
                f"{kind} ids from {int(ids.min())} to {int(ids.max())}",
                f"ids that can be counted by layer and expert, below {2**62 // (n_layers * n_experts)}",
                "Number the tokens of the vocabulary.",
            )
        codes = (ids[:, None] * n_layers + np.arange(n_layers)) * n_experts + first
        found[f"vocabulary_{kind}"] = SparseCounts.of(codes[first >= 0])
    return found


def count_paths(part: Part, length: int) -> dict[str, SparseCounts]:
    """How often each sequence of top-1 experts over consecutive layers occurs; the window's number is in the code."""
    n_layers, n_experts = part.shape
    codes = []
    for window in range(n_layers - length + 1):
        path = part.first[:, window : window + length].astype(np.int64)
        whole = path[(path >= 0).all(axis=1)]
        code = np.full(len(whole), window, dtype=np.int64)
        for step in whole.T:
            code = code * n_experts + step
        codes.append(code)
    return {"paths": SparseCounts.of(np.concatenate(codes) if codes else np.zeros(0, np.int64))}


def sum_norms(part: Part) -> Arrays:
    """Norms of the experts' outputs by layer and expert, plain and times the weight; and the latter by run."""
    norms, weights = part.trace.expert_norms, part.trace.expert_weights
    if norms is None:
        return {}
    (n_layers, n_experts), n_rows = part.shape, len(part.row_domain)
    arrays: Arrays = {"norm": np.empty((n_layers, n_experts, 2), dtype=np.int64)}
    if weights is not None:
        arrays["weighted_norm"] = np.empty_like(arrays["norm"])
        arrays["row_weighted_norm"] = np.empty((n_rows, n_layers, n_experts), dtype=np.float32)
    for layer in range(n_layers):
        experts = part.experts[:, layer]
        used = experts >= 0
        codes, values = experts[used], norms[:, layer][used].astype(np.float64)
        arrays["norm"][layer] = fixed_point_sums(codes, values, n_experts, "expert_norms")
        if weights is not None:
            values = values * weights[:, layer][used]
            arrays["weighted_norm"][layer] = fixed_point_sums(codes, values, n_experts, "weighted norms")
            by_row = (part.row[:, None] * n_experts + experts)[used]
            sums = np.bincount(by_row, weights=values, minlength=n_rows * n_experts)
            arrays["row_weighted_norm"][:, layer] = sums.reshape(n_rows, n_experts)
    return arrays


def sum_margins(part: Part) -> Arrays:
    """By run and layer: the sum over tokens of (smallest logit in the route - largest outside); how many are < 0."""
    logits = part.trace.router_logits
    if logits is None:
        return {}
    n_layers, n_rows = part.shape[0], len(part.row_domain)
    names = ("row_margin", "row_margin_tokens", "row_margin_negative")
    arrays: Arrays = {name: np.zeros((n_rows, n_layers)) for name in names}
    for layer in range(n_layers):
        experts, values = part.experts[:, layer], np.asarray(logits[:, layer], dtype=np.float64)
        inside = np.zeros(values.shape, dtype=bool)
        token, slot = np.nonzero(experts >= 0)
        inside[token, experts[token, slot]] = True
        gap = np.where(inside, values, np.inf).min(axis=1) - np.where(inside, -np.inf, values).max(axis=1)
        kept = np.isfinite(gap)
        row, gap = part.row[kept], gap[kept]
        for name, value in zip(names, (gap, np.ones(len(gap)), gap < 0)):
            arrays[name][:, layer] = np.bincount(row, weights=value.astype(np.float64), minlength=n_rows)
    return arrays
