"""Do domains use experts differently, more than sequences of one domain differ among themselves?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.checks import check_seed, check_whole
from moe_interp.errors import DataError
from moe_interp.stats import derive_rng
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.counts import RoutingCounts, counted
from moe_interp.traces.expert_use import axes, entropy, ratio
from moe_interp.traces.trace import RoutingTrace

MOST_BYTES = 2**28  # of the statistics of all permutations
MOST_WORK = 4e11  # multiplications over all permutations
FEWEST = 199  # permutations, below the number asked for, that are still drawn
_TIE = 1e-9


def domain_differences(source: RoutingTrace | RoutingCounts, n_permutations: int = 999, seed: int = 0) -> xr.Dataset:
    """The experts that a domain uses more or less than the others, against labels permuted over **sequences**.

    A sequence is routed alike throughout, so that its tokens are no independent evidence: permuting labels over tokens
    calls every pair of texts different. Here whole sequences change their label, and take their length along.

    Args:
        source: Routes with one label a sequence, or the counts of a corpus with its sequences.
        n_permutations: Drawn ones; fewer (``attrs["n_permutations"]``, at least 199) of a corpus so large that it would
            take minutes.
        seed: Of the permutations.

    Returns:
        ``difference[domain, layer, expert]`` = share of the domain's tokens that the expert serves, less that of all
        other tokens; ``p`` of its size alone, and ``p_adjusted`` for all domains, layers and experts together (the
        largest of all standardised differences of a permutation, Westfall and Young: family-wise error);
        ``information[layer]`` = I(domain; expert) over slots in nats, ``information_null``, its mean under permutation,
        which is above 0 since sequences differ, and ``information_p``. Both p count the observed labels as one of the
        permutations. NaN for a difference that no permutation changes, such as of an unused expert.

    Raises:
        DataError: fewer than two domains, no counts of sequences, sequences of several labels, or one sequence only.

    Source: derived; Westfall and Young (1993) for ``p_adjusted``. Valid where sequences are exchangeable under the
    null: repeated or continued texts are not independent sequences. What it does not show: why; domains that differ in
    length, format or language differ in experts for that reason.
    """
    found = counted(source, "sequences")
    n_permutations, seed = check_whole(n_permutations, "n_permutations", 1), check_seed(seed)
    found.check_domains(2)
    slots, covered, label = (found.array(name) for name in ("row_slots", "row_covered", "row_domain"))
    _check_rows(found, label)
    n_domains = len(found.domains)
    n_layers, n_experts = len(found.layers), found.n_experts
    n = min(n_permutations, max(1, int(MOST_BYTES / (8 * n_domains * slots[0].size))))
    n = min(n, max(FEWEST, int(MOST_WORK / (n_domains * slots.size))))
    rng = derive_rng(seed, "domain differences")
    labels = np.stack([label, *(rng.permutation(label) for _ in range(n))])
    # shape: (permutation, domain, row)
    member = (labels[:, None, :] == np.arange(n_domains)[:, None]).astype(np.float32)
    flat = member.reshape(-1, len(label))
    difference = np.empty((n + 1, n_domains, n_layers, n_experts))
    information = np.empty((n + 1, n_layers))
    for layer in range(n_layers):
        # float32 would round counts above 2^24
        counts = (flat @ slots[:, layer].astype(np.float64)).reshape(n + 1, n_domains, n_experts)
        tokens = (flat @ covered[:, layer].astype(np.float64)).reshape(n + 1, n_domains, 1)
        rest = counts.sum(axis=1, keepdims=True) - counts, tokens.sum(axis=1, keepdims=True) - tokens
        difference[:, :, layer] = ratio(counts, tokens) - ratio(*rest)
        information[:, layer] = mutual_information(counts)
    p, adjusted = _p_values(difference)
    by_expert = ("domain", "layer", "expert")
    data = {
        "difference": (by_expert, difference[0]),
        "p": (by_expert, p),
        "p_adjusted": (by_expert, adjusted),
        "information": ("layer", information[0], {"units": "nats"}),
        "information_null": ("layer", information[1:].mean(axis=0), {"units": "nats"}),
        "information_p": ("layer", (information >= information[0] - _TIE).mean(axis=0)),
    }
    sizes = np.bincount(label, minlength=n_domains).tolist()
    attrs = {"n_permutations": n, "smallest_p": max(1 / (n + 1), 1 / _arrangements(sizes)), "sequences": len(label)}
    return xr.Dataset(data, coords={"domain": list(found.domains)} | axes(found), attrs=attrs)


def mutual_information(counts: FloatArray) -> FloatArray:
    """I(row; column) in nats of tables ``[..., row, column]`` of counts."""
    share = ratio(counts, counts.sum(axis=(-2, -1), keepdims=True))
    return np.asarray(
        entropy(share.sum(axis=-1)) + entropy(share.sum(axis=-2)) - entropy(share.reshape(*share.shape[:-2], -1))
    )


def _p_values(difference: FloatArray) -> tuple[FloatArray, FloatArray]:
    """p of each cell and p over all cells; ``[permutation, ...]``, the observed one first."""
    n = len(difference)
    flat = difference.reshape(n, -1)
    spread = flat.std(axis=0)
    moves = spread > _TIE
    with np.errstate(invalid="ignore"):
        size = np.abs(flat - flat.mean(axis=0)) / np.where(moves, spread, np.nan)
    p = np.where(moves, (size >= size[0] - _TIE).mean(axis=0), np.nan)
    largest = np.where(moves, size, -np.inf).max(axis=1)
    adjusted = np.where(moves, (largest[:, None] >= size[0] - _TIE).mean(axis=0), np.nan)
    return p.reshape(difference.shape[1:]), adjusted.reshape(difference.shape[1:])


def _check_rows(found: RoutingCounts, label: NDArray[Any]) -> None:
    """Refuse what cannot be permuted over sequences."""
    sequences = found.array("row_sequence")
    sizes = np.bincount(label, minlength=len(found.domains))
    if len(np.unique(sequences)) < len(sequences):
        raise DataError("sequences with tokens of several domains", "one domain a sequence", "Label whole sequences.")
    if _arrangements(sizes.tolist()) < 3:
        raise DataError(
            f"{len(sequences)} sequences, {dict(zip(found.domains, sizes.tolist()))}",
            "several sequences of each domain: labels are permuted over sequences",
            "Record more sequences; no number of tokens of one sequence says what another would do.",
        )


def _arrangements(sizes: list[int]) -> float:
    """In how many ways labels can be given to sequences; inf where it is beyond a float."""
    log = math.lgamma(sum(sizes) + 1) - sum(math.lgamma(size + 1) for size in sizes)
    return round(math.exp(log)) if log < 40 else math.inf
