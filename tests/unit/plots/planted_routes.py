"""A counterfactual result to draw: a few sequences, texts that need escaping, one plainly regretted token."""

from __future__ import annotations

import numpy as np
import xarray as xr

from moe_interp.experiments.counterfactual.result import CounterfactualResult

TEXTS = ("<b>", " &amp;", "\n", "\t", "", '"]', "</script>", "\u202ex", " two  spaces", "é")
REGRETTED = ("s3", 4, 1)  # sequence, position, layer


def planted_routes(
    n_sequences: int = 12, n_tokens: int = 8, n_layers: int = 3, n_routes: int = 6, controls: bool = True
) -> CounterfactualResult:
    """Routes are exchangeable, but for one token whose route 2 at one layer is better by 2.5 nats."""
    rng = np.random.default_rng(0)
    n, experts = n_sequences * n_tokens, 9
    sequence = np.repeat([f"s{i}" for i in range(n_sequences)], n_tokens)
    pos = np.tile(np.arange(n_tokens) + 2, n_sequences)
    standard = -rng.exponential(0.8, n) * rng.choice([0.05, 1.0], n)

    def scores(width: int) -> np.ndarray:
        return np.minimum(standard[:, None, None] + rng.normal(0, 0.1, (n, n_layers, width)), -1e-4)

    logp = scores(n_routes)
    place = int(np.flatnonzero((sequence == REGRETTED[0]) & (pos == REGRETTED[1]))[0])
    standard[place] = -3.0
    logp[place] = -3.2
    logp[place, REGRETTED[2], min(2, n_routes - 1)] = -0.5
    logp[0, :, max(n_routes - 2, 1) :] = np.nan  # a token with fewer routes
    cell = ("token", "layer")
    route = rng.permuted(np.tile(np.arange(experts), (n, n_layers, n_routes, 1)), axis=-1)[..., :2].astype(np.int16)
    variables = {
        "logp": ((*cell, "route"), logp),
        "router_logp": ((*cell, "route"), rng.normal(-4, 1, logp.shape)),
        "route": ((*cell, "route", "slot"), route),
        "logp_standard": ("token", standard),
        "logp_null": (cell, standard[:, None] + rng.normal(0, 1e-7, (n, n_layers))),
        "router_logp_standard": (cell, rng.normal(-2, 1, (n, n_layers))),
        "standard_route": ((*cell, "slot"), route[:, :, 0, ::-1].copy()),
        "entropy": ("token", -standard),
        "exhausted": (cell, np.isnan(logp).any(-1)),
        "heating": (cell, np.ones((n, n_layers), np.float32)),
    }
    if controls:
        variables |= {
            "logp_second": ((*cell, "second"), scores(4)),
            "router_logp_second": ((*cell, "second"), rng.normal(-4, 1, (n, n_layers, 4))),
            "second_route": ((*cell, "second"), np.full((n, n_layers, 4), -1, np.int16)),
            "entropy_second": (cell, rng.exponential(0.5, (n, n_layers))),
            "second_share": (cell, np.full((n, n_layers), 0.75, np.float32)),
            "logp_random": ((*cell, "random"), scores(n_routes)),
            "logp_own": ((*cell, "route"), scores(n_routes)),
            "logp_own_second": ((*cell, "second"), scores(4)),
            "logp_own_standard": ("token", standard),
            "logp_own_null": (cell, np.broadcast_to(standard[:, None], (n, n_layers))),
        }
    text = np.array([TEXTS[i % len(TEXTS)] for i in range(n + 1)])
    data = xr.Dataset(
        variables,
        coords={
            "layer": [1, 3, 5][:n_layers],
            "sequence": ("token", sequence),
            "pos": ("token", pos),
            "token_id": ("token", np.arange(n)),
            "target_id": ("token", np.arange(n) + 1),
            "token_text": ("token", text[:-1]),
            "target_text": ("token", text[1:]),
            "token_type": ("token", np.where(np.arange(n) % 2, "word", "other")),
        },
        attrs={"model": "<planted>", "sampler": "planted", "n_routes": n_routes, "n_experts": experts, "top_k": 2},
    )
    return CounterfactualResult(data, seeds=0)
