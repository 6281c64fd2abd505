"""Paths: the sequences of top-1 experts that tokens take over consecutive layers."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage

from moe_interp.checks import check_whole
from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray
from moe_interp.traces.counts import PATH_LENGTH, RoutingCounts, counted
from moe_interp.traces.expert_use import ratio
from moe_interp.traces.trace import RoutingTrace


def expert_paths(source: RoutingTrace | RoutingCounts, length: int = PATH_LENGTH, top: int = 10) -> xr.Dataset:
    """Top-1 paths over ``length`` consecutive recorded layers: which are common, and more common than by chance?

    A window is ``length`` layers from ``layer`` on; tokens without an expert at one of them are left out of it.

    Args:
        source: Routes, or the counts of a corpus, which were made for one length.
        length: Layers of a path.
        top: Paths of each window to list.

    Returns:
        ``path[layer, rank, step]`` the most common paths (the smaller code first among equals; -1 where there are
        fewer); ``count[layer, rank]``; ``share[layer, rank]`` of the window's tokens; ``expected[layer, rank]``, the
        share if layers were independent, prod_s p_s(e_s) with p_s the window's top-1 shares; ``cluster[layer, rank]``
        from 0: listed paths of one cluster differ pairwise in at most one layer (complete linkage on the number of
        layers that differ); ``covered[layer]``, the share of the ``top`` paths together, ``covered_expected[layer]``,
        the sum of the ``top`` largest expected shares of **any** paths: what as many would cover under independence;
        ``distinct[layer]`` paths in use; ``information[layer]``, total correlation sum_s H(step s) - H(path) in nats,
        0 under independence and above by chance in small traces; ``tokens[layer]``.

    Raises:
        DataError: fewer layers than ``length``, or counts of another length.
        ConfigError: ``length`` below 2, or ``top`` below 1.

    Source: after n-gram analyses of routing paths; definitions here are derived. What it does not show: that a path is
    a circuit: tokens that are alike go alike at each layer on their own.
    """
    length, top = check_whole(length, "length", 2), check_whole(top, "top", 1)
    layers = getattr(source, "layers", range(length))  # what has no layers is refused as no source
    if len(layers) < length:
        raise DataError(f"{len(layers)} layers", f"at least {length}", "Record more layers, or take shorter paths.")
    found = counted(source, "paths", path_length=length)
    if found.path_length != length:
        raise DataError(
            f"counts of paths of {found.path_length} layers",
            f"of {length}",
            "Count with path_length, or ask for those.",
        )
    codes, counts = found.sparse("paths")
    steps = []
    for _ in range(length):
        codes, step = np.divmod(codes, found.n_experts)
        steps.append(step)
    paths = np.stack(steps[::-1], axis=1)
    windows = len(found.layers) - length + 1
    rows = [_window(paths[codes == w], counts[codes == w], found.n_experts, top) for w in range(windows)]
    dims = {"path": ("layer", "rank", "step")} | dict.fromkeys(
        ("count", "share", "expected", "cluster"), ("layer", "rank")
    )
    data = {name: (dims.get(name, ("layer",)), np.stack([row[name] for row in rows])) for name in rows[0]}
    coords = {"layer": list(found.layers[:windows]), "rank": np.arange(1, top + 1), "step": np.arange(length)}
    return xr.Dataset(data, coords=coords, attrs={"length": length})


def _window(
    paths: NDArray[np.int64], counts: NDArray[np.int64], n_experts: int, top: int
) -> dict[str, NDArray[np.generic]]:
    """The measures of one window."""
    total = counts.sum()
    order = np.argsort(-counts, kind="stable")[:top]
    use = [ratio(np.bincount(s, weights=counts, minlength=n_experts), total) for s in paths.T]
    listed, share = paths[order], ratio(counts[order], total)
    expected = np.prod([u[step] for u, step in zip(use, listed.T)], axis=0)
    room = top - len(order)
    joint = ratio(counts, total)
    information = sum(_nats(u) for u in use) - _nats(joint) if total else np.nan
    return {
        "path": np.pad(listed, ((0, room), (0, 0)), constant_values=-1),
        "count": np.pad(counts[order], (0, room)),
        "share": np.pad(share, (0, room), constant_values=np.nan),
        "expected": np.pad(np.atleast_1d(expected), (0, room), constant_values=np.nan),
        "cluster": np.pad(path_clusters(listed), (0, room), constant_values=-1),
        "covered": np.asarray(share.sum() if total else np.nan),
        "covered_expected": np.asarray(_largest_products(use, top).sum() if total else np.nan),
        "distinct": np.asarray(len(counts)),
        "information": np.asarray(information),
        "tokens": np.asarray(total),
    }


def path_clusters(paths: NDArray[np.int64], most_different: int = 1) -> NDArray[np.int64]:
    """``[path]`` the cluster of each, numbered by first appearance; its paths differ pairwise in few layers at most.

    Complete linkage on the number of layers at which two paths differ.
    """
    if len(paths) < 2:
        return np.zeros(len(paths), dtype=np.int64)
    apart = (paths[:, None] != paths[None]).sum(axis=2)
    found = fcluster(linkage(apart[np.triu_indices(len(paths), 1)], "complete"), most_different, "distance")
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _largest_products(use: list[FloatArray], top: int) -> FloatArray:
    """The largest products of one share from each list: after each step the largest so far suffice."""
    products: FloatArray = np.ones(1)
    for share in use:
        products = np.sort((products[:, None] * share).ravel())[::-1][:top]
    return products


def _nats(p: FloatArray) -> float:
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum())
