"""Tables of a counterfactual run: gap, regret, positive rate, inclusion and alignment, by groups of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from moe_interp import stats
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.counterfactual.confidence import CLASSES, By, Codes, classes, confidence
from moe_interp.experiments.counterfactual.data import sequence_codes
from moe_interp.stats.checks import FloatArray

MEASURES = ("gap", "regret", "positive_rate", "inclusion_1", "inclusion_5", "alignment", "alignment_undefined")
UNINFORMATIVE = 0.1  # an alignment whose interval lies within +- this
ALIGNED: dict[str, Any] = {
    "words": ("aligned", "misaligned"),
    "undecided": "undecided",
    "margin": UNINFORMATIVE,
    "negligible": "uninformative",
}
DISTINGUISHABLE = 20.0  # routes of a token must differ by this many null differences to be ranked
DROPPED = 0.05  # share of the cells that may have fewer distinct routes than are compared
BOUNDS = {"gap": (-1.0, 1.0), "regret": (0.0, np.inf), "alignment": (-1.0, 1.0)}  # the others are shares
FEWEST_CELLS = 10  # the normal law of a mean of correlations needs as many


def by_confidence(
    data: xr.Dataset,
    by: By = "resampled",
    thresholds: tuple[float, float] = (0.5, 0.9),
    layer: int | None = None,
    n_distinct: int | None = None,
) -> pd.DataFrame:
    """Measures by class of confidence, over tokens and layers (or at one layer).

    For a token at a layer, with u(r) = p(next token | route r), r0 its standard route, and the first m other distinct
    routes that the sampler drew: gap = max u(r) - u(r0) (probability); regret = max(0, CE(r0) - min CE(r)) (nats);
    positive_rate = P(CE(r0) - min CE(r) > d); inclusion_K = P(fewer than K of the m have CE(r0) - CE(r) > d).
    u(r0) is scored by the same machinery as the others, and d is 20 null-route differences (that of the token, or
    its layer's median where that is larger): a better route is one that is so by more than noise. alignment = Spearman
    of the router's log-probability of a route (the sum over its experts) and u, over r0 and all routes of the token
    (derived); undefined where these differ by less than d.

    Args:
        data: Dataset of the run.
        by: "resampled", "standard" (published) or "entropy": :func:`.confidence.confidence`.
        thresholds: Fragile below the first, confident from the second on.
        layer: One layer, counted from the end of the run's where negative; all by default.
        n_distinct: m; by default the largest number that at least 95% of the tokens have.

    Returns:
        A row for each class: n_cells (token x layer), n_tokens, n_sequences, n_distinct (m), n_dropped (cells of the
        class with fewer routes, left out), n_unclassed (cells without a class, the same in each row: "resampled" and
        "entropy" need routes of the second draw that the main one lacks), each measure with ``_low`` and ``_high``
        (95%, :func:`moe_interp.stats.cluster_interval` over sequences), alignment_p (two-sided, log-policy permuted
        among a token's routes: the exact variance 1 / (n - 1) of a rho over n routes, normal approximation for their
        mean; NaN below 10 defined alignments) and verdict (:func:`moe_interp.stats.verdict`): "uninformative" where the
        interval of alignment is inside +-.1 (also where it excludes 0), "aligned" or "misaligned" where it excludes 0,
        "too few sequences to say" where no interval covers, else "undecided".

    Source: "When Are Experts Misrouted?"; equal numbers, alignment and the classes but "standard" are derived. Gap and
    regret are best-of-m: they are positive also where no route is really better; see :func:`controls`.
    """
    codes, label = classes(confidence(data, by), thresholds), check_layer(data, layer)
    is_wanted = np.broadcast_to((label is None) | (data["layer"].values == label), codes.shape)
    table = grouped(data, np.where(is_wanted, codes, -1), CLASSES, "class", n_distinct)
    table.insert(table.columns.tolist().index("n_dropped") + 1, "n_unclassed", int((is_wanted & (codes < 0)).sum()))
    return table


def by_layer(data: xr.Dataset, n_distinct: int | None = None) -> pd.DataFrame:
    """The measures of :func:`by_confidence` for each layer."""
    layers = data["layer"].values
    codes = np.broadcast_to(np.arange(len(layers)), (data.sizes["token"], len(layers)))
    return grouped(data, codes, layers.tolist(), "layer", n_distinct)


def by_token_type(data: xr.Dataset, n_distinct: int | None = None) -> pd.DataFrame:
    """The measures of :func:`by_confidence` by the kind of the predicted token: word, number, punctuation, ..."""
    if "token_type" not in data.coords:
        raise DataError("tokens without the coordinate 'token_type'", "token_type(token)", "Label every token with it.")
    names, codes = np.unique(data["token_type"].values.astype(str), return_inverse=True)
    return grouped(data, _over_layers(data, codes), names.tolist(), "token_type", n_distinct)


def by_position(data: xr.Dataset, n_distinct: int | None = None) -> pd.DataFrame:
    """The measures of :func:`by_confidence` by the predicting position: 0, 1-3, 4-15, 16-63, ... in its sequence."""
    bins = np.floor(np.log2(np.maximum(data["pos"].values, 0.5)) / 2).astype(np.int64) + 1  # -1/2 -> 0
    present = np.unique(bins)
    names = ["0" if b == 0 else f"{4 ** (b - 1)}-{4**b - 1}" for b in present.tolist()]
    return grouped(data, _over_layers(data, np.searchsorted(present, bins)), names, "positions", n_distinct)


def grouped(
    data: xr.Dataset, codes: Codes, names: Sequence[Any], key: str, n_distinct: int | None = None
) -> pd.DataFrame:
    """The measures for groups ``codes[token, layer]`` (-1: in none); the columns of :func:`by_confidence`."""
    size = compared_size(data, n_distinct)
    values, rho, n_routes = _measures(data, size)
    is_short = (~np.isnan(data["logp"].values)).sum(-1) < size
    used = np.where(is_short, -1, codes)
    sequences, n_sequences = sequence_codes(data), len(np.unique(data["sequence"].values))
    cell = np.where(used >= 0, np.broadcast_to(sequences[:, None], used.shape) * len(names) + used, -1)
    totals = [tally(cell, v, n_sequences, len(names)) for v in values]
    counts = [tally(cell, np.where(np.isnan(v), np.nan, 1.0), n_sequences, len(names)) for v in values]
    found = stats.cluster_interval([np.stack(totals, -1), np.stack(counts, -1)], lambda value, n: value / n)
    present = tally(cell, np.ones(cell.shape), n_sequences, len(names))
    rows = []
    for g, name in enumerate(names):
        inside = used == g
        row: dict[str, Any] = {
            key: name,
            "n_cells": int(inside.sum()),
            "n_tokens": int(inside.any(-1).sum()),
            "n_sequences": int((present[:, g] > 0).sum()),
            "n_distinct": size,
            "n_dropped": int((is_short & (codes == g)).sum()),
        }
        for i, measure in enumerate(MEASURES):
            row |= _with_interval(measure, found, (g, i))
        row["alignment_p"] = permutation_p(rho[inside], n_routes[inside])
        row["verdict"] = interval_verdict(found, (g, MEASURES.index("alignment")), **ALIGNED)
        rows.append(row)
    return pd.DataFrame(rows)


def tally(cell: Codes, values: FloatArray, n_sequences: int, n_groups: int) -> FloatArray:
    """``[sequence, group]`` sums of the values (NaN left out) of cells numbered ``sequence * n_groups + group``."""
    is_used = (cell >= 0) & ~np.isnan(values)
    summed: FloatArray = np.zeros(n_sequences * n_groups)
    np.add.at(summed, cell[is_used], values[is_used])
    return summed.reshape(n_sequences, n_groups)


def compared_size(data: xr.Dataset, n_distinct: int | None = None) -> int:
    """How many routes to compare at: ``n_distinct``, refused where no cell has as many, or the common size."""
    checked = check_size(data, n_distinct)
    return common_size(data) if checked is None else checked


def check_size(data: xr.Dataset, n_distinct: Any) -> int | None:
    """Refuse a number of routes that is none, or that no token has."""
    if n_distinct is None:
        return None
    most = int((~np.isnan(data["logp"].values)).sum(-1).max())
    is_whole = isinstance(n_distinct, Integral) and not isinstance(n_distinct, bool)
    if not is_whole or not 1 <= int(n_distinct) <= most:
        given, expected = f"n_distinct={n_distinct!r}", f"a whole number from 1 to the {most} that a token has"
        raise ConfigError(given, expected, "Correct it, or leave it out.")
    return int(n_distinct)


def check_layer(data: xr.Dataset, layer: Any) -> int | None:
    """The label of a layer of the run, which may be counted from the end."""
    if layer is None:
        return None
    layers = data["layer"].values.tolist()
    if isinstance(layer, Integral) and not isinstance(layer, bool):
        if layer in layers:
            return int(layer)
        if -len(layers) <= int(layer) < 0:
            return int(layers[int(layer)])
    expected = f"one of {layers}, or from -1 to -{len(layers)} from the end"
    raise ConfigError(f"layer {layer!r}", expected, "Choose a layer of this run.")


def common_size(data: xr.Dataset) -> int:
    """The largest number of distinct routes that at least 95% of the cells (token x layer) have."""
    counts = np.sort((~np.isnan(data["logp"].values)).sum(-1).ravel())
    return max(int(counts[int(DROPPED * len(counts))]), 1)


def alignment(data: xr.Dataset) -> tuple[FloatArray, NDArray[np.int64]]:
    """Spearman of the router's log-probability and utility within each token, ``[token, layer]`` (NaN where undefined),
    and the number of routes in it, the standard one included."""
    # the null route stands for the standard one: it went through the same machinery as the others
    utility = np.concatenate([data["logp"].values, data["logp_null"].values[..., None]], -1).astype(np.float64)
    router = np.concatenate([data["router_logp"].values, data["router_logp_standard"].values[..., None]], -1)
    spread = np.nanmax(utility, axis=-1) - np.nanmin(utility, axis=-1)
    found = stats.spearman(router, utility)
    is_defined = (spread >= noise(data)) & (found.n >= 3)  # equal utilities have no rho
    return np.where(is_defined, found.rho, np.nan), found.n


def noise(data: xr.Dataset) -> FloatArray:
    """``[token, layer]``: what utilities must differ by, in nats, to be told apart: 20 differences between the standard
    route's two scores, the token's own or its layer's median where that is larger."""
    distance = np.abs(data["logp_null"].values.astype(np.float64) - data["logp_standard"].values[:, None])
    return DISTINGUISHABLE * np.maximum(distance, np.median(distance, axis=0))


def permutation_p(rho: FloatArray, n: NDArray[np.int64]) -> float:
    """Two-sided p of a mean of Spearman correlations, each side permuted within its token.

    Under that null each rho has mean 0 and variance 1 / (n - 1), with ties too, independently of the others; their mean
    is taken as normal, and NaN is returned for fewer than 10. It says that routes of a token differ in a way the router
    knows of, not by how much.
    """
    is_defined = ~np.isnan(rho)
    if is_defined.sum() < FEWEST_CELLS:
        return float("nan")
    z = rho[is_defined].sum() / np.sqrt((1 / (n[is_defined] - 1)).sum())
    return float(2 * scipy_stats.norm.sf(abs(z)))


def interval_verdict(found: stats.Interval, at: tuple[int, ...], **words: Any) -> str:
    """What one of the intervals says, by :func:`moe_interp.stats.verdict`."""
    assert found.n is not None
    low, high, covered = float(found.low[at]), float(found.high[at]), float(found.attained[at])
    return stats.verdict(low, high, n=int(found.n[at]), coverage=covered, units="sequences", **words)


def token_table(data: xr.Dataset) -> pd.DataFrame:
    """One row a token and layer: where it is, its text and target, and its standard and best routes.

    p_standard and p_best are the target's probabilities under the standard (in the plain forward) and the best of all
    scored routes; gap and regret as in :func:`by_confidence`, but over all routes of the token: optimistic, and not
    comparable between tokens with different numbers of routes (n_distinct).
    """
    logp = data["logp"].values.astype(np.float64)
    n = (~np.isnan(logp)).sum(-1)
    best = np.argmax(np.where(np.isnan(logp), -np.inf, logp), axis=-1)
    top = np.take_along_axis(logp, best[..., None], -1)[..., 0]
    standard = np.broadcast_to(data["logp_standard"].values[:, None], top.shape)
    level = data["logp_null"].values.astype(np.float64)
    routes = np.take_along_axis(data["route"].values, best[..., None, None], 2)[:, :, 0]
    shape = top.shape
    per_token = ("sequence", "pos", "token_text", "target_text", "token_type")
    columns = {name: np.repeat(data[name].values, shape[1]) for name in per_token if name in data.coords}
    columns["layer"] = np.tile(data["layer"].values, shape[0])
    columns |= {
        "p_standard": np.exp(standard).ravel(),
        "p_best": np.exp(top).ravel(),
        "gap": (np.exp(top) - np.exp(level)).ravel(),
        "regret": np.where(np.isnan(top), np.nan, np.maximum(top - level, 0)).ravel(),
        "n_distinct": n.ravel(),
        "standard_route": _as_text(data["standard_route"].values.reshape(-1, data.sizes["slot"])),
        "best_route": _as_text(routes.reshape(-1, data.sizes["slot"])),
    }
    return pd.DataFrame(columns)


def _measures(data: xr.Dataset, size: int) -> tuple[list[FloatArray], FloatArray, NDArray[np.int64]]:
    """``MEASURES`` of every cell ``[token, layer]``, the alignments, and the numbers of routes in these."""
    logp = data["logp"].values.astype(np.float64)
    level, margin = data["logp_null"].values.astype(np.float64), noise(data)
    best = stats.best_of(logp, level, [size], margin)
    rho, n = alignment(data)
    top = [stats.in_top(logp, level, size, k, margin) for k in (1, 5)]
    return [best.gap[0], best.regret[0], best.positive[0], *top, rho, np.isnan(rho).astype(np.float64)], rho, n


def _with_interval(name: str, found: stats.Interval, at: tuple[int, int]) -> dict[str, float]:
    low, high = np.clip([found.low[at], found.high[at]], *BOUNDS.get(name, (0.0, 1.0))).tolist()
    return {name: float(found.estimate[at]), f"{name}_low": low, f"{name}_high": high}


def _over_layers(data: xr.Dataset, codes: Codes) -> Codes:
    codes = codes.astype(np.int64)
    return np.broadcast_to(codes[:, None], (data.sizes["token"], data.sizes["layer"]))


def _as_text(routes: NDArray[Any]) -> NDArray[Any]:
    """Expert ids of each ``[row, slot]``, in order of rank; empty for no route."""
    return np.array([" ".join(str(expert) for expert in row if expert >= 0) for row in routes.tolist()])
