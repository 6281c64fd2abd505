"""Do domains use experts differently, more than sequences of one domain differ among themselves?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.checks import check_seed, check_whole
from moe_interp.errors import DataError
from moe_interp.stats import adjust_p, derive_rng
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.counts import RoutingCounts, counted
from moe_interp.traces.expert_use import axes, entropy, ratio
from moe_interp.traces.trace import RoutingTrace

MOST_CELLS = 2**22  # statistics of permutations that are held at once
MOST_WORK = 1e11  # multiplications over all permutations
FOR_INFORMATION = 1000  # labels, the observed ones among them, of which the information is taken
FEWEST = 499  # permutations, below the number asked for, that are still drawn
_TIE = 1e-9


def domain_differences(source: RoutingTrace | RoutingCounts, n_permutations: int = 9999, seed: int = 0) -> xr.Dataset:
    """The experts that a domain uses more or less than the others, against labels permuted over **sequences**.

    A sequence is routed alike throughout, so that its tokens are no independent evidence: permuting labels over tokens
    calls every pair of texts different. Here whole sequences change their label, and take their length along.

    Args:
        source: Routes with one label a sequence, or the counts of a corpus with its sequences.
        n_permutations: Drawn ones; fewer (``attrs["n_permutations"]``, at least 499) of a corpus so large that they
            would take minutes.
        seed: Of the permutations.

    Returns:
        ``difference[domain, layer, expert]`` = share of the domain's tokens that the expert serves, less that of all
        other tokens; ``p`` of its size, and ``q``, adjusted over all domains, layers and experts (Benjamini-Hochberg);
        ``information[layer]`` = I(domain; expert) over slots in nats, ``information_null``, its mean under permutation,
        which is above 0 since sequences differ, and ``information_p``. The observed labels count as one of the
        permutations; the information is taken of 1000 at most. NaN for an expert without use at a layer.

    Raises:
        DataError: fewer than two domains, no counts of sequences, sequences of several labels, or one sequence only.

    Source: derived; Fisher (1935) for the test. Valid where sequences are exchangeable under the null: repeated or
    continued texts are not independent sequences. What it does not show: why; domains that differ in length, format or
    language differ in experts for that reason.
    """
    found = counted(source, "sequences")
    n_permutations, seed = check_whole(n_permutations, "n_permutations", 1), check_seed(seed)
    found.check_domains(2)
    slots, covered, label = (found.array(name) for name in ("row_slots", "row_covered", "row_domain"))
    _check_rows(found, label)
    n_domains = len(found.domains)
    n = min(n_permutations, max(FEWEST, int(MOST_WORK / (n_domains * slots.size))))
    member = _memberships(label, n_domains, n, seed)
    shape = (n_domains, len(found.layers), found.n_experts)
    difference, p = np.empty(shape), np.empty(shape)
    information = np.empty((min(n + 1, FOR_INFORMATION), shape[1]))
    for layer in range(shape[1]):
        difference[:, layer], p[:, layer], information[:, layer] = _layer(member, slots[:, layer], covered[:, layer])
    by_expert = ("domain", "layer", "expert")
    data = {
        "difference": (by_expert, difference),
        "p": (by_expert, p),
        "q": (by_expert, adjust_p(p)),
        "information": ("layer", information[0], {"units": "nats"}),
        "information_null": ("layer", information[1:].mean(axis=0), {"units": "nats"}),
        "information_p": ("layer", (information >= information[0] - _TIE).mean(axis=0)),
    }
    sizes = np.bincount(label, minlength=n_domains).tolist()
    attrs = {"n_permutations": n, "smallest_p": max(1 / (n + 1), 1 / _arrangements(sizes))}
    return xr.Dataset(data, coords={"domain": list(found.domains)} | axes(found), attrs=attrs)


def _memberships(label: NDArray[Any], n_domains: int, n: int, seed: int) -> NDArray[np.bool_]:
    """``[permutation, domain, sequence]``, the observed one first."""
    rng = derive_rng(seed, "domain differences")
    labels = rng.permuted(np.tile(label, (n + 1, 1)), axis=1)
    labels[0] = label
    return np.asarray(labels[:, None, :] == np.arange(n_domains)[:, None])


def _layer(
    member: NDArray[np.bool_], slots: NDArray[Any], covered: NDArray[Any]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Differences and their p ``[domain, expert]``, and the information of every permutation, of one layer."""
    n_all, n_domains, n_rows = member.shape
    n_experts = slots.shape[1]
    values = np.column_stack([slots, covered]).astype(np.float64)
    chunk = max(1, MOST_CELLS // max(n_domains * (n_experts + 1), n_domains * n_rows))
    extreme, information = np.zeros((n_domains, n_experts)), np.empty(min(n_all, FOR_INFORMATION))
    observed = np.empty(0)
    for start in range(0, n_all, chunk):
        part = member[start : start + chunk]
        sums = (part.reshape(-1, n_rows).astype(np.float64) @ values).reshape(len(part), n_domains, -1)
        counts, tokens = sums[..., :-1], sums[..., -1:]
        rest = counts.sum(axis=1, keepdims=True) - counts, tokens.sum(axis=1, keepdims=True) - tokens
        difference = ratio(counts, tokens) - ratio(*rest)
        observed = difference[0] if start == 0 else observed
        extreme += (np.abs(difference) >= np.abs(observed) - _TIE).sum(axis=0)
        if (few := len(information) - start) > 0:
            information[start : start + chunk] = mutual_information(counts[:few])
    is_used = (slots.sum(axis=0) > 0) & np.isfinite(observed)
    return observed, np.where(is_used, extreme / n_all, np.nan), information


def mutual_information(counts: FloatArray) -> FloatArray:
    """I(row; column) in nats of tables ``[..., row, column]`` of counts."""
    share = ratio(counts, counts.sum(axis=(-2, -1), keepdims=True))
    return np.asarray(
        entropy(share.sum(axis=-1)) + entropy(share.sum(axis=-2)) - entropy(share.reshape(*share.shape[:-2], -1))
    )


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
