"""Datasets of counterfactual runs whose routes give whole predictions, of a law in which no route is special."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from moe_interp.experiments.counterfactual.experiment import first_new, matches
from moe_interp.routes import GumbelTopK, SampledRoutes, TokenKeys, UniformSubsets
from tests.unit.experiments.planted_counterfactual import dataset

N_EXPERTS, TOP_K = 8, 2


def exchangeable_predictions(
    n_sequences: int,
    n_tokens: int,
    base: float = 1.5,
    noise: float = 1.0,
    flatten: float = 1.0,
    n_routes: int = 16,
    vocabulary: int = 6,
    seed: int = 0,
    lengths: np.ndarray | None = None,
) -> xr.Dataset:
    """Every set of two experts predicts ``softmax(base * a + noise * b)``, a of the token, b of token and set.

    The next token is drawn by nature from ``softmax(flatten * base * a)``, which knows of no route. The router's best
    set is the standard route; how sharp ``a`` is differs by sequence. Log-probabilities of all routes are those of the
    drawn token.

    Args:
        lengths: Tokens of each sequence; ``n_tokens`` each by default.
    """
    rng = np.random.default_rng(seed)
    sizes = np.full(n_sequences, n_tokens) if lengths is None else lengths
    owner = np.repeat(np.arange(n_sequences), sizes)
    n = len(owner)
    logits = torch.from_numpy(rng.normal(0, 1.5, (n, N_EXPERTS)))
    policy, standard = logits.log_softmax(-1), logits.topk(TOP_K).indices
    sharpness = base * np.exp(0.3 * rng.normal(size=n_sequences))[owner, None]
    common = rng.normal(size=(n, vocabulary)) * sharpness
    pairs = np.full((N_EXPERTS, N_EXPERTS), -1)
    rows, columns = np.triu_indices(N_EXPERTS, 1)
    pairs[rows, columns] = pairs[columns, rows] = np.arange(len(rows))
    own = common[:, None] + noise * rng.normal(size=(n, len(rows), vocabulary))
    log = torch.from_numpy(own).log_softmax(-1).numpy()
    nature = torch.from_numpy(flatten * common).softmax(-1).numpy()
    drawn = (nature.cumsum(-1) > rng.random((n, 1))).argmax(-1)

    def keys(stream: int) -> TokenKeys:
        return TokenKeys(4 * seed + stream, 0, torch.from_numpy(owner), torch.arange(n))

    def number(routes: Tensor) -> np.ndarray:
        given = routes.numpy()
        return np.where(given[..., 0] < 0, -1, pairs[given[..., 0], given[..., 1]])

    def taken(values: np.ndarray, routes: Tensor) -> np.ndarray:
        at = number(routes)
        return np.where(at < 0, np.nan, np.take_along_axis(values, np.maximum(at, 0), 1))[:, None]

    def sampled(sampler: Any, n_drawn: int, stream: int) -> SampledRoutes:
        found: SampledRoutes = sampler.sample(logits, standard, n_drawn, keys(stream))
        return found

    main, second = sampled(GumbelTopK(), n_routes, 1), sampled(GumbelTopK(), n_routes, 2)
    uniform = sampled(UniformSubsets(), n_routes, 3)
    kept = first_new(second.indices, main.indices)
    utility = log[np.arange(n), :, drawn]
    of_router = np.stack([(policy[:, a] + policy[:, b]).numpy() for a, b in zip(rows, columns)], axis=-1)
    again = matches(kept, main.indices).numpy()
    at = number(kept)
    is_fresh = (at >= 0) & (again < 0) & (np.arange(at.shape[1]) > 0)
    predictions = np.exp(np.take_along_axis(log, np.maximum(at, 0)[..., None], 1)) * is_fresh[..., None]
    mean = predictions.sum(1) / np.maximum(is_fresh.sum(1), 1)[:, None]
    entropy = np.where(is_fresh.any(1), -(mean * np.log(np.maximum(mean, 1e-300))).sum(-1), np.nan)
    first = np.take_along_axis(log, number(standard)[:, None, None], 1)[:, 0]
    level = first[np.arange(n), drawn]
    assert second.share_other is not None
    data = dataset(
        taken(utility, main.indices),
        level,
        taken(of_router, main.indices),
        taken(of_router, standard.unsqueeze(1))[..., 0],
        null=(level + 1e-7 * rng.normal(size=n))[:, None],
        entropy=-(np.exp(first) * first).sum(-1),
        sequence=owner,
        logp_second=taken(utility, kept),
        router_logp_second=taken(of_router, kept),
        second_route=again[:, None].astype(np.int16),
        second_share=second.share_other.numpy()[:, None],
        logp_random=taken(utility, uniform.indices),
        logp_top=first.max(-1),
        is_top=first.argmax(-1) == drawn,
    )
    return data.assign(entropy_second=(("token", "layer"), entropy[:, None]))
