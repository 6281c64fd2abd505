"""What a family's router module returns, read into one form and written back.

``read`` gives ``(logits, indices, weights)``: raw logits ``[*token, expert]``, the native route ``[*token, slot]``.
Where the return value does not hold the raw logits, they are captured while the router runs.
``write`` gives the router's own return value for another route, so that the family's own code goes on from it; or for
the same choice of experts (``same_route``) with other tensors of logits and weights.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from moe_interp.arch.captured_logits import CapturedLogits
from moe_interp.arch.rules import RoutingRule, SigmoidTopK
from moe_interp.errors import RouteError

Route = tuple[Tensor, Tensor]


def unpacked(router: Any, out: Any, choice: int) -> tuple[Tensor, Tensor, Tensor]:
    """A router's three tensors, of which number ``choice`` holds expert ids.

    Raises:
        RouteError: The router returns something else. Other releases of transformers order the three otherwise, or
            return the logits alone; weights read as ids would be silently wrong.
    """
    three = isinstance(out, tuple) and len(out) == 3 and all(isinstance(part, Tensor) for part in out)
    if not three or out[choice].is_floating_point():
        parts = out if isinstance(out, tuple) else (out,)
        given = ", ".join(str(getattr(part, "dtype", type(part).__name__)) for part in parts)
        raise RouteError(
            f"{type(router).__name__} returns ({given})",
            f"three tensors, of which number {choice + 1} holds expert ids (integers)",
            "Install transformers 5.21 to 5.23; earlier releases order what this router returns in another way.",
        )
    return out


class RouterLayout(Protocol):
    """One way of packing logits, weights and indices into a return value.

    Attributes:
        captures_logits: Whether ``read`` needs the logits captured during the call; else it calls the router again.
        choice: Which part of the return value says what experts are chosen.
    """

    captures_logits: bool
    choice: int

    def read(
        self, router: Any, rule: RoutingRule, x: Tensor, out: Any, captured: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def write(
        self, rule: RoutingRule, logits: Tensor, scores: Tensor | None, route: Route, out: Any, same_route: bool = False
    ) -> Any: ...


class Triple:
    """``(logits, weights, indices)``: nearly every family."""

    captures_logits = False
    choice = 2

    def read(
        self, router: Any, rule: RoutingRule, x: Tensor, out: Any, captured: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = unpacked(router, out, self.choice)
        return logits, indices, weights

    def write(
        self, rule: RoutingRule, logits: Tensor, scores: Tensor | None, route: Route, out: Any, same_route: bool = False
    ) -> Any:
        indices, weights = route
        return logits, weights, indices


class CappedTriple(Triple):
    """Laguna: the returned logits are after the soft-cap, the weights before the block's scale."""

    captures_logits = True

    def read(
        self, router: Any, rule: RoutingRule, x: Tensor, out: Any, captured: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, weights, indices = unpacked(router, out, self.choice)
        raw = _captured_logits(router, rule, x) if captured is None else captured
        return raw.float(), indices, weights * _block_scale(rule)

    def write(
        self, rule: RoutingRule, logits: Tensor, scores: Tensor | None, route: Route, out: Any, same_route: bool = False
    ) -> Any:
        assert isinstance(rule, SigmoidTopK)
        indices, weights = route
        return rule.capped(logits), weights / _block_scale(rule), indices


def _captured_logits(router: Any, rule: RoutingRule, x: Tensor) -> Tensor:
    with CapturedLogits(router, rule.n_experts) as captured:
        router(x)
    return captured.logits


def _block_scale(rule: RoutingRule) -> float:
    return getattr(rule, "scale_after_cast", None) or 1.0


class ScoresTriple(Triple):
    """Gemma 4: ``(probabilities, weights, indices)``; the logits are those of the inner projection."""

    captures_logits = True

    def read(
        self, router: Any, rule: RoutingRule, x: Tensor, out: Any, captured: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, weights, indices = unpacked(router, out, self.choice)
        return (_captured_logits(router, rule, x) if captured is None else captured), indices, weights

    def write(
        self, rule: RoutingRule, logits: Tensor, scores: Tensor | None, route: Route, out: Any, same_route: bool = False
    ) -> Any:
        indices, weights = route
        return (rule.scores(logits) if scores is None else scores), weights, indices


class DenseScores:
    """Llama 4: ``(weights at full width, logits)``, zero where an expert is not chosen."""

    captures_logits = False
    choice = 0

    def read(
        self, router: Any, rule: RoutingRule, x: Tensor, out: Any, captured: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = out[1]
        return logits, *rule.route(logits)

    def write(
        self, rule: RoutingRule, logits: Tensor, scores: Tensor | None, route: Route, out: Any, same_route: bool = False
    ) -> Any:
        indices, weights = route
        dense = torch.zeros_like(logits).scatter_add(-1, indices.clamp(min=0), weights.to(logits.dtype))
        return dense, logits

    def chosen_route(self, out: Any) -> Route:
        """The route that the block goes on with: every expert with a weight."""
        dense = out[0]
        slots = max(int((dense != 0).sum(dim=-1).max()), 1)
        indices = dense.abs().topk(slots, dim=-1).indices
        weights = dense.gather(-1, indices)
        return indices.masked_fill(weights == 0, -1), weights


class OneHot:
    """Switch Transformers: ``(one-hot choice, weight of the choice, logits)``, all over ``[batch, pos]``."""

    captures_logits = False
    choice = 0

    def read(
        self, router: Any, rule: RoutingRule, x: Tensor, out: Any, captured: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return unpacked(router, out, self.choice)[2], *self.chosen_route(out)

    def write(
        self, rule: RoutingRule, logits: Tensor, scores: Tensor | None, route: Route, out: Any, same_route: bool = False
    ) -> Any:
        indices, weights = route
        chosen = torch.zeros_like(logits, dtype=torch.int64)
        chosen = chosen.scatter(-1, indices[..., :1].clamp(min=0), (indices[..., :1] >= 0).long())
        return chosen, weights[..., :1], logits

    def chosen_route(self, out: Any) -> Route:
        """The route that the block goes on with."""
        chosen, weights, _ = out
        indices = chosen.argmax(dim=-1, keepdim=True).masked_fill(chosen.sum(dim=-1, keepdim=True) == 0, -1)
        return indices, weights.masked_fill(indices < 0, 0.0)


class SortedPairs:
    """JetMoE: (token, slot) pairs sorted by expert: ``(order, tokens, weights, sizes, logits)``."""

    captures_logits = False
    choice = 0

    def read(
        self, router: Any, rule: RoutingRule, x: Tensor, out: Any, captured: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = out[-1]
        return logits, *rule.route(logits)

    def write(
        self, rule: RoutingRule, logits: Tensor, scores: Tensor | None, route: Route, out: Any, same_route: bool = False
    ) -> Any:
        indices, weights = route
        if same_route:
            order, tokens, _, sizes, _ = out
            return order, tokens, weights.reshape(-1)[order], sizes, logits
        experts = indices.reshape(-1)
        order = experts.sort(0).indices[(experts < 0).sum() :]
        sizes = torch.bincount(experts[experts >= 0], minlength=rule.n_experts).tolist()
        return order, order.div(indices.shape[-1], rounding_mode="trunc"), weights.reshape(-1)[order], sizes, logits
