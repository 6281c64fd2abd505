"""A trace with uneven use, labels, ids, weights and empty slots."""

import numpy as np

from moe_interp.traces import RoutingTrace


def planted_trace(seed=0, n_tokens=120, n_layers=2, n_slots=3, n_experts=6, empty=0.15):
    rng = np.random.default_rng(seed)
    liking = rng.normal(size=(n_layers, n_experts)) + rng.gumbel(size=(n_tokens, n_layers, n_experts))
    indices = (-liking).argsort(axis=-1)[..., :n_slots]
    indices[rng.random(indices.shape) < empty] = -1
    return RoutingTrace.from_arrays(
        indices,
        rng.random(indices.shape),
        sequence_lengths=[n_tokens // 4] * 4,
        n_experts=n_experts,
        layers=range(2, 2 + n_layers),
        domain=["law", "math", "code", "math"],
        token_ids=rng.integers(0, 8, n_tokens),
        predicted_ids=rng.integers(0, 5, n_tokens),
    )


def routes(trace, layer):
    """The set of experts of each token, empty slots left out."""
    return [{int(e) for e in row if e >= 0} for row in trace.expert_indices[:, layer]]
