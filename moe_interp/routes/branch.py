"""Exact scores of counterfactual routes: every expert runs once a token, every route one token of the layers above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_interp.errors import DataError
from moe_interp.hooks.branches import BasePass, BranchRunner
from moe_interp.types import EMPTY, Hooks

ROW_LENGTH = 64  # branches a row: they share a copy of their sequence's keys, and each pays for the others' own
_DEFAULT_BUDGET = 2**30


class _AtOnce(NamedTuple):
    """As much as keeps a device busy; more would only leave the processor's caches."""

    branches: int
    logits_bytes: int


_AT_ONCE = {"cpu": _AtOnce(1024, 2**27), "cuda": _AtOnce(16384, 2**29)}


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
    """

    logp: Tensor
    logp_standard: Tensor
    logp_null: Tensor
    router_logp: Tensor
    method: str

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

    def with_standard(self, base: BasePass, layer: int) -> LayerRoutes:
        """The standard route in front, as route 0."""
        standard, weights = base.indices[layer].unsqueeze(2), base.weights[layer].unsqueeze(2)
        slots = max(standard.shape[-1], self.indices.shape[-1])
        return LayerRoutes(
            torch.cat([_widen(standard, slots, EMPTY), _widen(self.indices, slots, EMPTY)], dim=2),
            torch.cat([_widen(weights, slots, 0.0), _widen(self.weights.to(weights), slots, 0.0)], dim=2),
            self.has_own_weights,
        )


def ruled_routes(base: BasePass, layer: int, indices: Tensor, weights: Tensor | None = None) -> LayerRoutes:
    """Routes with the family's own weights for each set, or with given ones."""
    is_given = weights is not None
    if bool((indices == EMPTY).any()):
        order = (indices == EMPTY).to(torch.int8).sort(dim=-1, stable=True).indices
        indices, weights = indices.gather(-1, order), None if weights is None else weights.gather(-1, order)
    if weights is None:
        logits = base.router_logits[layer].unsqueeze(2).expand(*indices.shape[:3], -1)
        weights = base.moe.spec(layer).rule.weights(logits, indices)
    return LayerRoutes(indices, weights.masked_fill(indices == EMPTY, 0.0), is_given)


def branch_scores(
    base: BasePass,
    routes: Mapping[int, LayerRoutes],
    wanted: Tensor,
    targets: Tensor,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score routes by branches; routes at several layers are taken jointly, route r of one with route r of the others.

    Args:
        base: The base pass of the sequences.
        routes: By layer.
        wanted: ``[batch, pos]`` bool, the tokens to score.
        targets: ``[batch, pos, target]`` token ids.
        memory_budget: Bytes that the branches may take at a time, besides the base pass; by default 1 GiB.

    Returns:
        Log-probabilities of the routes ``[batch, pos, route, target]`` and of the null route ``[batch, pos, target]``.
    """
    first = min(routes)
    with_null = {layer: given.with_standard(base, layer) for layer, given in routes.items()}
    present = torch.stack([given.present for given in with_null.values()]).all(dim=0) & wanted.unsqueeze(-1)
    logp = base.logits.new_full((*present.shape, targets.shape[-1]), float("nan"), dtype=score_dtype(base.logits))
    flat = logp.view(-1, *logp.shape[2:])
    plan = _Plan(base, first, with_null[first].indices.shape[2], memory_budget)
    upper = _UpperRoutes(base, {layer: given for layer, given in with_null.items() if layer != first})
    targets = targets.flatten(0, 1)

    def score(branches: _Branches, sequence: Tensor, chosen: Tensor) -> Tensor:
        token, route = branches.token[chosen], branches.route[chosen]
        upper.set(token, route)
        states = run(sequence, token % base.tokens.shape[1], branches.block_out[branches.of_chunk[chosen], route])
        n = plan.logits_at_once
        parts = zip(states.flatten(0, 1).split(n), targets[token].flatten(0, 1).split(n))
        scores = torch.cat([log_probs(run.logits(part), ids) for part, ids in parts]).view(*token.shape, -1)
        flat[token, route] = scores
        return scores

    with torch.no_grad(), BranchRunner(base, first, upper.hooks) as run:
        for tokens in plan.chunks(present.any(dim=-1)):
            of_chunk, route = present.flatten(0, 1)[tokens].nonzero().unbind(-1)
            block_out = _block_outputs(base, first, with_null[first], tokens)
            branches = _Branches(tokens[of_chunk], route, of_chunk, block_out)
            for sequence, chosen in plan.rows(branches.token):
                is_bad = ~score(branches, sequence, chosen).isfinite().all(dim=-1)
                if bool(is_bad.any()):  # a branch that overflows spoils its row, although no other branch reads it
                    for alone in chosen[is_bad].unsqueeze(1).split(plan.rows_at_once):
                        score(branches, branches.token[alone[:, 0]] // base.tokens.shape[1], alone)
    return logp[:, :, 1:], logp[:, :, 0]


@dataclass(frozen=True, eq=False)
class _Branches:
    """The branches ``[branch]`` of some tokens: their token, route, and place in ``block_out[place, route]``."""

    token: Tensor
    route: Tensor
    of_chunk: Tensor
    block_out: Tensor


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """``[..., vocab]`` and ``[..., target]`` ids to log-probabilities ``[..., target]``, at float32 at least."""
    logits = logits.to(score_dtype(logits))
    if logits.is_cuda:
        return logits.gather(-1, targets) - logits.logsumexp(dim=-1, keepdim=True)
    # a few rows at a time stay in the processor's cache
    total = torch.cat([part.logsumexp(dim=-1, keepdim=True) for part in logits.reshape(-1, logits.shape[-1]).split(16)])
    return logits.gather(-1, targets) - total.view(*targets.shape[:-1], 1)


def score_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _Plan:
    """Which tokens are taken together, and how their branches are packed."""

    def __init__(self, base: BasePass, layer: int, n_routes: int, memory_budget: int | None) -> None:
        self.n_pos = base.tokens.shape[1]
        budget = _DEFAULT_BUDGET if memory_budget is None else memory_budget
        self.row_length = min(ROW_LENGTH, n_routes * self.n_pos)
        token, row, logits = self._token_bytes(base, layer, n_routes), self._row_bytes(base, layer), _logits_bytes(base)
        if 4 * max(token, row, logits) > budget:
            raise DataError(
                f"a memory budget of {budget} bytes",
                f"at least {4 * max(token, row, logits)} bytes for this model and sequences of {self.n_pos} tokens",
                "Raise memory_budget, or score shorter sequences.",
            )
        at_once = _AT_ONCE.get(base.tokens.device.type, _AT_ONCE["cpu"])
        self.tokens_at_once = budget // 4 // token
        self.rows_at_once = min(budget // 2 // row, max(at_once.branches // self.row_length, 1))
        self.logits_at_once = min(budget // 4 // logits, max(at_once.logits_bytes // logits, 64))

    def chunks(self, wanted: Tensor) -> Iterator[Tensor]:
        """Flat token indices, by position, as many at a time as expert outputs fit."""
        place = wanted.nonzero()
        place = place[place[:, 1].argsort(stable=True)]
        yield from (place[:, 0] * self.n_pos + place[:, 1]).split(self.tokens_at_once)

    def rows(self, token: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``[row]`` sequences and ``[row, n]`` branch numbers: one sequence a row, rows sorted by their last position.

        A row that is not full repeats its first branch.
        """
        n = self.row_length
        order = (token // self.n_pos).argsort(stable=True)
        sequence, counts = torch.unique_consecutive(token[order] // self.n_pos, return_counts=True)
        rows_each = (counts + n - 1) // n
        # shape: (branch,): its number within its sequence, then its cell in the table of rows
        within = torch.arange(len(order), device=token.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        cell = (rows_each.cumsum(0) - rows_each).repeat_interleave(counts) * n + within
        table = torch.full((int(rows_each.sum()) * n,), -1, device=token.device)
        table[cell] = order
        table = table.view(-1, n)
        table = torch.where(table < 0, table[:, :1], table)
        by_end = (token[table] % self.n_pos).amax(dim=-1).argsort(stable=True)
        owner = sequence.repeat_interleave(rows_each)
        # equal groups: a last small one would use the machine badly
        n_groups = -(-len(table) // self.rows_at_once)
        yield from zip(owner[by_end].tensor_split(n_groups), table[by_end].tensor_split(n_groups))

    # upper estimates of what is held at once ------------------------------------------------------------------------
    def _token_bytes(self, base: BasePass, layer: int, n_routes: int) -> int:
        """A token's expert outputs, and its routes' mixing weights and block outputs."""
        spec = base.moe.spec(layer)
        width = spec.d_model + n_routes
        return (spec.n_experts * (width + spec.d_expert) + 4 * n_routes * spec.d_model) * base.logits.element_size()

    def _row_bytes(self, base: BasePass, layer: int) -> int:
        """A row's residuals and expert rows, its keys and values (copied, and once a head), and attention scores."""
        spec, size = base.moe.spec(layer), base.logits.element_size()
        model: Any = base.moe.bridge.original_model
        heads = int(getattr(model.config.get_text_config(), "num_attention_heads", 1))
        branch = (12 * spec.d_model + 3 * spec.top_k * (spec.d_expert + spec.d_model)) * size
        branch += 0 if base.ends_in_head else _logits_bytes(base)
        cached = [(k.shape[1] + heads) * (k.shape[-1] + v.shape[-1]) for k, v in base.cache.recorded.values()]
        scores = heads * self.row_length * (2 * size + 8)
        return self.row_length * branch + (self.n_pos + self.row_length) * (scores + max(cached, default=0) * size)


def _logits_bytes(base: BasePass) -> int:
    """One branch's logits, at their own width and twice at that of the scores."""
    return base.logits.shape[-1] * (base.logits.element_size() + 2 * score_dtype(base.logits).itemsize)


class _UpperRoutes:
    """The routes of the running branches at layers above the first: hooks that put them in place."""

    def __init__(self, base: BasePass, routes: Mapping[int, LayerRoutes]) -> None:
        self.flat = {
            layer: (given.indices.flatten(0, 1), given.weights.flatten(0, 1)) for layer, given in routes.items()
        }
        self.now: tuple[Tensor, Tensor] | None = None
        self.hooks: Hooks = []
        for layer, given in routes.items():
            self.hooks.append((base.moe.hook_name("expert_indices", layer), self._setter(layer, 0)))
            if given.has_own_weights:
                self.hooks.append((base.moe.hook_name("expert_weights", layer), self._setter(layer, 1)))

    def set(self, token: Tensor, route: Tensor) -> None:
        self.now = token, route

    def _setter(self, layer: int, part: int) -> Any:
        def put(value: Tensor, hook: Any) -> Tensor:
            assert self.now is not None
            return self.flat[layer][part][self.now][..., : value.shape[-1]]

        return put


def _block_outputs(base: BasePass, layer: int, routes: LayerRoutes, tokens: Tensor) -> Tensor:
    """The output of the experts' block under every route, ``[token, route, d_model]``; route 0 is the standard one."""
    spec = base.moe.spec(layer)
    indices, weights = routes.indices.flatten(0, 1)[tokens], routes.weights.flatten(0, 1)[tokens]
    block_out = base.block_out(layer)[tokens]
    n_tokens, n_routes = indices.shape[:2]
    needed = torch.zeros(n_tokens, spec.n_experts + 1, dtype=torch.bool, device=tokens.device)
    needed.scatter_(1, indices.flatten(1) % (spec.n_experts + 1), True)  # an empty slot marks the extra column
    outputs = _expert_outputs(base, layer, tokens, needed[:, :-1])
    if spec.weight_on_input:
        weights = torch.ones_like(weights).masked_fill(indices == EMPTY, 0.0)
    # shape: (token, route, expert); each route's weights at its experts
    mixing = outputs.new_zeros(n_tokens, n_routes, spec.n_experts)
    mixing.scatter_add_(2, indices.clamp(min=0), weights.to(outputs.dtype))
    routed = torch.bmm(mixing, outputs.transpose(0, 1))
    return routed.to(block_out.dtype) + (block_out.unsqueeze(1) - routed[:, :1].to(block_out.dtype))


def _expert_outputs(base: BasePass, layer: int, tokens: Tensor, needed: Tensor) -> Tensor:
    """Each needed expert's output for each token, ``[expert, token, d_model]``; zero where it is not needed."""
    spec = base.moe.spec(layer)
    experts = spec.expert_functions
    x = base.experts_in[layer].flatten(0, 1)[tokens]
    scale = _input_weights(base, layer, tokens) if spec.weight_on_input else None
    outputs = x.new_zeros(spec.n_experts, len(tokens), spec.d_model)
    with spec.materialized():
        for expert in needed.any(dim=0).nonzero().flatten().tolist():
            rows = needed[:, expert].nonzero().flatten()
            read = x[rows] if scale is None else x[rows] * scale[rows, expert, None].to(x.dtype)
            out = experts.output(experts.hidden(read, expert), expert)
            outputs[expert, rows] = (out if spec.project is None else spec.project(out)).to(x.dtype)
    return outputs


def _input_weights(base: BasePass, layer: int, tokens: Tensor) -> Tensor:
    """``[token, expert]``: the weight that scales each expert's input, which no other expert of the route changes."""
    logits = base.router_logits[layer].flatten(0, 1)[tokens]
    everyone = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    return base.moe.spec(layer).rule.weights(logits, everyone)


def _widen(values: Tensor, slots: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, slots - values.shape[-1]), value=fill)
