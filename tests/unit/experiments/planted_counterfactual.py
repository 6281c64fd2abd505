"""Datasets of counterfactual runs without a model: given scores, or simulated ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def dataset(
    logp: ArrayLike,
    standard: ArrayLike,
    router: ArrayLike | None = None,
    router_standard: ArrayLike | None = None,
    null: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    sequence: ArrayLike | None = None,
    **controls: Any,
) -> xr.Dataset:
    """``logp[token, layer, route]`` and ``standard[token]``, the rest by default without a meaning."""
    scores, level = np.asarray(logp, np.float64), np.asarray(standard, np.float64)
    n, layers, routes = scores.shape
    cell = ("token", "layer")
    route = np.stack(np.broadcast_arrays(np.arange(routes), np.arange(routes) + 1), -1)
    # every fourth token begins a sequence
    owner = np.arange(n) // 4 if sequence is None else np.asarray(sequence)
    filled = {
        "logp": ((*cell, "route"), scores),
        "router_logp": ((*cell, "route"), np.zeros_like(scores) if router is None else np.asarray(router, np.float64)),
        "route": ((*cell, "route", "slot"), np.broadcast_to(route, (n, layers, routes, 2)).astype(np.int16)),
        "logp_standard": (("token",), level),
        "logp_null": (cell, np.broadcast_to(level[:, None], (n, layers)) if null is None else np.asarray(null)),
        "router_logp_standard": (
            cell,
            np.zeros((n, layers)) if router_standard is None else np.asarray(router_standard, np.float64),
        ),
        "standard_route": ((*cell, "slot"), np.full((n, layers, 2), 7, np.int16)),
        "entropy": (("token",), -level if entropy is None else np.asarray(entropy, np.float64)),
        "exhausted": (cell, np.isnan(scores).any(-1)),
        "heating": (cell, np.ones((n, layers), np.float32)),
    }
    if "logp_second" in controls:
        filled["second_share"] = (cell, np.ones((n, layers), np.float32))
        filled["entropy_second"] = (cell, np.repeat(filled["entropy"][1][:, None], layers, axis=1))
    if "logp_own" in controls:
        filled["logp_own_null"] = (
            cell,
            np.broadcast_to(np.asarray(controls["logp_own_standard"])[:, None], (n, layers)),
        )
    axes = {"logp_own": "route", "logp_random": "random"}
    for name, value in controls.items():
        array = np.asarray(value)
        filled[name] = ((("token",), cell, (*cell, axes.get(name, "second")))[array.ndim - 1], array)
    labels = {
        "layer": list(range(layers)),
        "sequence": ("token", np.array([f"s{i:03d}" for i in owner])),
        "pos": ("token", np.arange(n) % 40),
        "token_text": ("token", np.full(n, "a")),
        "target_text": ("token", np.full(n, "b")),
        "token_type": ("token", np.where(np.arange(n) % 3 == 0, "number", "word")),
    }
    return xr.Dataset(filled, coords=labels, attrs={"model": "simulated", "sampler": "none"})


def exchangeable(n_tokens: int, n_routes: int = 32, spread: ArrayLike = 1.5, centre: Any = 0.5, seed: int = 0) -> Any:
    """Tokens whose standard route is one of many with the same law: ``p = sigmoid(centre + spread * z)``.

    ``centre`` and ``spread`` may differ by token. The router's log-probabilities and the entropy are unrelated to p.
    """
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n_tokens, 1, n_routes + 1 + 16))
    logit = np.broadcast_to(np.asarray(centre, float), (n_tokens,))[:, None, None] + z * np.broadcast_to(
        np.asarray(spread, float), (n_tokens,)
    ).reshape(-1, 1, 1)
    logp = -np.logaddexp(0, -logit)
    policy = rng.normal(size=z.shape)
    return dataset(
        logp[..., 1 : n_routes + 1],
        logp[:, 0, 0],
        router=policy[..., 1 : n_routes + 1],
        router_standard=policy[..., 0],
        entropy=rng.exponential(0.5, n_tokens),
        logp_second=logp[..., n_routes + 1 :],
        router_logp_second=policy[..., n_routes + 1 :],
        second_route=np.full((n_tokens, 1, 16), -1, np.int16),
        logp_random=logp[..., 1 : n_routes + 1],
    )
