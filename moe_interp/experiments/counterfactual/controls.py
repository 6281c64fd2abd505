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
from moe_interp.experiments.counterfactual.confidence import (
    CLASSES,
    By,
    Codes,
    check_thresholds,
    check_way,
    classes,
    confidence,
    fresh_mean,
)
from moe_interp.experiments.counterfactual.data import sequence_codes
from moe_interp.experiments.counterfactual.tables import common_size, compared_size, interval_verdict, tally
from moe_interp.stats.checks import FloatArray

# bins of the target's log-probability under the standard route, to compare realized and drawn targets at equal ones
EDGES = -np.concatenate([np.arange(20, 0.9, -0.5), [0.7, 0.4, 0.2, 0.1, 0.03, 0.01, 0.003]])
SHOWN = ("gap", "regret", "router_gap", "router_regret", "excess_gap", "excess_regret")


@dataclass(frozen=True, eq=False)
class _Side:
    """One side of a comparison: best-of-m ``[size, token, layer]``, each cell's class ``[token, layer]`` (-1: none) and
    bin."""

    best: stats.BestOf
    codes: Codes
    bins: Codes | None = None


@dataclass(frozen=True, eq=False)
class _Kind:
    """Cells in which nothing is to be gained, and the run's own on the same; ``share`` is what a cell counts."""

    own: _Side
    router: _Side
    share: FloatArray | float = 1.0


def controls(
    data: xr.Dataset,
    by: By | None = None,
    thresholds: tuple[float, float] = (0.5, 0.9),
    n_distinct: int | None = None,
) -> pd.DataFrame:
    """Gap and regret of the router's routes beside those that no better route could explain.

    Rows (``kind``), all at the first m distinct routes in drawn order, of tokens that have as many:

    - "router": the run's own routes against the standard one.
    - "random": uniform sets of experts instead of the router's.
    - "own_prediction": the same routes, but the next token drawn from the model's own prediction instead of the
      realized one, within bins of its log-probability under the standard route, weighted as the realized ones. Where
      the model's prediction is calibrated this equals the run's own. Where it is not, the two differ although no route
      is better than another: realized tokens of one p under the standard route then have another p under the others
      than drawn ones have. So an excess is no misrouting by itself;
      :func:`.prediction_calibration.prediction_calibration` measures how far the prediction is
      from calibrated. Bins that a drawn token never falls into are left out of both.
    - "fresh_draw": the standard route r0 and a freshly drawn one f change places. f is the first route of the second
      draw that is not r0; with A the first m - 1 routes of the main draw other than f, the row is the best of r0 and A
      against f, and the run's own beside it the best of f and A against r0. Each token counts by the share of the
      second draw's first draws that were not r0. Were r0 a draw of the sampler itself, whatever utility has to do with
      the router, P(r0 = a) P(f = b | r0 = a) P(a draw is not a) = P(a) P(b) would be symmetric, and both sides equal in
      expectation (exactly so where no route was heated). By class "resampled" or "entropy", both are classed by the
      second draw's other routes; by "standard", each by its own p.
    - "null": the standard route through the same machinery against itself in the plain forward: the noise of **one**
      alternative, not of the best of m.

    Args:
        data: Dataset of a run, with its controls; rows without data are left out.
        by: Also by class of confidence, in one of the ways of :func:`by_confidence`.
        thresholds, n_distinct: See :func:`by_confidence`.

    Returns:
        A row a kind (and class): n_cells and n_sequences that enter, n_distinct, n_unclassed (cells with m routes but
        without a class), matched (the share of the tokens' weight that is compared), gap (probability) and regret
        (nats), the run's own on the same tokens (router_gap, router_regret), and the excess ``router - kind``
        (excess_gap, excess_regret), each with ``_low`` and ``_high`` (95%, over sequences; the excess as one;
        :func:`moe_interp.stats.cluster_interval`), and verdict: of excess_regret, by :func:`moe_interp.stats.verdict`;
        none for "router" and "null", and "none by itself" for "own_prediction".

    Source: derived. An excess over "own_prediction" speaks of this data, not of what training would reach.
    """
    size = compared_size(data, n_distinct)
    names = ("all",) if by is None else CLASSES
    kinds = _kinds(data, by, check_thresholds(thresholds), [size])
    found = _compared(data, kinds, len(names))
    rows = []
    for k, (kind, items) in enumerate(kinds.items()):
        is_there = ~np.isnan(items.own.best.regret[-1])
        for g, name in enumerate(names):
            row: dict[str, Any] = {"kind": kind} | ({} if by is None else {"class": name})
            row |= {"n_cells": found.n_cells[k, 0, g], "n_sequences": found.n_sequences[k, 0, g], "n_distinct": size}
            row["n_unclassed"] = int((is_there & (items.own.codes < 0)).sum())
            row["matched"] = float(found.interval.estimate[k, 0, g, len(SHOWN)])
            rows.append(row | found.shown((k, 0, g), SHOWN) | {"verdict": _verdict(kind, found, (k, 0, g))})
    return pd.DataFrame(rows)


def _verdict(kind: str, found: _Compared, at: tuple[int, int, int]) -> str:
    """Whether the run's own regret is larger or smaller than a control's."""
    if kind in ("router", "null"):
        return ""
    if kind == "own_prediction":
        return "none by itself"  # it may be the prediction that is not calibrated
    return interval_verdict(found.interval, (*at, SHOWN.index("excess_regret")))


def regret_curve(data: xr.Dataset) -> pd.DataFrame:
    """Regret against the number of distinct routes, for the kinds of :func:`controls`.

    Returns:
        A row for each n (1, 2, 4, ... and the number that 95% of the tokens have) and kind: regret in nats with the
        first n routes drawn, which is what a run with ``n_routes=n`` gives, and router_regret, the run's own on the
        tokens that this kind compares ("own_prediction" and "fresh_draw" leave some out, or count them less), each with
        ``_low`` and ``_high``; matched as in :func:`controls`. The same tokens at every n.
    """
    most = common_size(data)
    sizes = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    kinds = _kinds(data, None, (0.5, 0.9), sizes)
    found = _compared(data, kinds, 1)
    rows = []
    for s, n in enumerate(sizes):
        for k, kind in enumerate(kinds):
            values = found.shown((k, s, 0), SHOWN)
            row: dict[str, Any] = {"n": n, "kind": kind, "regret": values["regret"]}
            row |= {"low": values["regret_low"], "high": values["regret_high"]}
            row |= {name: value for name, value in values.items() if name.startswith("router_regret")}
            row |= {"matched": float(found.interval.estimate[k, s, 0, len(SHOWN)])}
            rows.append(row | {"n_sequences": found.n_sequences[k, s, 0]})
    return pd.DataFrame(rows)


def _kinds(data: xr.Dataset, by: By | None, thresholds: tuple[float, float], sizes: Sequence[int]) -> dict[str, _Kind]:
    """The kinds that the run has data for; the last size decides which cells count, at all sizes alike."""
    if by is not None:
        check_way(data, by)
    logp, level = _values(data, "logp"), _values(data, "logp_null")
    codes = np.zeros(level.shape, np.int64) if by is None else classes(confidence(data, by), thresholds)
    best = stats.best_of(logp, level, sizes)
    router = _Side(best, codes)
    kinds = {"router": _Kind(router, router)}
    if "logp_random" in data:
        kinds["random"] = _Kind(_Side(stats.best_of(_values(data, "logp_random"), level, sizes), codes), router)
    if "logp_own" in data:
        kinds["own_prediction"] = _own_prediction(data, by, thresholds, sizes, router)
    if "logp_second" in data:
        kinds["fresh_draw"] = _fresh_draw(data, by, thresholds, sizes, codes)
    plain = np.broadcast_to(_values(data, "logp_standard")[:, None], level.shape)
    null = stats.best_of(np.repeat(level[..., None], max(sizes), axis=-1), plain, sizes)
    kinds["null"] = _Kind(_Side(null, codes), router)
    return kinds


def _own_prediction(
    data: xr.Dataset, by: By | None, thresholds: tuple[float, float], sizes: Sequence[int], router: _Side
) -> _Kind:
    """Cells with the drawn target, classed as if it were the realized one."""
    level = _values(data, "logp_own_null")
    if by == "standard":
        plain = np.broadcast_to(_values(data, "logp_own_standard")[:, None], level.shape)
        codes = classes(np.exp(plain), thresholds)
    else:
        # without a class, or by entropy, in which no target enters
        codes = classes(fresh_mean(data, "logp_own_second"), thresholds) if by == "resampled" else router.codes
    own = _Side(stats.best_of(_values(data, "logp_own"), level, sizes), codes, np.searchsorted(EDGES, level))
    return _Kind(own, _Side(router.best, router.codes, np.searchsorted(EDGES, _values(data, "logp_null"))))


def _fresh_draw(
    data: xr.Dataset, by: By | None, thresholds: tuple[float, float], sizes: Sequence[int], codes: Codes
) -> _Kind:
    """The standard route and the first other one of the second draw in each other's place."""
    logp, level, fresh = _values(data, "logp"), _values(data, "logp_null"), _values(data, "logp_second")[..., 0]
    is_itself = np.arange(logp.shape[-1]) == data["second_route"].values[..., :1]
    rest = np.where(is_itself, np.nan, logp)
    share = np.where(np.isnan(fresh), 0.0, _values(data, "second_share"))
    short = (~np.isnan(logp)).sum(-1) < max(sizes)
    ours, fixed_level = np.where(short, np.nan, fresh), np.where(short, np.nan, level)
    router = stats.best_of(np.concatenate([ours[..., None], rest], axis=-1), level, sizes)
    own = stats.best_of(
        np.concatenate([fixed_level[..., None], rest], axis=-1), np.where(np.isnan(fresh), level, fresh), sizes
    )
    if by == "resampled":
        codes = classes(fresh_mean(data, "logp_second", first=1), thresholds)
    own_codes = classes(np.exp(fresh), thresholds) if by == "standard" else codes
    return _Kind(_Side(own, own_codes), _Side(router, codes), share)


@dataclass(frozen=True, eq=False)
class _Compared:
    """``interval``: of SHOWN and the matched share, ``[kind, size, group, measure]``; counts of what enters, but for
    the last axis."""

    interval: stats.Interval
    n_cells: NDArray[np.int64]
    n_sequences: NDArray[np.int64]

    def shown(self, at: tuple[int, ...], names: Sequence[str]) -> dict[str, float]:
        """Each measure with its interval."""
        row: dict[str, float] = {}
        for i, name in enumerate(names):
            least = 0.0 if name.removeprefix("router_") == "regret" else -np.inf
            row[name] = float(self.interval.estimate[*at, i])
            row[f"{name}_low"] = float(np.maximum(self.interval.low[*at, i], least))
            row[f"{name}_high"] = float(self.interval.high[*at, i])
        return row


def _compared(data: xr.Dataset, kinds: dict[str, _Kind], n_groups: int) -> _Compared:
    """All kinds against the run's own on the same tokens."""
    sequence = sequence_codes(data)
    # [sequence, size, group, bin, (weight, gap, regret, cells that count, cells)]
    sums = [_sums(side, kind, sequence, n_groups) for kind in kinds.values() for side in (kind.own, kind.router)]

    def statistic(*totals: FloatArray) -> FloatArray:
        rows = [np.concatenate(_matched(own, router), axis=-1) for own, router in zip(totals[::2], totals[1::2])]
        return np.stack(rows, axis=1)

    # shape: (sequence, size, group, bin, 5) -> (sequence, kind, size, group, 1)
    weights = [
        np.where(_is_both(own.sum(0), router.sum(0)), (own + router)[..., 0], 0.0).sum(-1)
        for own, router in zip(sums[::2], sums[1::2])
    ]
    found = stats.cluster_interval(sums, statistic, sizes=np.stack(weights, axis=1)[..., None])
    cells, sequences = [], []
    for own, router in zip(sums[::2], sums[1::2]):
        is_both = _is_both(own.sum(0), router.sum(0))
        cells.append(np.where(is_both, own[..., 3].sum(0), 0).sum(-1).round().astype(np.int64))
        there = [(np.where(is_both, side[..., 0], 0).sum(-1) > 0).sum(0) for side in (own, router)]
        sequences.append(np.minimum(*there))
    return _Compared(found, np.stack(cells), np.stack(sequences))


def _sums(side: _Side, kind: _Kind, sequence: Codes, n_groups: int) -> FloatArray:
    """``[sequence, size, group, bin, (weight, gap, regret, cells that count, cells)]``."""
    n_sequences = int(sequence.max()) + 1
    # fewer routes than compared, on either side: in no group
    is_short = np.isnan(kind.own.best.regret[-1]) | np.isnan(kind.router.best.regret[-1])
    codes = np.where(is_short, -1, side.codes)
    bins = np.zeros(codes.shape, np.int64) if side.bins is None else side.bins
    n_bins = 1 if side.bins is None else len(EDGES) + 1
    cell = np.where(codes >= 0, (sequence[:, None] * n_groups + codes) * n_bins + bins, -1)
    share = np.broadcast_to(kind.share, codes.shape)
    by_size = []
    for gap, regret in zip(side.best.gap, side.best.regret):
        values = [share, share * gap, share * regret, (share > 0).astype(np.float64), np.ones(codes.shape)]
        by_size.append(np.stack([tally(cell, v, n_sequences, n_groups * n_bins) for v in values], axis=-1))
    return np.stack(by_size, axis=1).reshape(n_sequences, len(by_size), n_groups, n_bins, 5)


def _is_both(own: FloatArray, router: FloatArray) -> NDArray[np.bool_]:
    """Bins in which both sides have something."""
    return np.asarray((own[..., 0] > 0) & (router[..., 0] > 0))


def _matched(own: FloatArray, router: FloatArray) -> tuple[FloatArray, ...]:
    """``[..., (gap, regret)]`` of the kind, of the run's own and of their difference, and the share ``[..., 1]`` of the
    run's cells that is compared: over the bins that both have, both weighted as the run's own."""
    is_both = _is_both(own, router)[..., None]
    weight = np.where(is_both, router[..., :1], 0.0)
    total = weight.sum(-2)
    value = np.where(is_both, weight * own[..., 1:3] / own[..., :1], 0.0).sum(-2) / total
    against = np.where(is_both, router[..., 1:3], 0.0).sum(-2) / total
    return value, against, against - value, total / router[..., 4:].sum(-2)


def _values(data: xr.Dataset, name: str) -> FloatArray:
    return data[name].values.astype(np.float64)
