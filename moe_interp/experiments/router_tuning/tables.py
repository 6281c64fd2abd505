"""Tables of a tuning run, each number with its interval over sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from moe_interp import stats
from moe_interp.experiments.router_tuning.data import HELD_OUT
from moe_interp.experiments.router_tuning.evaluation import PER_TOKEN
from moe_interp.stats.checks import FloatArray

MEASURES = ("ce_before", "ce", "ce_change", *PER_TOKEN, "overlap_before")
CLASSES = {"all": (0.0, np.inf), "fragile": (0.0, 0.5), "middle": (0.5, 0.9), "confident": (0.9, np.inf)}


def held_out(data: xr.Dataset) -> pd.DataFrame:
    """What was learned, at the last evaluation, by domain and by confidence of the untuned model.

    Returns:
        A row for each domain and class of tokens (by p of the realized token before tuning: fragile below .5, confident
        from .9 on): n_tokens, n_sequences, n_better (sequences with a better route r+ at some token), and with ``_low``
        and ``_high`` (95%, over sequences; :func:`moe_interp.stats.cluster_interval`):

        - ce_before, ce, ce_change: cross-entropy of the next token before and after tuning, and their paired
          difference (nats; negative is better).
        - changed: share of tokens that now take another set of experts than before.
        - preference: share of the tokens with a better route r+ of which ``log pi / pi_start`` rose more for r+ than
          for the old route r- (half where it is equal).
        - adoption: share of these whose route now is r+.
        - overlap, overlap_before: share of r+'s experts in the route now, and in r-.
        - entropy: of the router's log-policy, nats.

        Measures of routes are means over the tuned layers. r+ is the best of the draws from the untuned router.

    Source: derived, but for the cross-entropy. Classes by p of the same model select (see
    :func:`moe_interp.CounterfactualResult.by_confidence`): a change within one is compared with 0, not with another's.
    """
    return pd.DataFrame(
        [
            {"domain": domain, "tokens": name} | _row(data, -1, is_in)
            for domain in domains_of(data)
            for name, is_in in _classes(data, domain)
            if is_in.any()
        ]
    )


def curve(data: xr.Dataset) -> pd.DataFrame:
    """The held-out tokens of the training domains at each evaluation: step, the columns of :func:`held_out`, and for
    each layer weight_change ``||dW|| / ||W||``, effective_experts ``exp(H(load)) / E`` and max_violation
    ``(max load - mean) / mean`` (layers' means)."""
    is_in = data["domain"].values == HELD_OUT
    rows = []
    for number, step in enumerate(data["evaluation"].values.tolist()):
        load = data["load"].values[number]
        entropy = -np.sum(np.where(load > 0, load * np.log(np.maximum(load, 1e-300)), 0.0), axis=-1)
        rows.append(
            {
                "step": step,
                **_row(data, number, is_in),
                "weight_change": float(data["weight_change"].values[number].mean()),
                "effective_experts": float((np.exp(entropy) / load.shape[-1]).mean()),
                "max_violation": float((load.max(-1) * load.shape[-1] - 1).mean()),
            }
        )
    return pd.DataFrame(rows)


def domains_of(data: xr.Dataset) -> list[str]:
    """The training domains' held-out tokens first, then the others by name."""
    others = sorted({*data["domain"].values.tolist()} - {HELD_OUT})
    return [HELD_OUT, *others]


def _classes(data: xr.Dataset, domain: str) -> list[tuple[str, NDArray[np.bool_]]]:
    p = np.exp(-data["ce"].values[0])
    is_in = data["domain"].values == domain
    return [(name, is_in & (p >= low) & (p < high)) for name, (low, high) in CLASSES.items()]


def _row(data: xr.Dataset, number: int, is_in: NDArray[np.bool_]) -> dict[str, Any]:
    values = np.stack([value[is_in] for value in _values(data, number)], axis=-1)
    names, sequence = np.unique(data["sequence"].values[is_in].astype(str), return_inverse=True)
    totals: FloatArray = np.zeros((len(names), len(MEASURES)))
    counts = np.zeros_like(totals)
    np.add.at(totals, sequence, np.nan_to_num(values))
    np.add.at(counts, sequence, ~np.isnan(values))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = stats.cluster_interval([totals, counts], lambda total, count: total / count)
    n_better = int((counts[:, MEASURES.index("preference")] > 0).sum())
    row: dict[str, Any] = {"n_tokens": int(is_in.sum()), "n_sequences": len(names), "n_better": n_better}
    for at, name in enumerate(MEASURES):
        low, high = float(found.low[at]), float(found.high[at])
        if name not in ("ce_change",):
            most = np.inf if name.startswith("ce") else np.log(data.sizes["expert"]) if name == "entropy" else 1.0
            low, high = max(low, 0.0), min(high, float(most))
        row |= {name: float(found.estimate[at]), f"{name}_low": low, f"{name}_high": high}
    return row


def _values(data: xr.Dataset, number: int) -> list[FloatArray]:
    """``MEASURES`` of one evaluation, ``[token]`` each; routes' measures are means over layers."""
    before, now = data["ce"].values[0], data["ce"].values[number]
    routes = [_over_layers(data[name].values[number]) for name in PER_TOKEN]
    return [before, now, now - before, *routes, _over_layers(data["overlap"].values[0])]


def _over_layers(values: FloatArray) -> FloatArray:
    n = (~np.isnan(values)).sum(-1)
    return np.where(n > 0, np.nansum(values, axis=-1) / np.maximum(n, 1), np.nan)
