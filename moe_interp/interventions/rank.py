"""Move experts up or down in what the family ranks them by, or take another number of the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable, ScoreRule
from moe_interp.checks import check_whole
from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import MoEHooks, check_attached
from moe_interp.hooks.layer import LayerPass
from moe_interp.interventions.named import Layers, chosen_layers, experts_by_layer
from moe_interp.interventions.positions import Positions, TokenSelection, merge_slots
from moe_interp.interventions.route_writer import Demands, contradiction, demands_of, members
from moe_interp.types import EMPTY, Hooks, Layer

LARGEST_MARGIN = 500.0
Experts = int | Sequence[int] | Mapping[Any, int | Sequence[int]]


def promote_experts(
    moe: MoEHooks,
    layer: Layers,
    experts: Experts,
    margin: float | None = None,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Rank experts first, so that every token that is asked uses them, in every family.

    Without ``margin``, for certain: a token's route becomes these experts and the best others that it has, as many in
    all as before; a token that uses them already is untouched. What the family ranks by does not stand in the way:
    neither a correction bias, nor a group that is shut, nor a table of token ids (hash layers), nor a capacity
    (Switch: a token beyond it uses the expert all the same).

    With ``margin``: it is added to the experts' ``choice_logits``, in nats, before groups are chosen, and they are used
    where the family would then choose them. 0 changes nothing.

    The weights are the family's own for the resulting set, from logits that nothing was added to; promoted experts come
    first in the slots.

    Args:
        moe: Attached hooks.
        layer: An MoE layer, several, or None for all (for a mapping: those it names).
        experts: Expert ids, the same at each layer; or a mapping from each layer to its ids.
        margin: From 0 to 500, or None.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

    Raises:
        RouteError: an id out of range, an expert twice; when it runs, an expert that another intervention took away
            from the token, or more experts than the token uses.
        ConfigError: no experts, more than a token uses, or another margin.

    Source: derived. SteerMoE sets log-probabilities to their maximum plus .01, which a family that ranks by other
    numbers does not follow.
    """
    check_attached(moe)
    margin = _checked_margin(margin)
    chosen = experts_by_layer(moe, layer, experts, "promote_experts")
    for label, ids in chosen.items():
        if len(ids) > (top_k := moe.spec(label).top_k):
            raise ConfigError(
                f"{len(ids)} experts to promote at layer {label!r}",
                f"at most the {top_k} that a token uses there",
                "Promote fewer; force_experts runs any number.",
            )

    def promote(ids: Tensor) -> Ask:
        def ask(run: LayerPass, demands: Demands, tokens: Tensor, has: Tensor) -> tuple[Tensor | None, Tensor | None]:
            mine = _at(tokens, ids, has)
            if margin is not None:
                return _raise(run, demands, mine * margin, has) & mine, None
            if bool((mine & demands.banned).any()):
                raise contradiction(demands.layer, mine & demands.banned, "suppressed", "promoted after that")
            demands.promoted = demands.promoted | mine
            return None, None

        return ask

    return _hooks(moe, {label: promote(ids) for label, ids in chosen.items()}, positions, attention_mask)


def suppress_experts(
    moe: MoEHooks,
    layer: Layers,
    experts: Experts,
    margin: float | None = None,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Rank experts last, so that no token that is asked uses them, in every family.

    Without ``margin``, for certain: a token that uses some of them takes the next best others in their place, from the
    groups that the family has open first (where it has groups), and from the rest where these have no more. Tokens that
    use none of them are untouched. With ``margin``: it is subtracted from the experts' ``choice_logits``, in nats,
    before groups are chosen; experts are left where the family would then not choose them.

    The weights are the family's own for the resulting set. ``ablate_experts(mode="reroute")`` does the same within the
    open groups alone, and leaves slots empty where these have no more.

    Args:
        moe: Attached hooks.
        layer, experts, margin, positions, attention_mask: See :func:`promote_experts`.

    Raises:
        RouteError: an id out of range, an expert twice; when it runs, an expert that another intervention sends the
            token to, or a route that uses more experts than are left (as of ``uniform_routing``).
        ConfigError: no experts, fewer left than a token uses, or another margin.
    """
    check_attached(moe)
    margin = _checked_margin(margin)
    chosen = experts_by_layer(moe, layer, experts, "suppress_experts")
    for label, ids in chosen.items():
        spec = moe.spec(label)
        if spec.n_experts - len(ids) < spec.top_k:
            raise ConfigError(
                f"{spec.n_experts - len(ids)} experts left of {spec.n_experts} at layer {label!r}",
                f"at least the {spec.top_k} that a token uses",
                'Suppress fewer; ablate_experts(mode="zero") takes their outputs away and nothing in their place.',
            )

    def suppress(ids: Tensor) -> Ask:
        def ask(run: LayerPass, demands: Demands, tokens: Tensor, has: Tensor) -> tuple[Tensor | None, Tensor | None]:
            mine = _at(tokens, ids, has)
            if margin is not None:
                return None, mine & has & ~_raise(run, demands, mine * -margin, has)
            if bool((wrong := mine & demands.kept).any()):
                was = "promoted" if bool((mine & demands.promoted).any()) else "forced"
                raise contradiction(demands.layer, wrong, was, "suppressed after that")
            demands.banned = demands.banned | mine
            return None, None

        return ask

    return _hooks(moe, {label: suppress(ids) for label, ids in chosen.items()}, positions, attention_mask)


def change_top_k(
    moe: MoEHooks,
    layer: Layers,
    k: int,
    positions: Positions = None,
    attention_mask: Tensor | None = None,
) -> Hooks:
    """Give tokens another number of experts: their best ``k``, with the family's own weights for that set.

    A smaller k is what the family itself does with that k, in every family. A larger one as well, up to the number of
    experts, or of those in the groups that stay open (DeepSeek-V2 and V3, GLM-4, Nemotron-H), with these exceptions,
    which are derived: Phi-MoE's rule has two slots, and each further one is the next masked maximum; Switch
    Transformers use one expert, and others bring their probabilities as weights, while a token beyond its capacity
    stays without; a hash layer of DeepSeek-V4 has a table of ``top_k`` experts, of which the best by score stay and to
    which the next best by score are added.

    Args:
        moe: Attached hooks.
        layer: An MoE layer, several, or None for all.
        k: Experts a token, at least 1.
        positions, attention_mask: See :class:`moe_interp.interventions.positions.TokenSelection`.

    Raises:
        ConfigError: a k that is no whole number, below 1, or more than the layer has.
        RouteError: when it runs, fewer slots than experts that were forced or promoted, or fewer experts left.
    """
    check_attached(moe)
    labels = chosen_layers(moe, layer)
    for label in labels:
        rule = moe.spec(label).rule
        is_grouped = isinstance(rule, ScoreRule) and rule.group_score is not None and not isinstance(rule, HashTable)
        most = rule.n_experts // rule.n_groups * rule.top_groups if is_grouped else rule.n_experts  # type: ignore[attr-defined]
        k = check_whole(k, "k", 1)
        if k > most:
            raise ConfigError(
                f"k={k} at layer {label!r}",
                f"at most {most}, "
                + ("the experts of the groups that stay open" if most < rule.n_experts else "all of its experts"),
                "Choose a smaller k; set_routes and uniform_routing take any experts.",
            )

    def ask(run: LayerPass, demands: Demands, tokens: Tensor, has: Tensor) -> tuple[Tensor | None, Tensor | None]:
        demands.budget = torch.where(tokens & has.any(dim=-1), k, demands.budget)
        return None, None

    return _hooks(moe, dict.fromkeys(labels, ask), positions, attention_mask)


# what an intervention does when its layer runs: it adds to the demands, and gives experts that only this once come
# first or drop out; its arguments are the pass, the demands, the tokens and the experts that they have
Ask = Callable[[LayerPass, Demands, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def _hooks(moe: MoEHooks, asks: dict[Layer, Ask], positions: Positions, attention_mask: Tensor | None) -> Hooks:
    return [
        (
            moe.hook_name("expert_indices", layer),
            RankedRoute(moe, layer, TokenSelection(moe, layer, positions, attention_mask), ask),
        )
        for layer, ask in asks.items()
    ]


class RankedRoute:
    """A function of the hook ``expert_indices`` that takes a token's best experts, after what was asked for.

    First those asked for by name, then those that the token has, then the others of open groups, then the rest; each by
    ``choice_logits``. A token whose set of experts stays the same keeps its slots and weights.
    """

    def __init__(self, moe: MoEHooks, layer: Layer, where: TokenSelection, ask: Ask) -> None:
        self.moe, self.layer, self.where, self.ask = moe, layer, where, ask

    @torch.no_grad()
    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        tokens, run = self.where.tokens(value), self.moe.running(self.layer)
        if not bool(tokens.any()):
            return value
        assert run.logits is not None
        n_experts, top_k = run.logits.shape[-1], self.moe.spec(self.layer).top_k
        has, demands = members(value, n_experts), demands_of(run, self.layer)
        first, out = self.ask(run, demands, tokens, has)
        slots = torch.where(demands.budget > 0, demands.budget, has.sum(dim=-1))
        out = demands.banned if out is None else demands.banned | out
        slots = self._checked_slots(tokens, slots, demands, out, top_k)
        most = int(slots.max())
        choice = run.ranking(demands.raised, most if most > top_k else None)
        # out, in a shut group, in an open one, in the token's route, raised into it, asked for by name
        tier = (choice > float("-inf")).int().masked_fill(has, 2)
        tier = tier if first is None else tier.masked_fill(first, 3)
        new = _best(choice, tier.masked_fill(demands.kept, 4).masked_fill(out, -1), slots)
        changed = tokens & (members(new, n_experts) != has).any(dim=-1)
        before = torch.zeros_like(tokens, dtype=torch.int64) if run.writer is None else run.writer
        run.writer = before.masked_fill(changed, id(self))
        return merge_slots(changed, new, value)

    def _checked_slots(self, tokens: Tensor, slots: Tensor, demands: Demands, out: Tensor, top_k: int) -> Tensor:
        """``[batch, pos]``, experts of each token: as many as it has, or as are asked for where that is more.

        Raises:
            RouteError: more are asked for than a token may use, or fewer are left than it uses.
        """
        named = demands.kept.sum(dim=-1)
        most = torch.where(demands.budget > 0, demands.budget, slots.clamp_min(top_k))
        if bool((wrong := tokens & (named > most)).any()):
            row, pos = wrong.nonzero()[0].tolist()
            raise RouteError(
                f"{int(named[row, pos])} experts of layer {self.layer!r} asked for by name for sequence {row}, "
                f"position {pos} of the pass",
                f"at most the {int(most[row, pos])} that the token may use",
                "Promote or force fewer, or at different positions; the model was left as it was.",
            )
        slots = torch.maximum(slots, named)
        left = (~out).sum(dim=-1)
        if bool((wrong := tokens & (left < slots)).any()):
            row, pos = wrong.nonzero()[0].tolist()
            raise RouteError(
                f"{int(left[row, pos])} experts of layer {self.layer!r} left for sequence {row}, position {pos} of "
                f"the pass, which uses {int(slots[row, pos])}",
                "as many as the token uses",
                "Suppress fewer, or take a smaller route; the model was left as it was.",
            )
        return slots


def _best(choice: Tensor, tier: Tensor, slots: Tensor) -> Tensor:
    """``[batch, pos, slot]``: of each token the first ``slots`` experts by tier, and by choice within a tier."""
    order = choice.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, tier.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    width = max(int(slots.max()), 1)
    rank = torch.arange(width, device=choice.device)
    return order[..., :width].masked_fill(rank >= slots.unsqueeze(-1), EMPTY)


def _raise(run: LayerPass, demands: Demands, by: Tensor, has: Tensor) -> Tensor:
    """Add to what experts are ranked by; ``[batch, pos, expert]``: those that the family would then choose."""
    demands.raised = by.double() if demands.raised is None else demands.raised + by
    order = run.ranking(demands.raised).argsort(dim=-1, descending=True, stable=True)
    n = has.sum(dim=-1, keepdim=True)
    return torch.zeros_like(has).scatter(-1, order, torch.arange(has.shape[-1], device=has.device).expand_as(has) < n)


def _at(tokens: Tensor, ids: Tensor, has: Tensor) -> Tensor:
    """``[batch, pos, expert]``: these experts at these tokens."""
    named = torch.zeros(has.shape[-1], dtype=torch.bool, device=has.device).index_fill_(0, ids.to(has.device), True)
    return tokens.unsqueeze(-1) & named


def _checked_margin(margin: Any) -> float | None:
    if margin is None:
        return None
    try:
        number = math.nan if isinstance(margin, bool) else float(margin)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= LARGEST_MARGIN:
        raise ConfigError(
            f"margin={margin!r}", f"nats from 0 to {LARGEST_MARGIN:.0f}, or None", "Use None for certain."
        )
    return number
