"""What every routing rule can be asked, and what the families' rules share.

Shapes: logits and scores ``[*token, expert]``; indices and weights ``[*token, slot]``; index -1 is an empty slot, of
weight 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_interp.errors import RouteError
from moe_interp.types import EMPTY, Indices, Logits, Weights


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingRule(ABC):
    """How one family turns router logits into experts and weights.

    Attributes:
        n_experts: Number of routed experts.
        top_k: Experts per token.
        dtype: Number format the family casts its weights to; None leaves them as computed.
        has_capacity: Whether its own routes may have empty slots.
    """

    has_capacity: ClassVar[bool] = False

    n_experts: int
    top_k: int
    dtype: torch.dtype | None = None

    def route(self, logits: Logits, token_ids: Tensor | None = None) -> tuple[Indices, Weights]:
        """The experts the family selects and the weights it applies, in the router's own slot order.

        Args:
            logits: ``[*token, expert]``, the raw output of the router's linear map.
            token_ids: ``[*token]``; read by hash-routed layers only.

        Raises:
            RouteError: the last axis is not the number of experts.
        """
        self._check_width(logits)
        indices = self._select(logits)
        return indices, self._weigh(logits, indices)

    def weights(self, logits: Logits, indices: Indices, *, are_valid: bool = False) -> Weights:
        """The family's own weights for any given experts, in the given order; 0 at empty slots.

        Args:
            logits: ``[*token, expert]``.
            indices: ``[*token, slot]``.
            are_valid: The ids are known to be in range. They are then not looked at, for which the host would have to
                wait for the device.

        Raises:
            RouteError: the last axis of ``logits`` is not the number of experts, or an id is out of range.
        """
        self._check_width(logits)
        if not are_valid:
            self._check_ids(indices)
        return self._weigh(logits, indices)

    def choice_logits(self, logits: Logits) -> Logits:
        """What the family ranks experts by, on the scale of log-probabilities, up to a constant a token.

        It has the order of the family's own ranking, correction bias and group limit included; -inf where a group is
        shut. Without bias and groups its softmax is exp of :meth:`log_policy`: the logits where the family takes their
        softmax, the log of the scores where it takes scores of another kind (derived). So that noise of one size, and
        a sampler's temperature, mean the same in every family.
        """
        return logits

    def ranking(self, logits: Logits, scores: Logits | None = None, raised: Tensor | None = None) -> Logits:
        """:meth:`choice_logits`, also of edited scores, and with something added to it before groups are chosen.

        Args:
            logits: ``[*token, expert]``.
            scores: Edited scores ``[*token, expert]`` in the place of those of ``logits``.
            raised: Added to the choice logits, ``[*token, expert]``, in nats; a group is ranked by what its experts
                then have (derived).
        """
        choice = (
            self.choice_logits(logits) if scores is None else scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        )
        return choice if raised is None else choice + raised

    def log_policy(self, logits: Logits) -> Logits:
        """A log-distribution over experts: log-softmax of the logits (derived; sigmoid families override).

        "Routing probability" anywhere in this package means exp of it. It leaves out correction biases and group
        limits, so it does not say which experts run.
        """
        return torch.log_softmax(at_least_float(logits), dim=-1)

    def scores(self, logits: Logits) -> Logits | None:
        """The full-width scores the family selects by, or None where it has none before selecting."""
        return None

    def route_scores(self, scores: Logits) -> tuple[Indices, Weights]:
        """Select and weigh by (edited) scores; correction bias and group limits are applied after."""
        raise self._no_scores()

    def weights_from_scores(self, scores: Logits, indices: Indices, *, are_valid: bool = False) -> Weights:
        """The weights of given experts from (edited) scores; ``are_valid`` as in :meth:`weights`."""
        raise self._no_scores()

    @property
    def has_scores(self) -> bool:
        """Whether the family computes full-width scores before it selects."""
        return type(self).scores is not RoutingRule.scores

    # -- for subclasses ---------------------------------------------------------------------------------------------
    def _select(self, logits: Tensor) -> Tensor:
        return torch.topk(logits, self.top_k, dim=-1).indices

    @abstractmethod
    def _weigh(self, logits: Tensor, indices: Tensor) -> Tensor: ...

    def _cast(self, weights: Tensor, indices: Tensor) -> Tensor:
        weights = weights if self.dtype is None else weights.to(self.dtype)
        return zero_empty_slots(weights, indices)

    def _check_width(self, logits: Tensor) -> None:
        if logits.shape[-1] != self.n_experts:
            raise RouteError(
                f"router logits of shape {tuple(logits.shape)}",
                f"{self.n_experts} experts on the last axis",
                "Pass the full width of the router's output.",
            )

    def _check_ids(self, indices: Tensor) -> None:
        if indices.numel() and (int(indices.max()) >= self.n_experts or int(indices.min()) < -1):
            bad = indices[(indices >= self.n_experts) | (indices < -1)][0]
            raise RouteError(
                f"expert id {int(bad)} in a route",
                f"ids from 0 to {self.n_experts - 1}, or -1 for an empty slot",
                "Correct the id.",
            )

    def _no_scores(self) -> RouteError:
        return RouteError(
            f"scores for {type(self).__name__}, which computes none before it selects",
            "a rule with full-width scores",
            "Edit router_logits instead of router_probs.",
        )


def zero_empty_slots(weights: Tensor, indices: Tensor) -> Tensor:
    """Weight 0 at empty slots. Whether there are any is not asked: the host would wait for the device."""
    return weights.masked_fill(indices < 0, 0.0)


def at_least_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def widen(values: Tensor, slots: int, fill: float) -> Tensor:
    """``[..., slot]`` with ``fill`` in further slots, up to so many."""
    return nn.functional.pad(values, (0, slots - values.shape[-1]), value=fill)


def keep_unchanged(ruled: Tensor, weights: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """A rule's weights for written routes; routes that are as they were keep theirs bit for bit.

    Args:
        ruled: ``[..., slot]``, the rule's weights of the new routes.
        weights: Those of the old ones.
        old, new: The routes, of any number of slots.
    """
    slots = max(old.shape[-1], new.shape[-1])
    same = (widen(old, slots, EMPTY) == widen(new, slots, EMPTY)).all(dim=-1, keepdim=True)
    return torch.where(same, widen(weights, slots, 0.0)[..., : new.shape[-1]], ruled.to(weights.dtype))
