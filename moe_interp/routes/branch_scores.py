"""Exact scores of counterfactual routes: every expert runs once a token, every route one token of the layers above."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_interp.arch.grouped_experts import hidden_of_rows, output_of_rows, takes_grouped_products
from moe_interp.arch.grouped_products import RowGroups
from moe_interp.arch.routing_rule import widen
from moe_interp.arch.spec import MoESpec
from moe_interp.engine.branches import BranchRunner, can_share_keys
from moe_interp.engine.expert_products import fast_experts
from moe_interp.engine.memory import Memory
from moe_interp.engine.parallel_passes import n_workers, side_by_side
from moe_interp.engine.recorded_pass import RecordedPass
from moe_interp.routes.low_rank_unembed import spanned_logits
from moe_interp.routes.plan import Plan, score_dtype
from moe_interp.routes.predictions import averaged_log_probs, log_probs
from moe_interp.types import EMPTY, Hooks

_WORTH_A_TRIAL = 512  # branches; fewer copy their keys sooner than it is tried whether they need to


@dataclass(frozen=True, eq=False)
class RouteScores:
    """Log-probabilities of the target tokens under each route of one layer (or several jointly), NaN where not scored.

    Attributes:
        logp: ``[batch, pos, route]``, in nats; ``[batch, pos, route, target]`` where several targets were given.
        logp_standard: ``[batch, pos]`` (or with targets), under the standard route, from the plain forward.
        logp_null: The same, with the standard route sent through the machinery of the branches.
        router_logp: ``[batch, pos, route]``, the sum of the router's log-policy over the route's experts (derived): not
            the probability of drawing the set.
        method: "branch" or "naive".
        mean_entropy: ``[batch, pos]`` in nats, the entropy of the mean of some routes' predictions, where it was asked
            for; NaN where none of these routes is there.
    """

    logp: Tensor
    logp_standard: Tensor
    logp_null: Tensor
    router_logp: Tensor
    method: str
    mean_entropy: Tensor | None = None

    @property
    def null_distance(self) -> float:
        """The largest difference between the null route and the plain forward: the noise floor of every score."""
        distance = (self.logp_null - self.logp_standard).abs()
        return float(distance[distance.isfinite()].max()) if bool(distance.isfinite().any()) else 0.0


@dataclass(frozen=True, eq=False)
class LayerRoutes:
    """Routes at one layer: ``[batch, pos, route, slot]`` expert ids and weights; a route of -1 only is absent.

    ``has_own_weights`` where the weights were given, instead of the family's own for each set.
    """

    indices: Tensor
    weights: Tensor
    has_own_weights: bool = False

    @property
    def present(self) -> Tensor:
        return (self.indices != EMPTY).any(dim=-1)

    def with_standard(self, base: RecordedPass, layer: int) -> LayerRoutes:
        """The standard route in front, as route 0."""
        standard, weights = base.indices[layer].unsqueeze(2), base.weights[layer].unsqueeze(2)
        slots = max(standard.shape[-1], self.indices.shape[-1])
        return LayerRoutes(
            torch.cat([widen(standard, slots, EMPTY), widen(self.indices, slots, EMPTY)], dim=2),
            torch.cat([widen(weights, slots, 0.0), widen(self.weights.to(weights), slots, 0.0)], dim=2),
            self.has_own_weights,
        )


def ruled_routes(base: RecordedPass, layer: int, indices: Tensor, weights: Tensor | None = None) -> LayerRoutes:
    """Routes with the family's own weights for each set, or with given ones."""
    is_given = weights is not None
    if bool((indices == EMPTY).any()):
        order = (indices == EMPTY).to(torch.int8).sort(dim=-1, stable=True).indices
        indices, weights = indices.gather(-1, order), None if weights is None else weights.gather(-1, order)
    if weights is None:
        logits = base.router_logits[layer].unsqueeze(2).expand(*indices.shape[:3], -1)
        weights = base.moe.spec(layer).rule.weights(logits, indices)
    return LayerRoutes(indices, weights.masked_fill(indices == EMPTY, 0.0), is_given)


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """What is to be scored.

    Attributes:
        routes: By layer, the standard route in front, as route 0.
        present: ``[batch, pos, route]`` bool, the branches to score.
        averaged: ``[batch, pos, route]`` bool, those whose predictions are averaged.
        n_averaged: Of a token, at most.
    """

    routes: dict[int, LayerRoutes]
    present: Tensor
    averaged: Tensor
    n_averaged: int

    @staticmethod
    def of(
        base: RecordedPass, routes: Mapping[int, LayerRoutes], wanted: Tensor, averaged: Tensor | None = None
    ) -> ScoreRequest:
        """Routes at several layers are taken jointly, route r of one with route r of the others.

        Args:
            base: The base pass of the sequences.
            routes: By layer.
            wanted: ``[batch, pos]`` bool, the tokens to score.
            averaged: ``[batch, pos, route]`` bool, the routes of a token whose predictions are averaged; none by
                default.
        """
        with_null = {layer: given.with_standard(base, layer) for layer, given in routes.items()}
        present = torch.stack([given.present for given in with_null.values()]).all(dim=0) & wanted.unsqueeze(-1)
        is_averaged = torch.zeros_like(present)
        if averaged is not None:
            is_averaged[:, :, 1:] = averaged & present[:, :, 1:]
        return ScoreRequest(with_null, present, is_averaged, int(is_averaged.sum(dim=-1).max()))

    @property
    def first(self) -> int:
        return min(self.routes)

    @property
    def sequences(self) -> Tensor:
        """``[batch]`` bool, those of which something is scored."""
        return self.present.flatten(1).any(dim=-1)

    @property
    def above(self) -> dict[int, LayerRoutes]:
        """The routes at layers above the first."""
        return {layer: given for layer, given in self.routes.items() if layer != self.first}


def branch_scores(
    base: RecordedPass, request: ScoreRequest, targets: Tensor, memory: Memory
) -> tuple[Tensor, Tensor, Tensor]:
    """Score routes by branches in compact rows.

    Args:
        base: The base pass of the sequences.
        request: What is scored.
        targets: ``[batch, pos, target]`` token ids.
        memory: What the branches may take at a time, besides the base pass.

    Returns:
        Log-probabilities of the routes ``[batch, pos, route, target]`` and of the null route ``[batch, pos, target]``,
        and the entropy of the mean prediction ``[batch, pos]`` (NaN where nothing is averaged).
    """
    first, present, is_averaged, with_null = request.first, request.present, request.averaged, request.routes
    workers = n_workers(base.moe) if len(with_null) == 1 else 1
    n_branches = int(present.sum())
    shares_keys = n_branches >= _WORTH_A_TRIAL and can_share_keys(base)
    plan = Plan(base, first, with_null[first].indices.shape[2], memory.bytes, workers, shares_keys, request.n_averaged)
    at_once = min(plan.rows_at_once * plan.row_length, n_branches)
    upper = UpperRoutes(base, request.above)
    runner = BranchRunner(base, first, at_once, shares_keys, plan.scores_at_once)
    with torch.inference_mode(False), torch.no_grad(), runner as run:
        scorer = _Scorer(base, plan, upper, run, is_averaged, targets, memory)

        def score(tokens: Tensor) -> None:
            of_chunk, route = present.flatten(0, 1)[tokens].nonzero().unbind(-1)
            block_out = block_outputs(base, first, with_null[first], tokens)
            branches = _Branches(tokens[of_chunk], route, of_chunk, block_out)
            scorer.score_by_span(branches, tokens) if plan.rank else scorer.score(branches, tokens)

        for chunk in plan.chunks(present.any(dim=-1)):
            memory.in_parts(lambda part, chunk=chunk: score(chunk[part]), len(chunk), "tokens with their routes")  # type: ignore[misc]
    memory.say()
    return scorer.logp[:, :, 1:], scorer.logp[:, :, 0], scorer.entropy


@dataclass(frozen=True, eq=False)
class _Branches:
    """The branches ``[branch]`` of some tokens: their token, route, and place in ``block_out[place, route]``."""

    token: Tensor
    route: Tensor
    of_chunk: Tensor
    block_out: Tensor


@dataclass(frozen=True, eq=False)
class _Kept:
    """What averaged branches of a chunk of tokens give, until all of a token's are there.

    Attributes:
        averaged: ``[token, route]`` bool.
        slot: ``[token, route]``, where a branch is kept.
        states: ``[token, slot, width]``; no slots where nothing is averaged.
    """

    averaged: Tensor
    slot: Tensor
    states: Tensor

    @property
    def n_slots(self) -> int:
        return self.states.shape[1]

    @staticmethod
    def empty(base: RecordedPass, averaged: Tensor, block_out: Tensor) -> _Kept:
        like = block_out if base.ends_in_head else base.logits
        n_slots = int(averaged.sum(dim=-1).max())
        states = like.new_zeros(len(averaged), n_slots, like.shape[-1])
        return _Kept(averaged, averaged.cumsum(dim=-1) - 1, states)


class _Scorer:
    """Runs branches and fills in their scores, ``logp`` ``[batch, pos, route, target]``, and the ``entropy``
    ``[batch, pos]`` of the mean prediction of those that are averaged."""

    def __init__(
        self,
        base: RecordedPass,
        plan: Plan,
        upper: UpperRoutes,
        run: BranchRunner,
        averaged: Tensor,
        targets: Tensor,
        memory: Memory,
    ) -> None:
        self.base, self.plan, self.upper, self.run, self.memory = base, plan, upper, run, memory
        self.targets, self.averaged = targets.flatten(0, 1), averaged.flatten(0, 1)
        shape = (*averaged.shape, targets.shape[-1])
        self.logp = base.logits.new_full(shape, float("nan"), dtype=score_dtype(base.logits))
        self.entropy = self.logp.new_full(averaged.shape[:2], float("nan"))
        self.flat, self.flat_entropy = self.logp.view(-1, *self.logp.shape[2:]), self.entropy.view(-1)

    def score(self, branches: _Branches, tokens: Tensor) -> None:
        kept = _Kept.empty(self.base, self.averaged[tokens], branches.block_out)

        def score_rows(sequence: Tensor, chosen: Tensor) -> None:
            is_bad = ~self._score_rows(branches, sequence, chosen, kept)
            if bool(is_bad.any()):  # a branch that overflows spoils its row, although no other branch reads it
                for alone in chosen[is_bad].unsqueeze(1).split(self.plan.rows_at_once):
                    self._score_rows(branches, branches.token[alone[:, 0]] // self.plan.n_pos, alone, kept)

        side_by_side(
            lambda group: self._in_parts(score_rows, *group), self.plan.rows(branches.token), self.plan.workers
        )
        if kept.n_slots:
            parts = torch.arange(len(tokens), device=tokens.device).split(
                max(1, self.plan.logits_at_once // kept.n_slots)
            )
            side_by_side(lambda part: self._average(kept, tokens, part), iter(parts), self.plan.workers)

    def _in_parts(self, work: Callable[[Tensor, Tensor], None], sequence: Tensor, chosen: Tensor) -> None:
        """Work on rows of branches: fewer at a time where memory runs out, at last parts of a row."""

        def some(rows: slice) -> None:
            here = sequence[rows], chosen[rows]
            if len(here[0]) > 1:
                work(*here)
            else:
                self.memory.in_parts(
                    lambda part: work(here[0], here[1][:, part]), chosen.shape[1], "branches of a sequence"
                )

        self.memory.in_parts(some, len(sequence), "rows of branches")

    def _average(self, kept: _Kept, tokens: Tensor, part: Tensor) -> None:
        """Score a few tokens' averaged branches, all of a token's together, which no order of the branches changes."""
        states = kept.states[part]
        logits = self.run.logits(states.flatten(0, 1)).view(*states.shape[:2], -1)
        is_there = torch.arange(kept.n_slots, device=part.device) < kept.averaged[part].sum(dim=-1, keepdim=True)
        scores, self.flat_entropy[tokens[part]] = averaged_log_probs(logits, self.targets[tokens[part]], is_there)
        place, route = kept.averaged[part].nonzero().unbind(-1)
        self.flat[tokens[part][place], route] = scores[place, kept.slot[part[place], route]]

    def score_by_span(self, branches: _Branches, tokens: Tensor) -> None:
        """At the last layer, with many routes: one unembedding a direction instead of one a route."""
        states = branches.block_out.new_zeros(branches.block_out.shape)

        def fill(sequence: Tensor, chosen: Tensor) -> None:
            states[branches.of_chunk[chosen], branches.route[chosen]] = self._states(branches, sequence, chosen)

        for group in self.plan.rows(branches.token):
            self._in_parts(fill, *group)
        is_present = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        is_present[branches.of_chunk, branches.route] = True
        for part in torch.arange(len(tokens), device=tokens.device).split(self.plan.spans_at_once):
            logits = spanned_logits(self.run.logits, states[part], self.plan.rank)
            if logits is None:
                logits = self.run.logits(states[part].flatten(0, 1)).view(*states[part].shape[:2], -1)
            targets, averaged = self.targets[tokens[part]], self.averaged[tokens[part]]
            scores, self.flat_entropy[tokens[part]] = averaged_log_probs(logits, targets, averaged)
            self.flat[tokens[part]] = scores.masked_fill(~is_present[part].unsqueeze(-1), float("nan"))

    def _score_rows(self, branches: _Branches, sequence: Tensor, chosen: Tensor, kept: _Kept) -> Tensor:
        """Score rows of branches, or keep the states of those that are averaged: ``[row]``, whether all is finite."""
        token, route = branches.token[chosen], branches.route[chosen]
        states = self._states(branches, sequence, chosen)
        if not kept.n_slots:
            scores = self._log_probs(states.flatten(0, 1), self.targets[token].flatten(0, 1)).view(*token.shape, -1)
            self.flat[token, route] = scores
            return scores.isfinite().all(dim=-1)
        place = branches.of_chunk[chosen]
        later = kept.averaged[place, route]
        kept.states[place[later], kept.slot[place, route][later]] = states[later]
        scores = self._log_probs(states[~later], self.targets[token[~later]])
        self.flat[token[~later], route[~later]] = scores
        is_finite = torch.empty_like(later)
        is_finite[later] = states[later].isfinite().all(dim=-1)
        is_finite[~later] = scores.isfinite().all(dim=-1)
        return is_finite

    def _states(self, branches: _Branches, sequence: Tensor, chosen: Tensor) -> Tensor:
        token, route = branches.token[chosen], branches.route[chosen]
        block_out = branches.block_out[branches.of_chunk[chosen], route]
        return self.run(sequence, token % self.plan.n_pos, block_out, self.upper.hooks(token, route))

    def _log_probs(self, states: Tensor, targets: Tensor) -> Tensor:
        n = self.plan.logits_at_once
        if not len(states):
            return self.logp.new_empty(targets.shape)
        return torch.cat([log_probs(self.run.logits(s), t) for s, t in zip(states.split(n), targets.split(n))])


class UpperRoutes:
    """The routes of branches at layers above the first."""

    def __init__(self, base: RecordedPass, routes: Mapping[int, LayerRoutes]) -> None:
        self.base, self.given = base, routes
        self.flat = {
            layer: (given.indices.flatten(0, 1), given.weights.flatten(0, 1)) for layer, given in routes.items()
        }

    def hooks(self, token: Tensor, route: Tensor) -> Hooks:
        """Hooks that put the routes of some branches in place."""
        found: Hooks = []
        for layer, given in self.given.items():
            for part, name in enumerate(("expert_indices", "expert_weights")):
                if name == "expert_indices" or given.has_own_weights:
                    put = _replacing(self.flat[layer][part][token, route])
                    found.append((self.base.moe.hook_name(name, layer), put))
        return found


def _replacing(written: Tensor) -> Any:
    return lambda value, hook: written[..., : value.shape[-1]]


def block_outputs(base: RecordedPass, layer: int, routes: LayerRoutes, tokens: Tensor) -> Tensor:
    """The output of the experts' block under every route, ``[token, route, d_model]``; route 0 is the standard one."""
    spec = base.moe.spec(layer)
    indices, weights = routes.indices.flatten(0, 1)[tokens], routes.weights.flatten(0, 1)[tokens]
    block_out = base.block_out(layer)[tokens]
    n_tokens, n_routes = indices.shape[:2]
    needed = torch.zeros(n_tokens, spec.n_experts + 1, dtype=torch.bool, device=tokens.device)
    needed.scatter_(1, indices.flatten(1) % (spec.n_experts + 1), True)  # an empty slot marks the extra column
    x = base.experts_in[layer].flatten(0, 1)[tokens]
    outputs = expert_outputs(
        spec, x, needed[:, :-1], _input_weights(base, layer, tokens) if spec.weight_on_input else None
    )
    if spec.weight_on_input:
        weights = torch.ones_like(weights).masked_fill(indices == EMPTY, 0.0)
    # shape: (token, route, expert); each route's weights at its experts
    mixing = outputs.new_zeros(n_tokens, n_routes, spec.n_experts)
    mixing.scatter_add_(2, indices.clamp(min=0), weights.to(outputs.dtype))
    routed = torch.bmm(mixing, outputs.transpose(0, 1))
    return routed.to(block_out.dtype) + (block_out.unsqueeze(1) - routed[:, :1].to(block_out.dtype))


def expert_outputs(spec: MoESpec, x: Tensor, needed: Tensor, scale: Tensor | None = None) -> Tensor:
    """Each needed expert's output for each token, ``[expert, token, d_model]``; zero where it is not needed.

    Args:
        spec: The layer.
        x: ``[token, d_in]``, what the experts read.
        needed: ``[token, expert]`` bool.
        scale: ``[token, expert]``, what each expert's input is scaled by.
    """
    outputs = x.new_zeros(spec.n_experts, len(x), spec.d_model)
    flat = outputs.view(-1, spec.d_model)
    place = needed.t().flatten().nonzero().flatten()  # of ``flat``: sorted by expert
    token = place % len(x)
    groups = RowGroups.of_sorted(place // len(x), spec.n_experts)

    def read(some: slice) -> Tensor:
        rows = x.index_select(0, token[some])
        return rows if scale is None else rows * scale[token[some], groups.experts[some], None].to(x.dtype)

    def put(some: slice, found: Tensor) -> None:
        flat.index_copy_(0, place[some], (found if project is None else project(found)).to(x.dtype))

    with spec.reading_experts():
        experts, project = fast_experts(spec)
        if takes_grouped_products(experts, x, len(place)):
            # what a part of the rows takes on its way is no larger than the outputs
            row = 2 * x.shape[-1] + 3 * experts.d_expert + spec.d_model
            for some, part in groups.parts(max(1, outputs.numel() // row)):
                neurons = hidden_of_rows(experts, read(some), part, grouped=True)
                put(some, output_of_rows(experts, neurons, part, x.shape[-1], grouped=True))
        else:
            for some, expert in groups.each():
                put(some, experts.output(experts.hidden(read(some), expert), expert))
    return outputs


def _input_weights(base: RecordedPass, layer: int, tokens: Tensor) -> Tensor:
    """``[token, expert]``: the weight that scales each expert's input, which no other expert of the route changes."""
    logits = base.router_logits[layer].flatten(0, 1)[tokens]
    everyone = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    return base.moe.spec(layer).rule.weights(logits, everyone)
