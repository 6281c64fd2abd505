"""One step's routes, their cross-entropies, and the loss of the routers that are tuned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_interp.experiments.router_tuning.objectives import (
    better_route,
    distill_loss,
    epo_loss,
    listwise_loss,
)
from moe_interp.experiments.router_tuning.options import TuningOptions
from moe_interp.experiments.router_tuning.routers import TunedRouter, Weights
from moe_interp.experiments.router_tuning.token_sources.tokens import OpenTokens
from moe_interp.routes import GumbelTopK, RouteSampler, TokenKeys


@dataclass(frozen=True, eq=False)
class ScoredRoutes:
    """The routes of some tokens at one layer.

    Attributes:
        routes: ``[token, route, slot]``; route 0 is the router's own.
        ce: ``[token, route]``, in nats; NaN where there is no route.
        better, gain: r+ and Delta, see :func:`.objectives.better_route`.
    """

    routes: Tensor
    ce: Tensor
    better: Tensor
    gain: Tensor


def scored_routes(
    opened: OpenTokens, router: TunedRouter, logits: Tensor, options: TuningOptions, keys: TokenKeys
) -> ScoredRoutes:
    """The router's own route, those that the sampler draws from its logits, and their cross-entropies."""
    with torch.no_grad():
        logits = logits.detach()
        own = router.rule.route(logits)[0]
        drawn = draw(options.sampler, router.rule.choice_logits(logits), own, options.n_routes, keys)
        routes = torch.cat([own.unsqueeze(1), drawn], dim=1)
        ce = opened.scores(router.layer, routes, logits)
        return ScoredRoutes(routes, ce, *better_route(routes, ce))


def draw(sampler: RouteSampler, choice_logits: Tensor, own: Tensor, n_routes: int, keys: TokenKeys) -> Tensor:
    """``[token, route, slot]``: of GumbelTopK so many independent draws, as published (they repeat, and may be the
    router's own route); of another sampler its distinct routes."""
    if not isinstance(sampler, GumbelTopK):
        return sampler.sample(choice_logits, own, n_routes, keys).indices
    n, n_experts = choice_logits.shape
    uniforms = keys.uniforms(torch.arange(n, device=choice_logits.device), n_routes * n_experts, 0)
    return sampler.draw(choice_logits, uniforms.view(n, n_routes, n_experts), own.shape[-1])


def step_loss(
    opened: OpenTokens,
    routers: tuple[TunedRouter, ...],
    weights: Weights,
    start: Weights,
    options: TuningOptions,
    keys: dict[int, TokenKeys],
) -> tuple[Tensor, int]:
    """The loss of a batch, summed over the tuned layers, with its gradient by the weights; and for how many of the
    batch's tokens (times layers) there was a better route.

    Args:
        opened: The batch's tokens.
        routers, weights: What is tuned, and its weights now.
        start: The weights of the reference policy.
        options: The run's.
        keys: By layer, what the tokens' draws are fixed by.
    """
    if options.objective == "cross_entropy":
        return opened.own_loss(weights), 0
    total, n_better = torch.zeros(()), 0
    for router in routers:
        inputs = opened.inputs[router.layer]
        logits = router.logits(inputs, weights[router.layer])
        found = scored_routes(opened, router, logits, options, keys[router.layer])
        log_policy = router.rule.log_policy(logits)
        n_better += int((found.gain > 0).sum())
        if options.objective == "epo":
            reference = None
            if options.reference == "start":
                with torch.no_grad():
                    reference = router.rule.log_policy(router.logits(inputs, start[router.layer]))
            gain = found.gain.to(log_policy)
            loss = epo_loss(log_policy, reference, found.routes[:, 0], found.better, gain, options.beta)
        elif options.objective == "listwise":
            loss = listwise_loss(log_policy, found.routes, found.ce.to(log_policy), options.temperature)
        else:
            loss = distill_loss(log_policy, found.better)
        total = total.to(loss) + loss.mean()
    return total, n_better
