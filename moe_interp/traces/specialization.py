"""What do experts go by: the domain, the token, the task?"""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr

from moe_interp.errors import ConfigError, DataError
from moe_interp.traces.expert_use import axes, ratio
from moe_interp.traces.trace import RoutingTrace


def domain_specialization(trace: RoutingTrace) -> xr.Dataset:
    """Share of a domain's tokens that an expert serves, against even use.

    Returns:
        ``share[domain, layer, expert]`` = share of the domain's tokens with the expert in their route (rows sum to k);
        ``baseline[layer]`` = k / E, k the mean number of experts per token; ``tokens[domain]``, covered at any layer.
        Tokens without any expert count among the domain's tokens; those not covered at a layer do not. NaN for a
        domain or layer without any token.

    Raises:
        DataError: No labels.

    Source: OLMoE. What it does not show: specialization by itself. An expert in constant use is above the baseline in
    every domain; compare domains with each other.
    """
    counts = trace.counts(trace.domain_codes, len(trace.domains))
    codes, n_domains = trace.domain_codes, len(trace.domains)
    covered = np.stack([np.bincount(codes[mask], minlength=n_domains) for mask in trace.covered.T], axis=1)
    tokens = np.bincount(codes[trace.covered.any(axis=1)], minlength=n_domains)
    return xr.Dataset(
        {
            "share": (("domain", "layer", "expert"), ratio(counts, covered[..., None])),
            "baseline": ("layer", ratio(counts.sum(axis=(0, 2)), covered.sum(axis=0)) / trace.n_experts),
            "tokens": ("domain", tokens),
        },
        coords={"domain": list(trace.domains)} | axes(trace),
    )


def vocabulary_specialization(
    trace: RoutingTrace, ids: Literal["input", "predicted"] = "input", min_count: int = 10
) -> xr.Dataset:
    """How far the top-1 expert is a matter of the token id alone.

    Per token id, the share of its occurrences that go to its most frequent top-1 expert; averaged over ids. The top-1
    expert is the one of largest weight, or the first slot where the trace has no weights; a token without experts is
    skipped.

    Args:
        trace: Routes with token ids.
        ids: ``"input"``, the token itself, or ``"predicted"``, the one the model predicts there.
        min_count: Occurrences that an id needs to count.

    Returns:
        ``specialization[layer]`` from about 1/E to 1; ``share[layer, token_id]``; ``expert[layer, token_id]`` the modal
        one, the smallest of equals, -1 without any; ``occurrences[layer, token_id]`` of tokens with an expert.

    Raises:
        DataError: The trace has no such ids, or none occurs ``min_count`` times.
        ConfigError: Other ``ids``, or ``min_count`` below 1.

    Source: OLMoE. What it does not show: chance. For rare ids the largest share is high even for random routes.
    """
    if ids not in ("input", "predicted") or min_count < 1:
        raise ConfigError(
            f"ids={ids!r}, min_count={min_count}", "'input' or 'predicted', and at least 1", "Choose these."
        )
    values = trace.token_ids if ids == "input" else trace.predicted_ids
    values = None if values is None else values[trace.covered.any(axis=1)]
    known, count = (None, None) if values is None else np.unique(values, return_counts=True)
    if values is None or known is None or count is None or count.max(initial=0) < min_count:
        most = "no such ids" if count is None else f"at most {count.max(initial=0)} occurrences of an id"
        raise DataError(
            f"A trace of {trace.n_tokens} tokens with {most}",
            f"{ids} ids, one of them at least {min_count} times",
            "Record ids (token_ids=, predicted_ids=) of more tokens, or lower min_count.",
        )
    kept = known[count >= min_count]
    chosen = np.isin(values, kept)
    code = np.searchsorted(kept, values[chosen])
    first = top_experts(trace)[trace.covered.any(axis=1)][chosen]
    shape = (len(kept), trace.n_experts)
    tables = [
        np.bincount((code * trace.n_experts + top)[top >= 0], minlength=shape[0] * shape[1]).reshape(shape)
        for top in first.T
    ]
    by_id = np.stack(tables)
    occurrences = by_id.sum(axis=2)
    share = ratio(by_id.max(axis=2), occurrences)
    # an id must occur often enough among the tokens that have an expert
    counted = np.where(occurrences >= min_count, share, 0.0).sum(axis=1)
    return xr.Dataset(
        {
            "specialization": ("layer", ratio(counted, (occurrences >= min_count).sum(axis=1))),
            "share": (("layer", "token_id"), share),
            "expert": (("layer", "token_id"), np.where(occurrences > 0, by_id.argmax(axis=2), -1)),
            "occurrences": (("layer", "token_id"), occurrences),
        },
        coords={"layer": list(trace.layers), "token_id": kept},
    )


def top_experts(trace: RoutingTrace) -> np.ndarray:
    """``[token, layer]`` the expert of largest weight, or of the first slot without weights; below 0 without any."""
    if trace.expert_weights is None:
        slot = (trace.expert_indices >= 0).argmax(axis=2)
    else:
        slot = np.where(trace.expert_indices >= 0, trace.expert_weights, -np.inf).argmax(axis=2)
    return np.take_along_axis(trace.expert_indices, slot[..., None], axis=2)[..., 0]


def esft_scores(trace: RoutingTrace) -> xr.Dataset:
    """Relevance of each expert to the task that a trace was recorded on.

    Returns:
        ``token_score[layer, expert]`` = mean over tokens of 1[e in the route] / k, k the token's number of experts;
        ``gate_score[layer, expert]`` = mean over tokens of the expert's weight, 0 where not chosen; only with weights.
        Tokens without any expert at a layer are skipped there; NaN where all are.

    Source: ESFT (expert-specialized fine-tuning). Scores are normalised over experts, which reproduces its released
    files; its public script normalises over layers, which does not. What it does not show: what tuning the experts
    would gain.
    """
    filled = trace.expert_indices >= 0
    width = filled.sum(axis=2)
    tokens = (width > 0).sum(axis=0)
    values = {"token_score": np.where(filled, 1 / np.maximum(width, 1)[..., None], 0.0)}
    if trace.expert_weights is not None:
        values["gate_score"] = trace.expert_weights
    scores = {}
    for name, value in values.items():
        total = np.empty((len(trace.layers), trace.n_experts))
        for layer in range(len(trace.layers)):
            used = filled[:, layer]
            experts, amount = trace.expert_indices[:, layer][used], value[:, layer][used]
            total[layer] = np.bincount(experts, weights=amount, minlength=trace.n_experts)
        scores[name] = (("layer", "expert"), ratio(total, tokens[:, None]))
    return xr.Dataset(scores, coords=axes(trace))


def esft_experts(scores: xr.DataArray, p: float = 0.2) -> dict[int, list[int]]:
    """Per layer, the experts to tune: taken from the highest score down until their sum reaches ``p``.

    Args:
        scores: ``[layer, expert]``, one of the variables of :func:`esft_scores`.
        p: Sum to reach; all experts where it is out of reach. Equal scores are taken in the order of their index.

    Raises:
        ConfigError: ``p`` not above 0.

    Source: ESFT.
    """
    if not p > 0:
        raise ConfigError(f"p={p}", "a sum of scores above 0", "Take about 0.1 to 0.3 of the scores' sum.")
    chosen = {}
    for layer, row in zip(scores["layer"].values.tolist(), scores.values):
        order = np.argsort(-row, kind="stable")
        needed = int(np.searchsorted(np.cumsum(row[order]), p - 1e-12)) + 1
        chosen[layer] = scores["expert"].values[order[:needed]].tolist()
    return chosen
