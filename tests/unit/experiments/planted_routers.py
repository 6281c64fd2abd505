"""Datasets of counterfactual runs whose routes the real sampler drew, with utilities whose law is known."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from moe_interp.experiments.counterfactual.experiment import first_new, matches
from moe_interp.routes import GumbelTopK, RouteSampler, TokenKeys
from tests.unit.experiments.planted_counterfactual import dataset

TOP_K = 2


def drawn_routes(
    n_tokens: int,
    sharpness: float,
    slope: float = 0.0,
    spread: float = 1.5,
    centre: float = 1.0,
    standard_is_drawn: bool = False,
    sampler: RouteSampler | None = None,
    n_experts: int = 12,
    n_routes: int = 12,
    seed: int = 0,
) -> xr.Dataset:
    """Tokens with router logits of a standard deviation ``sharpness``, and for each set of two experts a utility
    ``p = sigmoid(centre + slope * (log-policy + 4) + spread * z)``, with z of its own: with slope 0 routes are
    exchangeable whatever the router.

    Args:
        standard_is_drawn: The standard route is a draw of the sampler's law, instead of its mode.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n_tokens, n_experts, generator=generator)
    sampler = GumbelTopK() if sampler is None else sampler
    standard = logits.topk(TOP_K).indices
    if standard_is_drawn:
        uniforms = torch.rand(n_tokens, 1, n_experts, dtype=torch.float64, generator=generator)
        standard = GumbelTopK().draw(logits, uniforms, TOP_K)[:, 0]

    def keys(stream: int) -> TokenKeys:
        return TokenKeys(stream, 0, torch.arange(n_tokens) // 4, torch.arange(n_tokens) % 40)

    n_second = max(n_routes, min(2 * n_routes, 16))
    main, second = (
        sampler.sample(logits, standard, n_routes, keys(2 * seed)),
        sampler.sample(logits, standard, n_second, keys(2 * seed + 1)),
    )
    kept = first_new(second.indices, main.indices)
    policy = logits.log_softmax(-1)
    noise = torch.randn(n_tokens, n_experts, n_experts, generator=generator)

    def both(routes: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Log-policy and log-utility ``[token, 1, route]`` of ``[token, route, slot]``."""
        low, high = routes.sort(-1).values.clamp(min=0).unbind(-1)
        rows = torch.arange(n_tokens)[:, None]
        of_router = policy[rows, low] + policy[rows, high]
        logit = centre + slope * (of_router + 4) + spread * noise[rows, low, high]
        absent = routes[..., 0] < 0
        values = (of_router, torch.nn.functional.logsigmoid(logit))
        router, utility = (value.double().masked_fill(absent, torch.nan).numpy()[:, None] for value in values)
        return router, utility

    (router, logp), (router_second, logp_second) = both(main.indices), both(kept)
    router_standard, level = both(standard.unsqueeze(1))
    share = second.share_other
    return dataset(
        logp,
        level[:, 0, 0],
        router,
        router_standard[..., 0],
        entropy=np.random.default_rng(seed).exponential(0.5, n_tokens),
        logp_second=logp_second,
        router_logp_second=router_second,
        second_route=matches(kept, main.indices).numpy()[:, None].astype(np.int16),
        second_share=None if share is None else share.numpy()[:, None],
    )
