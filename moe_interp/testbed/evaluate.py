"""Validation: losses by domain against a unigram model's, and the routes behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from moe_interp.arch.routing_rule import at_least_float
from moe_interp.testbed.domains.packing import PackedSequences
from moe_interp.testbed.shared_direction import RouterInputs, shared_direction_metrics
from moe_interp.testbed.strategies.strategy import Records
from moe_interp.traces.trace import RoutingTrace
from moe_interp.types import Layer

# (tokens, domain), both [batch, pos] -> logits [batch, pos, vocab] and each layer's record
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Records]]


@dataclass(frozen=True)
class Evaluation:
    """What a validation found.

    Attributes:
        losses: Nats per token of each domain, over positions 1..T-1.
        trace: The routes, with domain labels.
        shared_direction: :func:`moe_interp.testbed.shared_direction.shared_direction_metrics`, where asked for.
    """

    losses: dict[str, float]
    trace: RoutingTrace
    shared_direction: pd.DataFrame | None = None


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood in nats of tokens 1..T-1. ``[batch, pos, vocab], [batch, pos] -> [batch, pos - 1]``."""
    # the last position has no target and is computed all the same: leaving it out would copy the logits
    targets = nn.functional.pad(tokens[:, 1:], (0, 1))
    losses = nn.functional.cross_entropy(at_least_float(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(tokens.shape)[:, :-1]


def max_violation(load: Tensor) -> float:
    """MaxVio = (max load - mean load) / mean load of one layer; 0 when balanced."""
    return float(load.max() / load.mean() - 1)


def unigram_loss(train: PackedSequences, validation: PackedSequences, vocab_size: int) -> dict[str, float]:
    """Nats per token of validation under each domain's own training unigram (add-one): the yardstick."""
    losses = {}
    for d, name in enumerate(train.names):
        counts = np.bincount(train.tokens[train.domain == d], minlength=vocab_size) + 1.0
        held_out = validation.tokens[:, 1:][validation.domain[:, 1:] == d]
        losses[name] = float(-np.log(counts / counts.sum())[held_out].mean())
    return losses


@torch.no_grad()
def evaluate(
    forward: Forward,
    data: PackedSequences,
    device: torch.device,
    weights: Mapping[Layer, Tensor] | None = None,
    batch: int = 16,
) -> Evaluation:
    """Losses and routes of all sequences, ``batch`` at a time.

    Args:
        forward: A pass. Where its records have the routers' inputs, gains are measured too.
        weights: The routers', ``[expert, d_model]``, for those.
    """
    inputs: dict[Layer, RouterInputs] = {}
    losses: list[np.ndarray] = []
    routes: dict[Layer, list[np.ndarray]] = {}
    n_experts = 0
    for start in range(0, len(data), batch):
        rows = slice(start, start + batch)
        tokens, domain = (torch.as_tensor(a[rows], dtype=torch.long, device=device) for a in (data.tokens, data.domain))
        logits, records = forward(tokens, domain)
        losses.append(token_losses(logits, tokens).cpu().numpy())
        for layer, record in records.items():
            n_experts = record.logits.shape[-1]
            routes.setdefault(layer, []).append(record.indices.flatten(0, 1).cpu().numpy())
            if record.inputs is not None:
                read = record.inputs.flatten(0, 1).float().cpu().numpy()
                inputs.setdefault(layer, RouterInputs.empty(len(data.names), read.shape[1]))
                inputs[layer].add(read, data.domain[rows].reshape(-1))
    by_token = np.concatenate(losses)
    return Evaluation(
        {name: float(by_token[data.domain[:, 1:] == d].mean()) for d, name in enumerate(data.names)},
        _trace(routes, n_experts, data),
        shared_direction_metrics({k: w.float().cpu().numpy() for k, w in (weights or {}).items()}, inputs)
        if inputs
        else None,
    )


def _trace(routes: Mapping[Layer, list[np.ndarray]], n_experts: int, data: PackedSequences) -> RoutingTrace:
    width = max(part.shape[1] for parts in routes.values() for part in parts)
    joined = [
        np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in parts])
        for parts in routes.values()
    ]
    return RoutingTrace.from_arrays(
        np.stack(joined, axis=1),
        sequence_lengths=np.full(len(data), data.tokens.shape[1]),
        n_experts=n_experts,
        layers=[int(layer) for layer in routes if isinstance(layer, int)],
        domain=np.asarray(data.names)[data.domain.reshape(-1)],
        token_ids=data.tokens.reshape(-1),
    )
