"""The best experts of a domain, and a cut of the items so that choice and measurement do not share any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moe_interp.checks import as_whole
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.isolation.data import (
    FloatArray,
    item_positions,
    items_by_domain,
    quality_array,
    single_experts,
)
from moe_interp.stats import derive_rng

SPREAD = 0.75  # of the items' weights in a resample


class HasData(Protocol):
    """A result with a dataset."""

    data: xr.Dataset


def best_experts(
    result: HasData, domain: str, k: int, items: Any | None = None, mass: str | None = None
) -> dict[int, list[int]]:
    """The ``k`` experts of each layer with the highest mean quality on the items of ``domain``, best first.

    Quality is delta when forced and -delta when ablated; every baseline gives the same order. Ties go to the smaller
    id.

    Args:
        result: An isolation result of single experts.
        domain: One of its domains.
        k: Experts per layer.
        items: Ids to use, such as one part of :func:`split_items`; those of other domains are left out. All where None.
        mass: ``"one"`` | ``"natural"``; the run's first where None.

    Raises:
        DataError: Unknown domain or ids, none of ``items`` in the domain, or experts forced together.
        ConfigError: ``k`` below 1 or above the number of forced experts.

    Source: derived. Scored on the same items, the best of many experts looks better than it is.
    """
    data = result.data
    groups = items_by_domain(data)
    if domain not in groups:
        raise DataError(f"domain {domain!r}", f"one of {list(groups)}", "Correct the name.")
    experts = single_experts(data)
    if not 1 <= (as_whole(k) or 0) <= len(experts):
        raise ConfigError(f"k={k}", f"1 to {len(experts)}, the number of forced experts", "Choose another k.")
    rows = np.intersect1d(groups[domain], item_positions(data, items))
    if not len(rows):
        raise DataError(f"no item of {domain!r} among the {len(items or [])} given", "at least one", "Pass others.")
    order = np.argsort(np.array(experts), kind="stable")
    mean = quality_array(data, mass)[rows].mean(0)[:, order]
    ranked = np.argsort(-mean, axis=-1, kind="stable")[:, :k]
    return {int(layer): [experts[order[e]] for e in row] for layer, row in zip(data["layer"].values, ranked)}


def split_items(result: HasData, seed: int = 0) -> tuple[list[str], list[str]]:
    """Ids of two random halves of the items, each domain cut in two; the first has the odd item.

    Raises:
        DataError: A domain with a single item.
    """
    first = np.zeros(result.data.sizes["item"], dtype=bool)
    for domain, index in items_by_domain(result.data).items():
        if len(index) < 2:
            raise DataError(f"one item in domain {domain!r}", "at least two", "Add items, or drop the domain.")
        order = derive_rng(seed, "split_items", domain).permutation(index)
        first[order[: (len(index) + 1) // 2]] = True
    ids = result.data["item"].values.astype(str)
    return list(map(str, ids[first])), list(map(str, ids[~first]))


@dataclass(frozen=True)
class CrossFit:
    """Result of :func:`cross_fitted`.

    Attributes:
        value: ``[layer]``, in the unit of ``measure``.
        deviations: ``[resample, layer]``, of a reweighted sample from ``value``; their root mean square is its standard
            error. Zero below 4 items, where a half of one item cannot be reweighted.
        votes: How often each expert was chosen, ``[layer, expert]``.
    """

    value: FloatArray
    deviations: FloatArray
    votes: NDArray[np.int64]


def cross_fitted(
    choose_by: FloatArray, measure: FloatArray, rng: np.random.Generator, n_splits: int = 10, n_resamples: int = 100
) -> CrossFit:
    """The best expert's worth, chosen on one half of the items and measured on the other.

    The items are cut into halves ``n_splits`` times, each half is chosen on once; the mean over all. For the spread,
    items are reweighted by 1 +- .75, half of them up and half down, and everything, the choice included, is done again
    on the same halves; the odd part of the two changes is kept. (Items of one half stay in it, so nothing leaks.)

    Args:
        choose_by, measure: ``[item, layer, expert]`` of one domain, at least 2 items.

    Source: derived. In simulation (10 to 100 items, with and without any best expert) intervals at .95 cover .94 to
    .98; taking the choices as given would cover .83 to .94.
    """
    n, n_layers, n_experts = choose_by.shape
    first = np.zeros((n_splits, n), dtype=bool)
    first[:, : n // 2] = True
    first = rng.permuted(first, axis=1)
    halves = np.concatenate([first, ~first]).astype(np.float64)
    signs = SPREAD * rng.permuted(np.tile(np.arange(n) % 2 * 2 - 1, (n_resamples, 1)), axis=1)
    weights = np.concatenate([np.ones((1, n)), 1 + signs, 1 - signs])

    def means(sides: FloatArray, values: FloatArray) -> FloatArray:
        shares = weights[:, None, :] * sides
        shares /= shares.sum(-1, keepdims=True)
        # (resample * half, item) @ (item, layer * expert) -> (resample, half, layer, expert)
        return (shares.reshape(-1, n) @ values.reshape(n, -1)).reshape(len(weights), -1, n_layers, n_experts)

    best = means(halves, choose_by).argmax(-1)
    picked = np.take_along_axis(means(1 - halves, measure), best[..., None], axis=-1)[..., 0].mean(1)
    odd = (picked[1 : n_resamples + 1] - picked[n_resamples + 1 :]) / (2 * SPREAD)
    votes = (best[0][:, :, None] == np.arange(n_experts)).sum(0)
    return CrossFit(picked[0], odd, votes)
