"""The checks of a layer's routing rule: against the router's own replies, and against its definition.

The router is asked on the tested pass's hidden states, and on others made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable, RoutingRule, ScoreRule, SwitchTop1
from moe_interp.types import Layer
from moe_interp.verification import reference_rules as reference
from moe_interp.verification.block_by_hand import LayerByHand, layer_by_hand
from moe_interp.verification.finding import Finding, unit_of
from moe_interp.verification.model_under_test import Call, ModelUnderTest, difference

_SCALES = (1.0, 0.5, 2.0)  # of other hidden states


def rules_hold(tested: ModelUnderTest) -> Iterator[Finding]:
    """The router's own choice and weights bit for bit; weights of other experts, ranking and policy as defined."""
    for layer in tested.layers:
        hand = layer_by_hand(tested, layer)
        replies = list(_replies(tested, layer, hand))
        figures = [_as_the_router(tested, hand, reply) for reply in replies]
        bound = 0.0 if hand.spec.block_scale == 1.0 else 4 * unit_of(hand.weights) * float(hand.weights.abs().max())
        yield Finding(
            check="the rule is the router's", layer=layer, hook="expert_indices", figure=max(figures), bound=bound
        )
        told = [hand.replied(reply.args[0], reply.output) for reply in replies]
        yield from _as_defined(tested, layer, hand.rule, [(logits, indices) for logits, indices, _ in told])


def _replies(tested: ModelUnderTest, layer: Layer, hand: LayerByHand) -> Iterator[Call]:
    """The router's replies: in the pass itself, and to states of the same shape that are mixed from its own."""
    call = tested.router_calls[layer]
    yield call
    hidden = call.args[0]
    for number, scale in enumerate(_SCALES):
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(hidden[..., 0].numel(), generator=generator).to(hidden.device)
        mixed = hidden + scale * hidden.reshape(-1, hidden.shape[-1])[order].view(hidden.shape)
        yield Call((mixed, *call.args[1:]), call.kwargs, hand.reply(mixed, call.args[1:], call.kwargs))


def _as_the_router(tested: ModelUnderTest, hand: LayerByHand, reply: Call) -> float:
    """How far the rule's route, packed as the family packs it, is from the router's own return value."""
    layout, rule = hand.spec.family.layout, hand.rule
    logits = hand.replied(reply.args[0], reply.output)[0]
    route = rule.route(logits, tested.tokens.reshape(logits.shape[:-1]))
    return difference(layout.write(rule, logits, None, route, reply.output), reply.output)


def _as_defined(
    tested: ModelUnderTest, layer: Layer, rule: RoutingRule, replies: list[tuple[Tensor, Tensor]]
) -> Iterator[Finding]:
    common: dict[str, Any] = {"layer": layer, "hook": "router_logits"}
    logits = torch.cat([part.reshape(-1, part.shape[-1]) for part, _ in replies])
    native = torch.cat([part.reshape(-1, part.shape[-1]) for _, part in replies])
    figures, unit = [], 0.0
    for indices in (random_sets(rule, len(logits)), random_sets(rule, len(logits), seed=1, empty=True)):
        weights = rule.weights(logits, indices.to(logits.device))
        expected = reference.weights(rule, logits, indices.to(logits.device))
        figures.append(difference(weights.double(), expected) / float(expected.abs().max()))
        unit = max(unit, unit_of(weights), unit_of(logits), 1.2e-7)
    coarse = 4 * unit if unit > 1e-4 else 64 * unit
    yield Finding(check="weights of other experts are as defined", figure=max(figures), bound=coarse, **common)
    figure = difference(rule.log_policy(logits).double(), reference.log_policy(rule, logits))
    yield Finding(check="the policy is as defined", figure=figure, bound=1e-4 if unit < 1e-4 else 0.1, **common)
    if not isinstance(rule, HashTable):
        yield Finding(check="ranked as the router ranks", figure=_ranking(rule, logits, native), bound=coarse, **common)
        figure = _choice_scale(rule, logits)
        yield Finding(check="choice logits are as defined", figure=figure, bound=1e-4 if unit < 1e-4 else 0.1, **common)


def _ranking(rule: RoutingRule, logits: Tensor, native: Tensor) -> float:
    """By how much the order of ``choice_logits``, or the router's choice, contradicts the ranking as defined."""
    defined = reference.choice(rule, logits)
    size = max(float(defined[defined.isfinite()].abs().max()), 1e-30)
    # a family that takes experts of shut groups does so only where too few others have a positive score
    defined = defined.masked_fill((defined.isneginf()).sum(dim=-1, keepdim=True) > rule.n_experts - rule.top_k, 0.0)
    order = rule.choice_logits(logits).double().argsort(dim=-1, descending=True, stable=True)
    ordered = defined.gather(-1, order)
    rises = (ordered[..., 1:] - ordered[..., :-1]).nan_to_num(0.0, float("inf"), float("-inf"))
    figures = [0.0, float(rises.max())] if rises.numel() else [0.0]
    if not isinstance(rule, SwitchTop1) and not (isinstance(rule, ScoreRule) and rule.excluded_score == 0.0):
        chosen = torch.zeros_like(defined, dtype=torch.int64).scatter(-1, native.clamp(min=0), 1) > 0
        if not bool(chosen.all()):
            worst = defined.masked_fill(~chosen, float("inf")).amin(dim=-1)
            best = defined.masked_fill(chosen, float("-inf")).amax(dim=-1)
            figures.append(float((best - worst).max()))
    return max(figures) / size


def _choice_scale(rule: RoutingRule, logits: Tensor) -> float:
    """How far ``choice_logits`` are from the log of the choice scores, in nats, beside a constant a token."""
    found, defined = rule.choice_logits(logits).double(), reference.log_choice(rule, logits)
    is_excluded, compared = defined.isneginf(), defined.isfinite()
    if not torch.equal(found.isneginf() & ~defined.isnan(), is_excluded) or bool(found[compared].isnan().any()):
        return float("inf")
    difference = (found - defined).masked_fill(~compared, 0.0)
    best = defined.masked_fill(~compared, float("-inf")).argmax(dim=-1, keepdim=True)
    return float((difference - difference.gather(-1, best)).masked_fill(~compared, 0.0).abs().max())


def random_sets(rule: RoutingRule, n: int, slots: int | None = None, seed: int = 0, empty: bool = False) -> Tensor:
    """``[n, slot]`` distinct experts, drawn anew for each token; with some empty slots if wanted."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(n, rule.n_experts, generator=generator).argsort(dim=-1)[:, : slots or rule.top_k]
    if empty:
        indices = indices.masked_fill(torch.rand(indices.shape, generator=generator) < 0.3, -1)
    return indices
