"""Controls of the best of many routes, which is optimistic by construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from moe_interp import stats
from moe_interp.errors import DataError
from moe_interp.experiments.confidence import CLASSES, By, Codes, check_way, classes, confidence, mean_probability
from moe_interp.experiments.counterfactual_data import sequence_codes
from moe_interp.experiments.counterfactual_tables import common_size, compared_size, tally

FloatArray = NDArray[np.float64]
KINDS = ("router", "random", "own_prediction", "fresh_draw", "null")
# bins of the target's log-probability under the standard route, to compare realized and drawn targets at equal ones
EDGES = -np.concatenate([np.arange(20, 0.9, -0.5), [0.7, 0.4, 0.2, 0.1, 0.03, 0.01, 0.003]])
_AT_ONCE = 2**21  # numbers in one array


@dataclass(frozen=True, eq=False)
class _Kind:
    """What one row is about: best-of-m of some items, each with its place ``[token, layer, ...]``.

    ``best`` is ``[size, token, layer, ...]``, ``codes`` the items' class (-1: none), ``share`` what an item counts.
    """

    best: stats.BestOf
    codes: Codes
    share: FloatArray | float = 1.0
    bins: Codes | None = None


def controls(
    data: xr.Dataset,
    by: By | None = None,
    thresholds: tuple[float, float] = (0.5, 0.9),
    n_distinct: int | None = None,
) -> pd.DataFrame:
    """Gap and regret of the router's routes beside those that no better route could explain.

    Rows (``kind``), all at m distinct routes:

    - "router": the run's own routes against the standard one.
    - "random": uniform sets of experts instead of the router's.
    - "own_prediction": the same routes, but the next token drawn from the model's own prediction instead of the
      realized one, within bins of its log-probability under the standard route, weighted as the realized ones. Were
      the model's prediction right, or the realized token unrelated to what routes do, this would equal "router".
      Bins that a drawn token never falls into are left out of both (``matched``: the share of the realized ones kept).
    - "fresh_draw": a route of a second draw takes the standard one's place (and the standard one takes its place among
      the alternatives, where it is one of them). Were the standard route exchangeable with the router's draws, this
      would equal "router"; by class, each such route is classed by the rest of its draw.
    - "null": the standard route through the same machinery as the only alternative: the noise floor.

    Args:
        data: Dataset of a run, with its controls; rows without data are left out.
        by: Also by class of confidence, in one of the ways of :func:`by_confidence`.
        thresholds, n_distinct: See :func:`by_confidence`.

    Returns:
        A row a kind (and class): n_cells, n_sequences, n_distinct, matched, gap (probability) and regret (nats), and
        their excesses ``router - kind`` (excess_gap, excess_regret), each with ``_low`` and ``_high`` (bootstrap over
        sequences, 95%; the excess is resampled as one).

    Source: derived. An excess over "own_prediction" speaks of this data, not of what training would reach.
    """
    size = compared_size(data, n_distinct)
    names = ("all",) if by is None else CLASSES
    kinds = _kinds(data, by, thresholds, [size], KINDS)
    found, counts, n_sequences = _compared(data, kinds, len(names))
    rows = []
    for k, kind in enumerate(kinds):
        for g, name in enumerate(names):
            row: dict[str, Any] = {"kind": kind} | ({} if by is None else {"class": name})
            row |= {"n_cells": round(counts[kind][g]), "n_sequences": n_sequences[kind][g], "n_distinct": size}
            row["matched"] = float(found.estimate[k, 0, g, 4])
            for i, measure in enumerate(("gap", "regret", "excess_gap", "excess_regret")):
                at = (k, 0, g, i)
                is_known = n_sequences[kind][g] > 1
                row[measure] = float(found.estimate[at])
                row[f"{measure}_low"] = float(found.low[at]) if is_known else float("nan")
                row[f"{measure}_high"] = float(found.high[at]) if is_known else float("nan")
            rows.append(row)
    return pd.DataFrame(rows)


def regret_curve(data: xr.Dataset) -> pd.DataFrame:
    """Regret against the number of distinct routes, for the kinds of :func:`controls`.

    Returns:
        A row for each n (1, 2, 4, ... and the number that 95% of the tokens have) and kind: regret in nats, the
        expectation of the best of n over a token's routes, with low and high; the same tokens at every n.
    """
    most = common_size(data)
    sizes = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    kinds = _kinds(data, None, (0.5, 0.9), sizes, KINDS)
    found, _, n_sequences = _compared(data, kinds, 1)
    rows = [
        {
            "n": n,
            "kind": kind,
            "regret": float(found.estimate[k, s, 0, 1]),
            "low": float(found.low[k, s, 0, 1]),
            "high": float(found.high[k, s, 0, 1]),
            "n_sequences": n_sequences[kind][0],
        }
        for s, n in enumerate(sizes)
        for k, kind in enumerate(kinds)
    ]
    return pd.DataFrame(rows)


def _kinds(
    data: xr.Dataset, by: By | None, thresholds: tuple[float, float], sizes: Sequence[int], wanted: Sequence[str]
) -> dict[str, _Kind]:
    """The kinds that the run has data for; the last size decides which cells count, at all sizes alike."""
    if by is not None:
        check_way(data, by)
    logp, standard = _values(data, "logp"), _values(data, "logp_standard")[:, None]
    shape = logp.shape[:2]
    standard = np.broadcast_to(standard, shape)
    codes = np.zeros(shape, np.int64) if by is None else classes(confidence(data, by), thresholds)
    kinds = {"router": _Kind(stats.best_of(logp, standard, sizes), codes, bins=np.searchsorted(EDGES, standard))}
    if "logp_random" in data:
        kinds["random"] = _Kind(stats.best_of(_values(data, "logp_random"), standard, sizes), codes)
    if "logp_own" in data:
        kinds["own_prediction"] = _own_prediction(data, by, thresholds, sizes)
    if "logp_second" in data:
        kinds["fresh_draw"] = _fresh_draw(data, by, thresholds, sizes, codes)
    null = stats.best_of(_values(data, "logp_null")[..., None], standard, [1])
    kinds["null"] = _Kind(stats.BestOf(*(np.repeat(part, len(sizes), axis=0) for part in vars(null).values())), codes)
    return {name: kinds[name] for name in wanted if name in kinds}


def _own_prediction(data: xr.Dataset, by: By | None, thresholds: tuple[float, float], sizes: Sequence[int]) -> _Kind:
    """Cells with the drawn target, classed as if it were the realized one."""
    logp = _values(data, "logp_own")
    standard = np.broadcast_to(_values(data, "logp_own_standard")[:, None], logp.shape[:2])
    if by is None:
        codes = np.zeros(standard.shape, np.int64)
    elif by == "entropy":
        codes = classes(confidence(data, by), thresholds)
    elif by == "standard":
        codes = classes(np.exp(standard), thresholds)
    elif "logp_own_second" in data:
        codes = classes(mean_probability(_values(data, "logp_own_second")), thresholds)
    else:
        raise DataError(
            "a run without logp_own_second", "the second draw's scores of the drawn target", "Repeat the run."
        )
    return _Kind(stats.best_of(logp, standard, sizes), codes, bins=np.searchsorted(EDGES, standard))


def _fresh_draw(
    data: xr.Dataset, by: By | None, thresholds: tuple[float, float], sizes: Sequence[int], codes: Codes
) -> _Kind:
    """Each route of the second draw as the standard one: items ``[token, layer, second]``."""
    second, same, logp = _values(data, "logp_second"), data["second_route"].values, _values(data, "logp")
    standard = np.broadcast_to(_values(data, "logp_standard")[:, None, None], second.shape)
    is_there = ~np.isnan(second)
    n = is_there.sum(-1, keepdims=True)
    parts: list[stats.BestOf] = []
    per_token = int(np.prod(second.shape[1:])) * logp.shape[-1]
    for part in np.array_split(np.arange(len(logp)), max(1, len(logp) * per_token // _AT_ONCE)):
        others = np.repeat(logp[part][:, :, None], second.shape[-1], axis=2)
        is_itself = np.arange(logp.shape[-1]) == same[part][..., None]
        others = np.where(is_itself, standard[part][..., None], others)
        parts.append(stats.best_of(others, np.where(is_there[part], second[part], 0.0), sizes))
    best = stats.BestOf(*(np.concatenate(values, axis=1) for values in zip(*(vars(p).values() for p in parts))))
    if by == "resampled":
        p = np.where(is_there, np.exp(second), 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            item_codes = classes((p.sum(-1, keepdims=True) - p) / (n - 1), thresholds)
    elif by == "standard":
        item_codes = classes(np.exp(second), thresholds)
    else:
        item_codes = np.broadcast_to(codes[..., None], second.shape)
    return _Kind(best, np.where(is_there, item_codes, -1), share=np.broadcast_to(1 / np.maximum(n, 1), second.shape))


def _compared(
    data: xr.Dataset, kinds: dict[str, _Kind], n_groups: int
) -> tuple[stats.Interval, dict[str, FloatArray], dict[str, list[int]]]:
    """``[kind, size, group, (gap, regret, their excesses, matched)]``; each kind's cells and sequences by group."""
    sequence = sequence_codes(data)
    n_sequences = int(sequence.max()) + 1
    # [sequence, size, group, bin, (count, gap, regret)]
    sums = {name: _sums(kind, sequence, n_sequences, n_groups) for name, kind in kinds.items()}
    names = list(sums)

    def statistic(*totals: FloatArray) -> FloatArray:
        by_name = dict(zip(names, totals))
        router = by_name["router"]
        whole = _mean(router.sum(-2))
        rows = []
        for name in names:
            value, against, share = _mean(by_name[name].sum(-2)), whole, np.ones((*whole.shape[:-1], 1))
            if name == "own_prediction":
                value, against, share = _matched(router, by_name[name])
            rows.append(np.concatenate([value, against - value, share], axis=-1))
        return np.stack(rows, axis=1)

    found = stats.cluster_bootstrap(list(sums.values()), statistic)
    cells = {name: s[:, -1, ..., 0].sum((0, -1)) for name, s in sums.items()}
    present = {name: (s[:, -1, ..., 0].sum(-1) > 0).sum(0).tolist() for name, s in sums.items()}
    return found, cells, present


def _sums(kind: _Kind, sequence: Codes, n_sequences: int, n_groups: int) -> FloatArray:
    """``[sequence, size, group, bin, (count, gap, regret)]``."""
    gap, regret = kind.best.gap, kind.best.regret
    codes = np.where(np.isnan(regret[-1]), -1, kind.codes)  # fewer routes than compared: in no group
    bins = np.zeros(codes.shape, np.int64) if kind.bins is None else kind.bins
    n_bins = 1 if kind.bins is None else len(EDGES) + 1
    owner = sequence.reshape(-1, *[1] * (codes.ndim - 1))
    cell = np.where(codes >= 0, (owner * n_groups + codes) * n_bins + bins, -1)
    share = np.broadcast_to(kind.share, codes.shape)
    by_size = [
        np.stack([tally(cell, v, n_sequences, n_groups * n_bins) for v in (share, share * g, share * r)], axis=-1)
        for g, r in zip(gap, regret)
    ]
    return np.stack(by_size, axis=1).reshape(n_sequences, len(gap), n_groups, n_bins, 3)


def _mean(sums: FloatArray) -> FloatArray:
    """``[..., (count, gap, regret)]`` to means ``[..., (gap, regret)]``."""
    return sums[..., 1:] / sums[..., :1]


def _matched(router: FloatArray, own: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Means of the drawn target weighted as the realized ones by bin, the router's over the bins that have both, and
    the share of the realized ones that lie in these."""
    has_both = (own[..., :1] > 0) & (router[..., :1] > 0)
    weight = np.where(has_both, router[..., :1], 0.0)
    total = weight.sum(-2)
    value = np.where(has_both, weight * own[..., 1:] / own[..., :1], 0.0).sum(-2) / total
    against = np.where(has_both, router[..., 1:], 0.0).sum(-2) / total
    return value, against, total / router[..., :1].sum(-2)


def _values(data: xr.Dataset, name: str) -> FloatArray:
    return data[name].values.astype(np.float64)
