"""The routing rules a second time, to check the first by: in double precision, straight from their definitions.

Nothing here calls a method of a rule: only its parameters are read (biases, groups, scales), which the comparison with
the router's own replies checks. Shapes as in :mod:`moe_interp.arch.rules`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_interp.arch.rules import RoutingRule, ScoreRule, SigmoidTopK, SoftmaxTopK, SparseMixer, SwitchTop1, TopKSigmoid

_SMALLEST = 1e-3  # of a choice score with a bias, whose logarithm is compared; 1e-6 without one


def scores(rule: RoutingRule, logits: Tensor) -> Tensor | None:
    """The full-width scores, or None where the family has none before selecting."""
    z = logits.double()
    if isinstance(rule, SoftmaxTopK | SwitchTop1):
        return (z - z.logsumexp(dim=-1, keepdim=True)).exp()
    if isinstance(rule, SigmoidTopK):
        z = z if rule.softcap is None else rule.softcap * torch.tanh(z / rule.softcap)
        return 1 / (1 + torch.exp(-z)) if rule.score is torch.sigmoid else rule.score(z)
    return None


def weights(rule: RoutingRule, logits: Tensor, indices: Tensor, given: Tensor | None = None) -> Tensor:
    """The family's weights for any experts, from logits or from the ``given`` scores; 0 at empty slots."""
    z, ids, is_empty = logits.double(), indices.clamp(min=0), indices < 0
    if isinstance(rule, SparseMixer):
        return _sparse_mixer(rule, z, indices)
    found = scores(rule, logits) if given is None else given.double()
    if isinstance(rule, TopKSigmoid):
        return (1 / (1 + torch.exp(-z))).gather(-1, ids).masked_fill(is_empty, 0.0)
    if found is None:  # a softmax over the chosen
        raised = (z - z.amax(dim=-1, keepdim=True).detach()).exp().gather(-1, ids).masked_fill(is_empty, 0.0)
        return raised / raised.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    chosen = found.gather(-1, ids).masked_fill(is_empty, 0.0)
    if not isinstance(rule, ScoreRule):
        return chosen
    if rule.normalize:
        total = chosen.sum(dim=-1, keepdim=True) + rule.eps
        chosen = chosen / (total if rule.floor is None else total.clamp_min(rule.floor)).clamp_min(1e-300)
    factor = (rule.scale or 1.0) * (rule.scale_after_cast or 1.0)
    chosen = chosen * factor
    return chosen if rule.expert_scale is None else chosen * rule.expert_scale.double()[ids]


def choice(rule: RoutingRule, logits: Tensor, given: Tensor | None = None) -> Tensor:
    """What the family ranks by: logits, or scores with their bias; -inf where a group is shut."""
    if not isinstance(rule, ScoreRule):
        return logits.double()
    found = scores(rule, logits) if given is None else given.double()
    assert found is not None
    ranked = found if rule.bias is None else found + rule.bias.double()
    if rule.group_score is None:
        return ranked
    grouped = ranked.unflatten(-1, (rule.n_groups, -1))
    ordered = grouped.sort(dim=-1, descending=True).values
    best = ordered[..., 0] if rule.group_score == "max" else ordered[..., :2].sum(dim=-1)
    place = best.argsort(dim=-1, descending=True).argsort(dim=-1)
    return grouped.masked_fill((place >= rule.top_groups).unsqueeze(-1), float("-inf")).flatten(-2)


def log_choice(rule: RoutingRule, logits: Tensor) -> Tensor:
    """The log of what the family ranks by, up to a constant a token; NaN where it is too near zero to compare.

    Of logits it is these, of scores ``log(s + b)`` less the part of ``b`` that all experts share. -inf where shut.
    """
    if not isinstance(rule, ScoreRule):
        return torch.nn.functional.logsigmoid(logits.double()) if isinstance(rule, TopKSigmoid) else logits.double()
    ranked, smallest = choice(rule, logits), 1e-6
    if rule.bias is not None:
        bias = rule.bias.double()
        ranked = ranked - torch.zeros_like(bias[0]).clamp(bias.min(), bias.max())
        smallest = _SMALLEST if bool((bias != bias[0]).any()) else smallest
    is_excluded = ranked.isneginf()
    if rule.excluded_score == 0.0:  # where too few others are positive, experts of excluded groups are taken too
        too_few = (choice(rule, logits) > 0).sum(dim=-1, keepdim=True) < rule.top_k
        is_excluded = is_excluded & ~too_few
    found = torch.where(ranked > smallest, ranked.clamp_min(1e-300).log(), float("nan"))
    return found.masked_fill(is_excluded, float("-inf"))


def log_policy(rule: RoutingRule, logits: Tensor) -> Tensor:
    """``log(s_e / sum s)`` of sigmoid-like scores, the log-softmax of the logits elsewhere."""
    z = logits.double()
    if isinstance(rule, TopKSigmoid):
        z = torch.nn.functional.logsigmoid(z)
    elif isinstance(rule, SigmoidTopK):
        found = scores(rule, logits)
        assert found is not None
        z = found.clamp_min(1e-300).log()
    return z - z.logsumexp(dim=-1, keepdim=True)


def _sparse_mixer(rule: SparseMixer, z: Tensor, indices: Tensor) -> Tensor:
    """Slot by slot in descending logit: the softmax at the slot's expert, of what is near it and not taken before."""
    ids, is_empty = indices.clamp(min=0), indices < 0
    chosen = z.gather(-1, ids).masked_fill(is_empty, float("-inf"))
    found = torch.zeros_like(chosen)
    for slot in range(indices.shape[-1]):
        top = chosen[..., slot : slot + 1].masked_fill(is_empty[..., slot : slot + 1], 0.0)
        mine = ids[..., slot : slot + 1]
        # taken before: higher logits, and of equal ones the earlier slots
        earlier = (chosen > top) | ((chosen == top) & (torch.arange(chosen.shape[-1], device=z.device) < slot))
        taken = torch.zeros_like(z, dtype=torch.int64).scatter_add(-1, ids, (earlier & ~is_empty).long()) > 0
        far = (top - z) / torch.maximum(z.abs(), top) > 2 * rule.jitter
        near = z.masked_fill(far.detach() | taken, float("-inf"))
        weight = (z.gather(-1, mine) - near.logsumexp(dim=-1, keepdim=True)).exp()
        found = found.index_copy(-1, torch.tensor([slot], device=z.device), weight)
    return found.masked_fill(is_empty, 0.0)
