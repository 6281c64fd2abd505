"""What a router is trained towards: losses of its log-policy over routes whose cross-entropies are known.

With ``log pi(r) = sum over the experts e of r of log pi(e)`` (``rule.log_policy``; derived: it is not the probability
of drawing the set) and ``CE(r)`` the cross-entropy of the realized next token, in nats, with this token on route r.
All losses are ``[token]``, in nats (EPO: nats times nats), and are averaged over the tokens of a batch (derived).
Cross-entropies are constants here: no gradient runs through an expert or through a weight.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from moe_interp.types import EMPTY

Objective = Literal["epo", "cross_entropy", "listwise", "distill"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


def route_log_policy(log_policy: Tensor, routes: Tensor) -> Tensor:
    """``log pi(r) = sum_e log pi(e)``: ``[token, expert]`` and ``[token, *route, slot]`` to ``[token, *route]``.

    Empty slots (-1) count nothing.
    """
    flat = routes.flatten(1)
    summed = log_policy.gather(-1, flat.clamp(min=0)).masked_fill(flat == EMPTY, 0.0)
    return summed.view(routes.shape).sum(dim=-1)


def better_route(routes: Tensor, ce: Tensor) -> tuple[Tensor, Tensor]:
    """r+ and Delta: the route of least cross-entropy among the drawn ones, where it improves on the router's own.

    Args:
        routes: ``[token, route, slot]``; route 0 is the router's own, r-.
        ce: ``[token, route]``; NaN where there is no route.

    Returns:
        ``r+ [token, slot]`` (-1 throughout where no drawn route improves) and ``Delta = CE(r-) - CE(r+) [token]`` (0
        there).
    """
    drawn = ce[:, 1:].nan_to_num(nan=float("inf"))
    least, place = drawn.min(dim=-1)
    gain = ce[:, 0] - least
    improves = gain > 0
    better = routes[:, 1:].gather(1, place.view(-1, 1, 1).expand(-1, 1, routes.shape[-1])).squeeze(1)
    return better.masked_fill(~improves.unsqueeze(-1), EMPTY), gain.masked_fill(~improves, 0.0)


def epo_loss(
    log_policy: Tensor, log_reference: Tensor | None, own: Tensor, better: Tensor, gain: Tensor, beta: float
) -> Tensor:
    """``-Delta log sigmoid(beta ([log pi / pi_ref](r+) - [log pi / pi_ref](r-)))``.

    A token without a better route has loss 0, and gives no gradient.

    Args:
        log_policy, log_reference: ``[token, expert]``; None for a reference of 1.
        own, better: r- and r+ ``[token, slot]``.
        gain: Delta ``[token]``.
        beta: Larger: less far from the reference.

    Source: "When Are Experts Misrouted?" (EPO). It falls as r+ gains on r- relative to the reference, which may happen
    without r+ ever being the router's choice: see "adoption".
    """
    ratio = log_policy if log_reference is None else log_policy - log_reference
    margin = route_log_policy(ratio, better) - route_log_policy(ratio, own)
    return -gain * torch.nn.functional.logsigmoid(beta * margin)


def listwise_loss(log_policy: Tensor, routes: Tensor, ce: Tensor, temperature: float) -> Tensor:
    """``KL(q || p)`` over a token's distinct routes, ``q = softmax(-CE / temperature)`` and ``p = softmax(log pi)``.

    Args:
        log_policy: ``[token, expert]``.
        routes, ce: As for :func:`better_route`; the router's own route is one of them.
        temperature: In nats; the smaller, the more of q is on the best route.

    Source: derived (ListNet's cross-entropy, Cao et al. 2007, with utilities ``-CE``). It says nothing of routes that
    were not drawn.
    """
    is_out = ce.isnan() | repeated(routes)
    target = torch.log_softmax((-ce / temperature).masked_fill(is_out, float("-inf")), dim=-1)
    found = torch.log_softmax(route_log_policy(log_policy, routes).masked_fill(is_out, float("-inf")), dim=-1)
    return (target.exp() * (target - found).masked_fill(is_out, 0.0)).sum(dim=-1)


def distill_loss(log_policy: Tensor, better: Tensor) -> Tensor:
    """``-(1 / k) sum over the experts e of r+ of log pi(e)``: cross-entropy towards the best route's experts.

    A token without a better route has loss 0, and gives no gradient. Source: derived.
    """
    n = (better != EMPTY).sum(dim=-1).clamp(min=1)
    return -route_log_policy(log_policy, better) / n


def repeated(routes: Tensor) -> Tensor:
    """``[token, route]``: whether an earlier route of the token is the same set of experts."""
    ordered = routes.sort(dim=-1).values
    is_same = (ordered.unsqueeze(2) == ordered.unsqueeze(1)).all(dim=-1)
    return is_same.tril(-1).any(dim=-1)
