"""How far the model's own prediction is from calibrated, on the tokens that a counterfactual run scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from moe_interp import stats
from moe_interp.experiments.counterfactual.data import sequence_codes
from moe_interp.experiments.counterfactual.tables import tally

BINS = ("all", "below .5", ".5 to .9", ".9 and above")  # of the most likely token's probability
MEASURES = ("p_top", "right", "calibration_error", "surprise")


def prediction_calibration(data: xr.Dataset) -> pd.DataFrame:
    """Reliability of the plain forward's prediction of the scored tokens.

    The control "own_prediction" is a null where the prediction is calibrated: where, of the tokens that it gives some
    probability p, the share p is realized. Two consequences can be seen on any tokens, and are 0 for a calibrated
    prediction: calibration_error = share of the tokens whose most likely next token is the realized one, less its mean
    probability (negative: too sure); surprise = mean of -log p(realized token), less the mean entropy of the prediction
    (nats; positive: too sure, or wrong).

    Returns:
        A row for all tokens and for each bin of the most likely token's probability: n_tokens, n_sequences, p_top (its
        mean), right (the share that is realized), calibration_error and surprise, each with ``_low`` and ``_high``
        (95%, over sequences). A run that has not kept the most likely token has surprise for all tokens only.

    Source: derived (reliability as in Guo et al. 2017, with signs). Both can be 0 although single predictions are not
    calibrated: errors of opposite sign cancel within a bin.
    """
    surprise = -data["logp_standard"].values.astype(np.float64) - data["entropy"].values.astype(np.float64)
    if "logp_top" in data and "is_top" in data:
        p, right = np.exp(data["logp_top"].values.astype(np.float64)), data["is_top"].values.astype(np.float64)
        bins = 1 + (p >= 0.5).astype(np.int64) + (p >= 0.9)
    else:
        p = right = np.full(surprise.shape, np.nan)
        bins = np.full(surprise.shape, -1, np.int64)
    sequence = sequence_codes(data)
    n_sequences = int(sequence.max()) + 1

    def sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
        in_bins = tally(np.where(bins > 0, sequence * len(BINS) + bins, -1), values, n_sequences, len(BINS))
        in_bins[:, 0] = tally(sequence, values, n_sequences, 1)[:, 0]
        return in_bins

    columns = [p, right, right - p, surprise]
    totals = np.stack([sums(values) for values in columns], axis=-1)
    counts = np.stack([sums(np.where(np.isnan(values), np.nan, 1.0)) for values in columns], axis=-1)
    found = stats.cluster_interval([totals, counts], lambda value, n: value / n)
    rows = []
    for b, name in enumerate(BINS):
        n = counts[:, b, MEASURES.index("surprise")]
        row: dict[str, Any] = {"predicted": name, "n_tokens": int(n.sum()), "n_sequences": int((n > 0).sum())}
        for i, measure in enumerate(MEASURES):
            row |= {
                measure: float(found.estimate[b, i]),
                f"{measure}_low": float(found.low[b, i]),
                f"{measure}_high": float(found.high[b, i]),
            }
        rows.append(row)
    return pd.DataFrame(rows if bins.max() > 0 else rows[:1])
