"""Routing rules: from router logits to a route, and the weights of any given set of experts.

Every rule reproduces its family's own selection and weights bit for bit, in the family's own order of operations and
number formats. The weights of a set that the router did not choose follow the same formula, with the given experts in
the place of the chosen ones (derived; for ``SparseMixer`` and ``SwitchTop1`` see there).

Shapes: logits and scores ``[*token, expert]``; indices and weights ``[*token, slot]``; index -1 is an empty slot, of
weight 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_interp.arch.routing_rule import RoutingRule, at_least_float, zero_empty_slots
from moe_interp.errors import RouteError
from moe_interp.types import Indices, Logits, Weights

__all__ = [
    "HashTable",
    "RoutingRule",
    "ScoreRule",
    "SigmoidTopK",
    "SoftmaxTopK",
    "SparseMixer",
    "SwitchTop1",
    "TopKSigmoid",
    "TopKSoftmax",
]

_SMALLEST, _SLOPE = 1e-6, 100.0  # of a score whose logarithm is taken, and of the line below it


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreRule(RoutingRule):
    """Scores of all experts, a choice by (biased, group-limited) scores, weights from the unbiased ones.

    ``choice = mask_groups(scores + bias)``; ``e = topk(choice)``; ``w = scores[e]``, then optionally
    ``w / max(sum w + eps, floor)``, ``* scale``, ``* expert_scale[e]``, a cast, ``* scale_after_cast``.

    Attributes:
        bias: Correction bias ``[expert]``, for the choice only.
        n_groups, top_groups: Experts in ``n_groups`` equal groups, of which the best ``top_groups`` stay open.
        group_score: What a group is ranked by: its "max", or the sum of its "top2" choices.
        excluded_score: The choice score of experts in the other groups: 0 or -inf, as the family does it.
        normalize: Divide the chosen weights by their sum.
        eps: Added to that sum.
        floor: Lower clamp of that sum.
        sorted_slots: Whether the family asks ``topk`` for sorted slots.
    """

    bias: Tensor | None = None
    n_groups: int = 1
    top_groups: int = 1
    group_score: str | None = None
    excluded_score: float = float("-inf")
    normalize: bool = False
    eps: float = 0.0
    floor: float | None = None
    scale: float | None = None
    expert_scale: Tensor | None = None
    scale_after_cast: float | None = None
    sorted_slots: bool = True

    def choice_logits(self, logits: Logits) -> Logits:
        """The log of the choice score ``s + b``, with -inf where a group is excluded (derived).

        A part of ``b`` that all experts share changes no choice and is left out: with biases of one sign, the one that
        is nearest to zero. Below 1e-6, where a negative bias may put a score, the logarithm goes on as a straight line,
        so that the order stays the family's. A family that sets excluded groups to 0 takes experts of these where fewer
        than a route takes have a positive score: there they are not masked.
        """
        log_scores = None if self._is_biased() else self._log_scores(logits)
        if self.group_score is None and log_scores is not None:
            return log_scores
        return self._ranked(self._biased(self._scores(logits)), log_scores)

    def ranking(self, logits: Logits, scores: Logits | None = None, raised: Tensor | None = None) -> Logits:
        if scores is None and raised is None:
            return self.choice_logits(logits)
        log_scores = self._log_scores(logits) if scores is None and not self._is_biased() else None
        choice = self._biased(self._scores(logits) if scores is None else scores)
        if raised is not None:
            shared = self._shared_bias()
            choice = _exp_extended(_log_extended(choice.double() - shared) + raised) + shared
            log_scores = None if log_scores is None else log_scores + raised
        return self._ranked(choice, log_scores)

    def _ranked(self, biased: Tensor, log_scores: Tensor | None) -> Tensor:
        """The log of what the experts are chosen by, as :meth:`choice_logits` says; of ``biased`` or as given."""
        if self.group_score is None:
            return _log_extended(biased.double() - self._shared_bias()) if log_scores is None else log_scores
        choice = self._limited(biased, excluded_score=float("-inf"))
        is_excluded = choice.isneginf()
        if self.excluded_score == 0:
            has_enough = (choice > 0).sum(dim=-1, keepdim=True) >= self.top_k
            is_excluded = is_excluded & has_enough
            choice = torch.where(has_enough, choice, self._limited(biased, excluded_score=0.0))
            log_scores = log_scores if bool(has_enough.all()) else None
        if log_scores is None:
            # in double precision, in which scores that differ still do after the logarithm
            log_scores = _log_extended(choice.double() - self._shared_bias())
        return log_scores.masked_fill(is_excluded, float("-inf"))

    def _is_biased(self) -> bool:
        """Whether there is a correction bias that is not the same for all experts."""
        return self.bias is not None and bool((self.bias != self.bias[0]).any())

    def _shared_bias(self) -> Tensor | float:
        """What all biases have in common: the part between zero and the nearest of them."""
        if self.bias is None:
            return 0.0
        bias = self.bias.detach().double()
        return torch.zeros_like(bias[0]).clamp(bias.min(), bias.max())

    def scores(self, logits: Logits) -> Logits:
        return self._scores(logits)

    def route_scores(self, scores: Logits) -> tuple[Indices, Weights]:
        self._check_width(scores)
        indices = self._top(scores)
        return indices, self._weigh_scores(scores, indices)

    def weights_from_scores(self, scores: Logits, indices: Indices, *, are_valid: bool = False) -> Weights:
        self._check_width(scores)
        if not are_valid:
            self._check_ids(indices)
        return self._weigh_scores(scores, indices)

    @abstractmethod
    def _scores(self, logits: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_scores(self, logits: Tensor) -> Tensor:
        """The log of the scores, up to a constant a token, also where the scores themselves underflow."""

    def _select(self, logits: Tensor) -> Tensor:
        return self._top(self._scores(logits))

    def _top(self, scores: Tensor) -> Tensor:
        return torch.topk(
            self._choice(scores, self.excluded_score), self.top_k, dim=-1, sorted=self.sorted_slots
        ).indices

    def _choice(self, scores: Tensor, excluded_score: float) -> Tensor:
        return self._limited(self._biased(scores), excluded_score)

    def _biased(self, scores: Tensor) -> Tensor:
        return scores if self.bias is None else scores + self.bias

    def _limited(self, choice: Tensor, excluded_score: float) -> Tensor:
        """The choice scores, with ``excluded_score`` at the experts of excluded groups."""
        if self.group_score is None:
            return choice
        # shape: (*token, expert) -> (*token, group, expert of the group)
        grouped = choice.unflatten(-1, (self.n_groups, self.n_experts // self.n_groups))
        best = grouped.max(dim=-1).values if self.group_score == "max" else grouped.topk(2, dim=-1)[0].sum(dim=-1)
        kept = torch.topk(best, self.top_groups, dim=-1, sorted=False).indices
        is_open = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, kept, True)
        return grouped.masked_fill(~is_open.unsqueeze(-1), excluded_score).flatten(-2)

    def _weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return self._weigh_scores(self._scores(logits), indices)

    def _weigh_scores(self, scores: Tensor, indices: Tensor) -> Tensor:
        ids = indices.clamp(min=0)
        weights = zero_empty_slots(scores.gather(-1, ids), indices)
        if self.normalize:
            total = weights.sum(dim=-1, keepdim=True)
            total = total + self.eps if self.eps else total
            total = total if self.floor is None else torch.clamp(total, min=self.floor)
            weights = _divide(weights, total, indices)
        if self.scale is not None:
            weights = weights * self.scale
        if self.expert_scale is not None:
            weights = weights * self.expert_scale[ids]
        weights = self._cast(weights, indices)
        return weights if self.scale_after_cast is None else weights * self.scale_after_cast


@dataclass(frozen=True, eq=False, kw_only=True)
class SoftmaxTopK(ScoreRule):
    """Softmax over all experts in float32, then top-k (Mixtral, OLMoE, Qwen, DeepSeek-V2, ERNIE, Jamba, Gemma 4)."""

    def _scores(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=-1, dtype=torch.float32)

    def _log_scores(self, logits: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True, eq=False, kw_only=True)
class SigmoidTopK(ScoreRule):
    """A score per expert, then top-k (DeepSeek-V3 and V4, GLM-4, MiniMax-M2, LFM2, AFMoE, Laguna, Nemotron-H).

    Attributes:
        score: The score function; the logistic sigmoid unless the family has its own.
        softcap: ``logits = softcap * tanh(logits / softcap)`` before the score.
        float32: Compute the scores in float32.
    """

    score: Callable[[Tensor], Tensor] = torch.sigmoid
    softcap: float | None = None
    float32: bool = True

    def capped(self, logits: Tensor) -> Tensor:
        """The logits after the soft-cap, as the family's router returns them."""
        logits = logits.float() if self.float32 else logits
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def _scores(self, logits: Tensor) -> Tensor:
        return self.score(self.capped(logits))

    def _log_scores(self, logits: Tensor) -> Tensor:
        capped = at_least_float(self.capped(logits))
        if self.score is torch.sigmoid:
            return torch.nn.functional.logsigmoid(capped)
        return self.score(capped).clamp_min(torch.finfo(capped.dtype).tiny).log()

    def log_policy(self, logits: Logits) -> Logits:
        """``log(s_e / sum s)`` of the unbiased scores (derived)."""
        return torch.log_softmax(self._log_scores(logits), dim=-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class TopKSoftmax(RoutingRule):
    """Top-k of the logits, then a softmax over the chosen (GPT-OSS, Granite, JetMoE).

    Attributes:
        float32: Whether the family raises the logits to float32 first.
    """

    float32: bool = False

    def _weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        logits = logits.float() if self.float32 else logits
        chosen = logits.gather(-1, indices.clamp(min=0))
        chosen = chosen.masked_fill(indices < 0, float("-inf"))
        all_empty = (indices < 0).all(dim=-1, keepdim=True)
        return self._cast(torch.softmax(chosen.masked_fill(all_empty, 0.0), dim=-1), indices)


@dataclass(frozen=True, eq=False, kw_only=True)
class TopKSigmoid(RoutingRule):
    """Top-k of the logits, then a sigmoid of each (Llama 4; the weight scales the expert's input)."""

    def _weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        # at full width, as the family does it: a vectorised sigmoid rounds by the place of a value in its tensor
        return self._cast(torch.sigmoid(logits.float()).gather(-1, indices.clamp(min=0)), indices)

    def choice_logits(self, logits: Logits) -> Logits:
        """``log sigmoid(logits)``: in the order of the logits, on the scale of :meth:`log_policy` (derived)."""
        return torch.nn.functional.logsigmoid(at_least_float(logits))

    def log_policy(self, logits: Logits) -> Logits:
        """``log(s_e / sum s)`` with ``s = sigmoid(logits)`` (derived)."""
        return torch.log_softmax(self.choice_logits(logits), dim=-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseMixer(RoutingRule):
    """Two masked maxima (Phi-MoE; arXiv:2409.12136), as computed at evaluation.

    Slot j looks at the logits without the experts of the slots before it. With m its maximum, experts with
    ``(m - logit) / max(|logit|, m) > 2 * jitter`` are masked, and the weight is the softmax of the rest at the maximum.
    The weights need not sum to 1.

    For a given set (derived): the route is put into canonical order, by descending logit; slot j leaves out the experts
    of the slots before it, and the given expert's logit takes the place of the maximum. Weights are returned in the
    given order and do not depend on it. Defined for any number of slots.

    Attributes:
        jitter: The family's ``router_jitter_noise``.
    """

    jitter: float

    def _select(self, logits: Tensor) -> Tensor:
        chosen = []
        rest = logits
        for _ in range(self.top_k):
            best = rest.max(dim=-1, keepdim=True).indices
            chosen.append(best)
            rest = rest.scatter(-1, best, float("-inf"))
        return torch.cat(chosen, dim=-1)

    def _weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        ids = indices.clamp(min=0)
        key = logits.detach().gather(-1, ids).masked_fill(indices < 0, float("-inf"))
        order = torch.sort(key, dim=-1, descending=True, stable=True).indices
        rest, weights = logits, []
        for slot in order.split(1, dim=-1):
            expert = ids.gather(-1, slot)
            empty = indices.gather(-1, slot) < 0
            weights.append(self._masked_softmax(logits, rest, expert).masked_fill(empty, 0.0))
            rest = torch.where(empty, rest, rest.scatter(-1, expert, float("-inf")))
        sorted_weights = torch.cat(weights, dim=-1)
        return self._cast(torch.zeros_like(sorted_weights).scatter(-1, order, sorted_weights), indices)

    def _masked_softmax(self, logits: Tensor, rest: Tensor, expert: Tensor) -> Tensor:
        with torch.no_grad():
            top = logits.gather(-1, expert)
            masked = ((top - logits) / logits.abs().clamp(min=top)) > (2 * self.jitter)
        return torch.softmax(rest.masked_fill(masked, float("-inf")), dim=-1).gather(-1, expert)


@dataclass(frozen=True, eq=False, kw_only=True)
class SwitchTop1(RoutingRule):
    """Softmax, top-1, and a capacity along the sequence (Switch Transformers).

    The token at position t takes its expert only if fewer than ``capacity`` earlier tokens of its sequence took it;
    otherwise its slot is empty. ``route`` therefore needs ``[batch, pos, expert]``; padding consumes capacity.
    Given experts bypass the capacity (derived).

    Attributes:
        capacity: Tokens per expert and sequence.
        router_dtype: Number format of the softmax.
    """

    has_capacity: ClassVar[bool] = True

    capacity: int
    router_dtype: torch.dtype = torch.float32

    def scores(self, logits: Logits) -> Logits:
        return torch.softmax(logits, dim=-1, dtype=self.router_dtype).to(self.dtype or logits.dtype)

    def route_scores(self, scores: Logits) -> tuple[Indices, Weights]:
        self._check_width(scores)
        best = torch.argmax(scores, dim=-1, keepdim=True)
        taken = torch.zeros_like(scores, dtype=torch.int64).scatter_(-1, best, 1)
        place = torch.cumsum(taken, dim=-2).gather(-1, best)
        indices = best.masked_fill(place > self.capacity, -1)
        return indices, self.weights_from_scores(scores, indices)

    def weights_from_scores(self, scores: Logits, indices: Indices, *, are_valid: bool = False) -> Weights:
        return zero_empty_slots(scores.gather(-1, indices.clamp(min=0)), indices)

    def route(self, logits: Logits, token_ids: Tensor | None = None) -> tuple[Indices, Weights]:
        self._check_width(logits)
        if logits.ndim < 2:
            raise RouteError(
                f"router logits of shape {tuple(logits.shape)}",
                "[batch, pos, expert], because capacity is counted along the sequence",
                "Pass the logits of whole sequences.",
            )
        return self.route_scores(self.scores(logits))

    def _weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        return self.weights_from_scores(self.scores(logits), indices)


@dataclass(frozen=True, eq=False, kw_only=True)
class HashTable(SigmoidTopK):
    """Experts fixed by the token id, weights from the scores (DeepSeek-V4 hash layers): logits cannot move the choice.

    ``choice_logits`` ranks by the scores, which choose nothing here: of the experts that a token could also take.

    Attributes:
        table: ``[vocabulary, slot]`` expert ids.
    """

    table: Tensor

    def route(self, logits: Logits, token_ids: Tensor | None = None) -> tuple[Indices, Weights]:
        if token_ids is None:
            raise RouteError(
                "no token ids for a hash-routed layer",
                "token_ids of shape [*token]",
                "Pass the token ids: they alone choose the experts here.",
            )
        indices = self.table[token_ids].long()
        return indices, self.weights(logits, indices)


def _divide(weights: Tensor, total: Tensor, indices: Tensor) -> Tensor:
    """``weights / total``, with 0 instead of 0/0 for a token whose slots are all empty."""
    all_empty = (indices < 0).all(dim=-1, keepdim=True)
    return weights / total.masked_fill(all_empty, 1.0)


def _log_extended(scores: Tensor) -> Tensor:
    """The logarithm, and below ``_SMALLEST`` a straight line that goes on from it: finite, and rising throughout."""
    return scores.clamp_min(_SMALLEST).log() + _SLOPE * (scores - _SMALLEST).clamp_max(0.0)


def _exp_extended(logs: Tensor) -> Tensor:
    """The inverse of :func:`_log_extended`."""
    smallest = math.log(_SMALLEST)
    return logs.clamp_min(smallest).exp() + (logs - smallest).clamp_max(0.0) / _SLOPE
