"""The five findings of "The Myth of Expert Specialization in MoEs", each with what this run says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from moe_interp import stats

NEAR_IDENTICAL = 0.8  # Jaccard@p of unrelated inputs in deep layers (derived)
SAME_AS_CHANCE = 0.1  # excess overlap of a token with itself that is next to none (derived)
ALIKE = 0.1  # two overlaps that differ by less are the same (derived)
ALPHA = 0.05
CONFIRMED, REFUTED, OPEN = "confirmed", "not confirmed", "not shown"
WORDS = {"above": CONFIRMED, "below": REFUTED, "within": REFUTED, "open": OPEN}
COLUMNS = ["finding", "verdict", "estimate", "low", "high", "measure"]


def findings(data: xr.Dataset) -> pd.DataFrame:
    """A row a finding.

    Rules (derived): a verdict is of an interval over sequences, by :func:`moe_interp.stats.decide`.

    1. Similar states route alike: the mean correlation over layers, sequence level, is above 0, and Mantel's joint
       p is at most .05.
    2. The router reads the shared direction less than a random one: mean log ratio over layers below 0. That balancing
       the load is the cause, one model cannot show.
    3. Two models overlap on one question as one model does on two: difference within .1, and the overlap above chance.
    4. Deep layers (the last third) use near-identical experts on unrelated inputs: Jaccard@p above .8, and above that
       of random sets of these sizes.
    5. The same token across contexts overlaps in the first layer only: more than different tokens do in the first MoE
       layer, and by less than .1 in the mean of the later ones.
    """
    rows = [_alike(data), _suppressed(data), _two_models(data), _deep(data), _first_layer(data)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(finding: str, verdict: str, values: Any, measure: str) -> dict[str, Any]:
    estimate, low, high = (float(v) for v in values)
    return {
        "finding": finding,
        "verdict": verdict,
        "estimate": estimate,
        "low": low,
        "high": high,
        "measure": measure,
    }


def _said(decision: str, n: int) -> str:
    return WORDS.get(decision, f"not testable: too few sequences to say (n = {n})")


def _not_testable(finding: str, reason: str) -> dict[str, Any]:
    return _row(finding, f"not testable: {reason}", (np.nan,) * 3, "")


def _alike(data: xr.Dataset) -> dict[str, Any]:
    found = data.sel(level="sequence")
    low, high = float(found["mean_correlation_low"]), float(found["mean_correlation_high"])
    p, n = float(found["mean_mantel_p"]), _n(data)
    values = (float(found["mean_correlation"]), low, high)
    verdict = _said(stats.decide(low, high, n=n, p=p, alpha=ALPHA), n)
    measure = f"mean correlation over layers (Mantel's p = {p:.2g}) of sequences' routes and states"
    return _row("Similar states route alike", verdict, values, measure)


def _suppressed(data: xr.Dataset) -> dict[str, Any]:
    finding = "The router suppresses the shared direction"
    if "mean_suppression" not in data:
        return _not_testable(finding, "the routers' weights are not known")
    estimate, low, high = data["mean_suppression"].values
    decision = stats.decide(-high, -low, n=_n(data))
    measure = "gain along it, as a share of that along a random direction, geometric mean over layers,"
    return _row(finding, _said(decision, _n(data)), np.exp([estimate, low, high]), measure)


def _two_models(data: xr.Dataset) -> dict[str, Any]:
    finding = "Two models on one question overlap as one model on two questions"
    if "answer_mean_same" not in data:
        reason = "needs the trace of a second model on the same sequences"
        if "overlap" in data:
            reason += f"; this one on two unrelated ones overlaps {float(data['overlap'].mean()):.2f}"
        return _not_testable(finding, reason)
    value, low, high = (float(data[f"answer_same_beyond_other{s}"]) for s in ("", "_low", "_high"))
    alike = stats.decide(low, high, n=_n(data), margin=ALIKE)
    same = float(data["answer_mean_same_low"]), float(data["answer_mean_same_high"])
    beyond = stats.decide(*same, n=_n(data), null=float(data["answer_mean_chance"]))
    if "too few" in (alike, beyond):
        verdict = _said("too few", _n(data))
    elif alike == "within":
        verdict = CONFIRMED if beyond == "above" else OPEN
    else:
        verdict = OPEN if alike == "open" else REFUTED
    measure = (
        f"overlap {float(data['answer_mean_same']):.2f} of two models ({data.attrs.get('answer_matching')} matching), "
        f"{float(data['answer_mean_other']):.2f} of one on two, {float(data['answer_mean_chance']):.2f} by chance; "
        "difference"
    )
    return _row(finding, verdict, (value, low, high), measure)


def _deep(data: xr.Dataset) -> dict[str, Any]:
    finding = "Deep layers use near-identical experts on unrelated inputs"
    n = _n(data)
    if data.sizes["layer"] < 3:
        return _not_testable(finding, f"{data.sizes['layer']} layers, of which none is deep")
    estimate, low, high = data["deep"].values
    near = stats.decide(low, high, n=n, null=NEAR_IDENTICAL)
    chance = stats.decide(*data["deep_beyond_chance"].values[1:], n=n)
    decision = near if near != "above" or chance == "above" else "open"
    by_chance = estimate - float(data["deep_beyond_chance"].values[0])
    deepening = data["deepening"].values
    measure = (
        f"Jaccard@{data.attrs['p']:g} in the last third of layers ({by_chance:.2f} for random sets of these sizes; "
        f"{deepening[0]:+.2f} against the first third)"
    )
    return _row(finding, _said(decision, n), (estimate, low, high), measure)


def _first_layer(data: xr.Dataset) -> dict[str, Any]:
    finding = "The same token across contexts overlaps only in the first layer"
    if "later_excess" not in data:
        few = "one layer" if data.sizes["layer"] < 2 else "too few tokens occur in several contexts"
        return _not_testable(finding, few)
    n = _n(data)
    first = [float(data[f"same_token_excess{s}"][0]) for s in ("", "_low", "_high")]
    estimate, low, high = (float(v) for v in data["later_excess"].values)
    in_first = stats.decide(first[1], first[2], n=n)
    later = stats.decide(low, high, n=n, margin=SAME_AS_CHANCE)
    if "too few" in (in_first, later):
        verdict = _said("too few", n)
    elif in_first == "above" and later in ("within", "below"):
        verdict = CONFIRMED
    elif in_first == "below" or low > SAME_AS_CHANCE:
        verdict = REFUTED
    else:
        verdict = OPEN
    measure = f"overlap beyond that of different tokens {first[0]:.2f} in the first layer; in the later ones"
    return _row(finding, verdict, (estimate, low, high), measure)


def _n(data: xr.Dataset) -> int:
    return int(data.attrs["n_sequences"])
