"""Which expert is compared with which, of two models or two layers: they have no natural correspondence."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moe_interp import stats
from moe_interp.checks import check_seed
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.geometry.pairs import check_sequences, chosen_sequences
from moe_interp.experiments.geometry.states import covered_counts
from moe_interp.stats.checks import FloatArray
from moe_interp.traces import RoutingTrace

Matching = Literal["identity", "rank", "usage"]
IntArray = NDArray[np.int64]
MOST_SEQUENCES = 256


def check_matching(matching: str) -> None:
    """Refuse an unknown way of matching.

    Raises:
        ConfigError: it is.
    """
    if matching not in get_args(Matching):
        expected = "'identity' (the same expert: runs of one model), 'rank' or 'usage'"
        raise ConfigError(f"matching={matching!r}", expected, "Say how experts of two models are matched.")


def match_experts(a: FloatArray, b: FloatArray, matching: Matching) -> IntArray:
    """``[expert of b]`` the expert of ``a`` that it is compared with, or -1.

    "identity": the same number. "rank": the experts of the same rank by total use. "usage": the assignment that makes
    the shared use ``sum over questions of min(a, b)`` largest (Hungarian algorithm).

    Args:
        a, b: ``[question, expert]`` shares of slots, of the same questions.

    Raises:
        DataError: "identity" for models with different numbers of experts.
    """
    n_a, n_b = a.shape[1], b.shape[1]
    if matching == "identity":
        if n_a != n_b:
            raise DataError(f"traces with {n_a} and {n_b} experts", "one number", "Match by rank or by usage.")
        return np.arange(n_b)
    found = np.full(n_b, -1)
    if matching == "rank":
        order_a, order_b = (np.argsort(-side.sum(0), kind="stable") for side in (a, b))
        n = min(n_a, n_b)
        found[order_b[:n]] = order_a[:n]
        return found
    together = np.stack([np.minimum(a[:, [e]], b).sum(0) for e in range(n_a)])  # [expert of a, expert of b]
    rows, columns = linear_sum_assignment(together, maximize=True)
    found[columns] = rows
    return found


def matched(values: NDArray[np.generic], order: IntArray, n_experts: int) -> NDArray[np.generic]:
    """``[..., expert of b]`` values under the numbers of ``a``'s experts, then those of b without a match."""
    n_free = int((order < 0).sum())
    place = np.where(order >= 0, order, 0)
    place[order < 0] = n_experts + np.arange(n_free)
    moved = np.zeros((*values.shape[:-1], n_experts + n_free), dtype=values.dtype)
    moved[..., place] = values
    return moved


def halves_of(n: int, seed: int) -> IntArray:
    """``[sequence]`` 0 or 1: a matching is found on one half of the sequences and applied to the other."""
    halves = np.zeros(n, dtype=np.int64)
    halves[stats.derive_rng(seed, "halves").permutation(n)[: n // 2]] = 1
    return halves


def orders_of_halves(a: FloatArray, b: FloatArray, halves: IntArray, matching: Matching) -> list[IntArray]:
    """For each half of the sequences, the matching that is applied to it: by usage, found on the other half."""
    if matching == "usage":
        return [match_experts(a[halves != half], b[halves != half], matching) for half in (0, 1)]
    return [match_experts(a, b, matching)] * 2


def layer_overlap(
    a: RoutingTrace, b: RoutingTrace | None = None, matching: Matching = "usage", p: float = 0.8, seed: int = 0
) -> xr.Dataset:
    """Overlap of the experts that a sequence uses at two layers, of one run or of two: Jaccard@p, layer by layer.

    A sequence's set at a layer is the smallest one with a share ``p`` of its slots. Experts of two layers (or models)
    have no correspondence, so the experts of each layer of ``b`` are matched to those of each layer of ``a``.

    Args:
        a: At least two sequences.
        b: Another run or model on the same sequences in the same order, of any layers and number of experts; by
            default ``a`` itself.
        matching: "usage", "rank" or "identity", as :func:`answer_overlap`. By usage, the matching is found on one half
            of the sequences and applied to the other.
        p: The share, above 0 and at most 1.
        seed: Of the halves, and of the sequences where there are more than 256.

    Returns:
        ``[layer, other_layer]``: ``overlap``, the mean over sequences of ``|A n B| / |A u B|``, ``A`` the set of a
        sequence at a layer of ``a`` and ``B`` that at a layer of ``b``; ``crossed``, the same of two different
        sequences under the same matching; ``chance``, of uniform random sets of the sizes. Of one run, "usage" and
        "identity" give about 1 on the diagonal.

    Raises:
        DataError: fewer than two sequences, other numbers of them, a sequence without an expert at some layer, or
            "identity" for different numbers of experts.
        ConfigError: an unknown matching, or ``p`` out of range.

    Source: derived, of Jaccard@p in "The Myth of Expert Specialization in MoEs". What it does not show: that matched
    experts compute alike. ``crossed`` is what unequal use alone gives; sequences are told apart by what exceeds it.
    """
    check_matching(matching)
    check_seed(seed)
    one = covered_counts(a)
    two = one if b is None else covered_counts(b)
    if len(one) != len(two):
        raise DataError(
            f"{len(one)} and {len(two)} sequences", "the same sequences in both", "Record both on the same."
        )
    found = layer_overlap_of(one, None if b is None else two, matching, p, seed)
    layers = {"layer": list(a.layers), "other_layer": list(a.layers if b is None else b.layers)}
    variables = {name: (("layer", "other_layer"), values) for name, values in found.items()}
    return xr.Dataset(variables, coords=layers, attrs={"matching": matching, "p": p, "n_sequences": len(one)})


def layer_overlap_of(
    a: NDArray[np.integer], b: NDArray[np.integer] | None, matching: Matching, p: float, seed: int
) -> dict[str, FloatArray]:
    """The matrices of :func:`layer_overlap` from ``counts[sequence, layer, expert]``; ``b`` is None for one run."""
    check_sequences(len(a), 2, "an overlap of layers")
    chosen = chosen_sequences(len(a), MOST_SEQUENCES, seed)
    halves = halves_of(len(chosen), seed)
    one, two = a[chosen], (a if b is None else b)[chosen]
    shares = [side / side.sum(2, keepdims=True) for side in (one, two)]
    sets = [stats.smallest_sets(side, p) for side in (one, two)]
    found = np.empty((3, one.shape[1], two.shape[1]))
    for i in range(one.shape[1]):
        for j in range(two.shape[1]):
            if b is None and j < i:
                found[:, i, j] = found[:, j, i]
                continue
            orders = orders_of_halves(shares[0][:, i], shares[1][:, j], halves, matching)
            found[:, i, j] = _of_two_layers(sets[0][:, i], sets[1][:, j], orders, halves)
    return dict(zip(("overlap", "crossed", "chance"), found))


def _of_two_layers(
    a: NDArray[np.bool_], b: NDArray[np.bool_], orders: list[IntArray], halves: IntArray
) -> tuple[float, float, float]:
    """The mean Jaccard of sets ``[sequence, expert]`` of one sequence, of two sequences, and by chance."""
    n, n_experts = a.shape
    width = n_experts + max(int((order < 0).sum()) for order in orders)
    moved = np.zeros((n, width))
    for half, order in enumerate(orders):
        place = matched(b[halves == half], order, n_experts)
        moved[halves == half, : place.shape[1]] = place
    size_a, size_b = a.sum(1), b.sum(1)
    both = np.pad(a, ((0, 0), (0, width - n_experts))).astype(np.float64) @ moved.T
    every = both / (size_a[:, None] + size_b - both)  # [sequence of a, sequence of b]
    same = float(np.trace(every)) / n
    chance = stats.expected_jaccard(size_a, size_b, max(n_experts, b.shape[1])).mean()
    return same, (float(every.sum()) - same * n) / (n * (n - 1)), float(chance)
