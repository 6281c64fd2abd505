"""Traces with router inputs, whose routes are those of a known linear router or of none."""

from __future__ import annotations

from typing import Any

import numpy as np

import moe_interp as mi


def top(logits: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logits, axis=-1, kind="stable")[..., :k]


def planted(
    routed_by: str = "router",
    n_sequences: int = 24,
    n_tokens: int = 12,
    n_layers: int = 2,
    n_experts: int = 12,
    k: int = 3,
    d: int = 16,
    seed: int = 0,
    **fields: Any,
) -> tuple[mi.RoutingTrace, dict[int, np.ndarray]]:
    """Autocorrelated states of sequences, a linear router a layer, and routes.

    Args:
        routed_by: "router": the linear router; "nothing": routes that do not depend on the states, but on the sequence;
            "token": the token's id alone at the first layer, nothing at the later ones.
    """
    rng = np.random.default_rng(seed)
    shape = (n_sequences, n_tokens, n_layers, d)
    topic = rng.normal(size=(n_sequences, 1, n_layers, d))
    states = (topic + 0.7 * rng.normal(size=shape)).reshape(-1, n_layers, d)
    weights = {layer: rng.normal(size=(n_experts, d)) for layer in range(n_layers)}
    ids = rng.integers(3, 30, size=len(states))
    if routed_by == "router":
        logits = np.stack([states[:, layer] @ weights[layer].T for layer in range(n_layers)], axis=1)
    else:
        own = rng.normal(size=(n_sequences, 1, n_layers, n_experts))
        each = rng.normal(size=(n_sequences, n_tokens, n_layers, n_experts))
        logits = ((own if routed_by == "nothing" else 0) + each).reshape(-1, n_layers, n_experts)
        if routed_by == "token":
            logits[:, 0] = rng.normal(size=(40, n_experts))[ids]
    given: dict[str, Any] = {"token_ids": ids, "router_inputs": states.astype(np.float32)} | fields
    trace = mi.RoutingTrace.from_arrays(
        top(logits, k), sequence_lengths=[n_tokens] * n_sequences, n_experts=n_experts, **given
    )
    return trace, weights
