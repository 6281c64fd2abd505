"""What routers read on held-out text, kept as sums, and how strongly they read the direction that all of it shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from moe_interp.errors import DataError
from moe_interp.stats.checks import FloatArray
from moe_interp.stats.geometry.shared_direction import centred_logits, gains
from moe_interp.types import Layer

PRINCIPAL_AXES = 3
GAINS = ("shared_gain", "random_gain", "principal_gain", "centred_gain", "domain_gain", "shared_offset")


@dataclass
class RouterInputs:
    """Sums over the inputs of one layer's router: all that gains need, whatever the number of tokens.

    Attributes:
        count: ``[domain]`` tokens.
        sums: ``[domain, d_model]``.
        products: ``[d_model, d_model]``, the sum of ``h h'`` over all tokens.
    """

    count: FloatArray
    sums: FloatArray
    products: FloatArray

    @classmethod
    def empty(cls, n_domains: int, d_model: int) -> RouterInputs:
        """No tokens yet."""
        return cls(np.zeros(n_domains), np.zeros((n_domains, d_model)), np.zeros((d_model, d_model)))

    def add(self, inputs: ArrayLike, domain: ArrayLike) -> None:
        """Add tokens: inputs ``[token, d_model]`` and the numbers of their domains ``[token]``.

        Raises:
            DataError: Shapes that do not fit.
        """
        states, labels = np.asarray(inputs, dtype=np.float64), np.asarray(domain)
        if states.shape != (len(labels), self.sums.shape[1]) or labels.ndim != 1:
            raise DataError(
                f"inputs of shape {states.shape} and domains of shape {labels.shape}",
                f"[token, {self.sums.shape[1]}] and [token]",
                "Flatten both in the same order.",
            )
        self.count += np.bincount(labels, minlength=len(self.count))
        np.add.at(self.sums, labels, states)
        self.products += states.T @ states


def shared_direction_gains(weights: ArrayLike, inputs: RouterInputs) -> dict[str, float]:
    """One router's gain along the mean of its inputs, and along other directions.

    With ``A = Pi_e W``, ``Pi_e = I - 11'/E`` (what all experts' logits have in common moves no ranking), ``mu`` the
    mean input and ``mu_d`` that of a domain:

    - ``shared_gain``: ``||A mu|| / ||mu||``;
    - ``random_gain``: root mean square of ``||A u||`` over all directions ``u`` of length 1, ``||A||_F / sqrt(d)``;
    - ``principal_gain``: that over the first 3 principal axes of the centred inputs;
    - ``centred_gain``: ``rms ||A (h - mu)|| / rms ||h - mu||``, over all that differs between tokens as it occurs;
    - ``domain_gain``: ``rms_d ||A (mu_d - mu)|| / rms_d ||mu_d - mu||``, over what differs between domains;
    - ``shared_offset``: ``||A mu|| / rms ||A (h - mu)||``: what is added to every token's logits, beside how they vary.

    Args:
        weights: ``[expert, d_model]``; a bias takes no part.
        inputs: Of that router.

    Returns:
        The six by name, gains in logits per unit of input. NaN where a direction or a spread is 0: ``shared_gain`` of
        inputs of mean 0, ``domain_gain`` of one domain, ``shared_offset`` of a router that reads nothing.

    Raises:
        DataError: No tokens, or shapes that do not fit.

    Source: "The Myth of Expert Specialization in MoEs" for ``shared_gain`` under load balancing; the rest is derived.
    What they do not show: why a gain is small, nor that routes depend on it; only ratios compare between routers, whose
    weights differ in size.
    """
    weight = np.asarray(weights, dtype=np.float64)
    n = inputs.count.sum()
    if not n or weight.ndim != 2 or weight.shape[1] != inputs.sums.shape[1]:
        raise DataError(
            f"weights of shape {weight.shape} and the inputs of {int(n)} tokens of width {inputs.sums.shape[1]}",
            "[expert, d_model], and at least one token of that width",
            "Take weight and inputs of one layer's router.",
        )
    centred = centred_logits(weight)
    mean = inputs.sums.sum(0) / n
    covariance = inputs.products / n - np.outer(mean, mean)
    axes = np.linalg.eigh(covariance)[1].T[::-1][:PRINCIPAL_AXES]
    seen = inputs.count > 0
    apart = inputs.sums[seen] / inputs.count[seen, None] - mean
    spread = max(float(np.trace(covariance)), 0.0)
    moved = max(float(np.einsum("ei,ij,ej->", centred, covariance, centred)), 0.0)
    offset = np.linalg.norm(centred @ mean)
    return {
        "shared_gain": _ratio(offset, np.linalg.norm(mean)),
        "random_gain": float(np.linalg.norm(centred) / np.sqrt(weight.shape[1])),
        "principal_gain": float(np.sqrt(np.mean(gains(centred, axes) ** 2))),
        "centred_gain": _ratio(np.sqrt(moved), np.sqrt(spread)),
        "domain_gain": _ratio(np.linalg.norm(apart @ centred.T), np.linalg.norm(apart)) if seen.sum() > 1 else np.nan,
        "shared_offset": _ratio(offset, np.sqrt(moved)),
    }


def shared_direction_metrics(weights: Mapping[Layer, ArrayLike], inputs: Mapping[Layer, RouterInputs]) -> pd.DataFrame:
    """:func:`shared_direction_gains` of every layer: ``layer`` and the six columns, one row a layer."""
    return pd.DataFrame([{"layer": layer} | shared_direction_gains(weights[layer], inputs[layer]) for layer in inputs])


def _ratio(part: float | np.floating, whole: float | np.floating) -> float:
    return float(part / whole) if whole > 0 else np.nan
