"""First-order screening: one backward pass ranks all routes of all tokens, and only the best few are scored exactly.

The credit of route r of token t at layer l is ``g . (b_r - b_0)``, with b the output of the experts' block and g the
gradient of the log-probability of t's **own** next token with respect to it. In a plain backward pass of the summed
log-probabilities, g would also hold what position t's keys and values do to the predictions of later tokens. Here the
standard route of each token runs as a branch: it reads the recorded keys and values of earlier positions as constants,
and no branch reads another. So every token's log-probability depends on its own block outputs alone, through its
residual stream and its own key and value, and one backward pass of the sum gives each token's own gradient, exactly, at
all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_interp.checks import as_whole, check_seed
from moe_interp.engine import threads_asleep
from moe_interp.engine.branches import BranchRunner
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import Memory, out_of_memory_in_words
from moe_interp.engine.pass_inputs import check_memory, check_tokens
from moe_interp.engine.recorded_pass import RecordedPass, record_pass
from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.routes.audit import ScreenAudit
from moe_interp.routes.branch_scores import LayerRoutes, block_outputs, ruled_routes
from moe_interp.routes.inputs import by_label, checked_experts, decoder_layers, scorable
from moe_interp.routes.plan import Plan
from moe_interp.routes.predictions import log_probs
from moe_interp.routes.score import score_wanted
from moe_interp.types import Layer


@dataclass(frozen=True, eq=False)
class ScreenedRoutes:
    """Routes of one layer, ranked to first order, the best few scored exactly.

    Attributes:
        credit: ``[batch, pos, route]`` in nats, the first-order estimate of ``logp - logp_standard``; NaN where absent.
        logp: ``[batch, pos, route]`` in nats, exact; NaN but for each token's kept routes.
        logp_standard, logp_null: ``[batch, pos]``, as in ``RouteScores``.
        is_kept: ``[batch, pos, route]`` bool.
        audit: How much the screen missed, on a sample of tokens all of whose routes were scored.
    """

    credit: Tensor
    logp: Tensor
    logp_standard: Tensor
    logp_null: Tensor
    is_kept: Tensor
    audit: ScreenAudit


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def screen_routes(
    moe: MoEHooks,
    tokens: Tensor,
    layers: Sequence[Layer],
    routes: Mapping[Layer, Tensor],
    keep: int = 4,
    audit: int = 64,
    positions: Sequence[int] | Tensor | None = None,
    attention_mask: Tensor | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
) -> dict[int, ScreenedRoutes]:
    """Rank routes by one backward pass, and score the ``keep`` best of each token exactly.

    Args:
        moe: Attached hooks.
        tokens: ``[batch, pos]`` ids.
        layers: MoE layers.
        routes: By layer, ``[batch, pos, route, slot]`` expert ids, as for :func:`score_routes`.
        keep: Routes of a token that are scored exactly.
        audit: Tokens a layer whose routes are all scored, drawn by ``seed``, to say what the screen missed.
        positions, attention_mask, memory_budget: See :func:`score_routes`.
        seed: Of the audited tokens.

    Returns:
        By layer. The sign: a positive credit or advantage is a better prediction than the standard route's.

    Raises:
        ConfigError: fewer than one route to keep or token to audit, or a layer at which branches are not exact.
        RouteError, DataError, HookError: as :func:`score_routes`.

    A credit is linear in the route difference: it ranks, and is no estimate of large effects. ``logp`` holds few routes
    of each token, chosen for being good: it shows gaps and regrets, not alignment or the share of better routes.
    Source: derived (first-order attribution of routes).
    """
    keep, audit, seed = _check_counts(keep, audit, seed)
    ids, mask = check_tokens(moe, tokens, attention_mask)
    labels, indices = decoder_layers(moe, layers), by_label(moe, routes)
    if set(labels) - set(indices):
        raise ConfigError(
            f"layers {list(labels)}, and routes at layers {sorted(indices)}",
            "routes at each layer",
            "Give routes for every layer to screen.",
        )
    given = {layer: checked_experts(moe, ids, layer, indices[layer])[0] for layer in labels}
    wanted = scorable(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool(), positions)
    memory, audited = check_memory(moe, memory_budget), _sample(wanted, audit, seed)

    def screen(rows: slice) -> dict[int, ScreenedRoutes]:
        base = record_pass(moe, ids[rows], labels, None if mask is None else mask[rows])
        chosen = {layer: ruled_routes(base, layer, experts[rows]) for layer, experts in given.items()}
        return _screened(base, chosen, keep, wanted[rows], audited[rows], memory)

    parts = memory.in_parts(screen, len(ids), "sequences")
    memory.say()
    return parts[0] if len(parts) == 1 else {layer: _joined([part[layer] for part in parts]) for layer in labels}


def screen_from_base(
    base: RecordedPass,
    routes: Mapping[int, LayerRoutes],
    keep: int = 4,
    audit: int = 64,
    positions: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    memory_budget: int | None = None,
) -> dict[int, ScreenedRoutes]:
    """As :func:`screen_routes`, on the sequences of a base pass; layers are screened one by one, not jointly."""
    keep, audit, seed = _check_counts(keep, audit, seed)
    wanted, memory = scorable(base.is_real, positions), check_memory(base.moe, memory_budget)
    return _screened(base, routes, keep, wanted, _sample(wanted, audit, seed), memory)


def _screened(
    base: RecordedPass,
    routes: Mapping[int, LayerRoutes],
    keep: int,
    wanted: Tensor,
    audited: Tensor,
    memory: Memory,
) -> dict[int, ScreenedRoutes]:
    credits = route_credits(base, routes, wanted, memory)
    return {
        layer: _screen(base, layer, given, credits[layer], wanted, keep, audited, memory)
        for layer, given in routes.items()
    }


def _joined(parts: list[ScreenedRoutes]) -> ScreenedRoutes:
    """Of all sequences, from those of some each."""

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    starts = np.cumsum([0, *(len(part.credit) for part in parts)])
    audit = ScreenAudit(
        np.concatenate([part.audit.sequence + start for part, start in zip(parts, starts)]),
        np.concatenate([part.audit.advantage for part in parts]),
        np.concatenate([part.audit.advantage_kept for part in parts]),
    )
    return ScreenedRoutes(
        whole("credit"), whole("logp"), whole("logp_standard"), whole("logp_null"), whole("is_kept"), audit
    )


def _check_counts(keep: int, audit: int, seed: int) -> tuple[int, int, int]:
    kept, audited = as_whole(keep) or 0, as_whole(audit) or 0
    if kept < 1 or audited < 1:
        raise ConfigError(f"keep={keep} and audit={audit}", "at least one of each", "Raise them.")
    return kept, audited, check_seed(seed)


def route_credits(
    base: RecordedPass, routes: Mapping[int, LayerRoutes], wanted: Tensor, memory_budget: int | Memory | None = None
) -> dict[int, Tensor]:
    """By layer, each route's first-order advantage over the standard one, ``[batch, pos, route]`` in nats.

    NaN at tokens that are not ``wanted`` ``[batch, pos]``, and at absent routes.
    """
    memory = check_memory(base.moe, memory_budget)
    gradients = own_gradients(base, tuple(routes), wanted, memory)
    return {layer: _credit(base, layer, given, gradients[layer], wanted, memory) for layer, given in routes.items()}


@torch.inference_mode(False)
def own_gradients(
    base: RecordedPass, layers: Sequence[int], wanted: Tensor, memory_budget: int | Memory | None = None
) -> dict[int, Tensor]:
    """By layer, ``d log p(own next token) / d (output of the experts' block)``, ``[batch, pos, d_model]``.

    Later tokens' predictions do not enter (see the module's text). Zero at tokens that are not ``wanted``.

    Raises:
        ConfigError: a layer at which branches are not exact on this model.
    """
    first, above = min(layers), sorted(set(layers) - {min(layers)})
    if reason := base.refusal(first):
        raise ConfigError(
            f"screening from layer {first}, but {reason}",
            "layers that branches are exact at",
            "Screen later layers, or score all routes with score_routes.",
        )
    block_out = base.block_out(first)
    gradients = {layer: torch.zeros_like(block_out, dtype=_at_least_float(block_out)) for layer in layers}
    targets = base.tokens.roll(-1, dims=1).reshape(-1)
    # with copies of the keys, whose attention can be differentiated
    memory = check_memory(base.moe, memory_budget)
    plan = Plan(base, first, 1, memory.bytes, shares_keys=False)
    with (
        torch.enable_grad(),
        BranchRunner(base, first, shares_keys=False) as run,
        _Recorder(base, above) as recorded,
    ):

        def differentiate(sequence: Tensor, token: Tensor) -> None:
            leaf = block_out[token].detach().requires_grad_()
            states = run(sequence, token % plan.n_pos, leaf)
            outputs = [leaf, *(recorded.values[layer] for layer in above)]
            found = torch.autograd.grad(states, outputs, _unembedding_gradient(run, states, targets[token], plan))
            for layer, gradient in zip([first, *above], found):
                gradients[layer][token] = gradient.reshape(leaf.shape).to(gradients[layer].dtype)

        for sequences, tokens in _rows(plan, wanted, len(base.blocks) - first):

            def some(part: slice, sequences: Tensor = sequences, tokens: Tensor = tokens) -> None:
                differentiate(sequences[part], tokens[part])

            memory.in_parts(some, len(sequences), "rows of tokens")
    memory.say()
    return {layer: gradient.view(*base.tokens.shape, -1) for layer, gradient in gradients.items()}


class _Recorder:
    """Keeps the outputs of the experts' blocks of some layers, within their graph; a context manager."""

    def __init__(self, base: RecordedPass, layers: Sequence[int]) -> None:
        self.base, self.layers = base, layers
        self.values: dict[int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Recorder:
        for layer in self.layers:
            block = dict(self.base.blocks[layer].named_children())[self.base.targets[layer]]
            self._stack.callback(block.register_forward_hook(self._keeper(layer)).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _keeper(self, layer: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            self.values[layer] = output[0] if isinstance(output, tuple) else output

        return keep


def _rows(plan: Plan, wanted: Tensor, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences ``[row]`` and flat tokens ``[row, n]``: fewer rows at once than branches take, as the graph is kept."""
    token = wanted.reshape(-1).nonzero().flatten()
    if not len(token):
        return
    n = max(1, plan.rows_at_once // depth)
    for sequence, chosen in plan.rows(token):
        yield from zip(sequence.split(n), token[chosen].split(n))


def _unembedding_gradient(run: BranchRunner, states: Tensor, targets: Tensor, plan: Plan) -> Tensor:
    """``d logp / d states``, of the shape of ``states``, with few logits in memory at a time."""
    parts: list[Tensor] = []
    for state, target in zip(
        states.detach().flatten(0, 1).split(plan.logits_at_once), targets.flatten().split(plan.logits_at_once)
    ):
        leaf = state.requires_grad_()
        logp = log_probs(run.logits(leaf), target.unsqueeze(-1))
        parts += torch.autograd.grad(logp.sum(), [leaf])
    return torch.cat(parts).view(states.shape)


@torch.no_grad()
def _credit(
    base: RecordedPass, layer: int, routes: LayerRoutes, gradient: Tensor, wanted: Tensor, memory: Memory
) -> Tensor:
    with_standard, flat = routes.with_standard(base, layer), gradient.flatten(0, 1)
    # of a plan for branches, only how many tokens at a time: none run here
    plan = Plan(base, layer, with_standard.indices.shape[2], memory.bytes, shares_keys=True)
    credit = gradient.new_full((len(flat), routes.indices.shape[2]), float("nan"))

    def fill(tokens: Tensor) -> None:
        outputs = block_outputs(base, layer, with_standard, tokens)
        difference = outputs[:, 1:] - outputs[:, :1]
        # shape: (token, route, d_model) . (token, d_model, 1) -> (token, route)
        credit[tokens] = torch.bmm(difference.to(flat.dtype), flat[tokens].unsqueeze(-1)).squeeze(-1)

    for chunk in plan.chunks(wanted):
        memory.in_parts(lambda part, chunk=chunk: fill(chunk[part]), len(chunk), "tokens with their routes")  # type: ignore[misc]
    return credit.view(routes.indices.shape[:3]).masked_fill(~routes.present, float("nan"))


def _screen(
    base: RecordedPass,
    layer: int,
    routes: LayerRoutes,
    credit: Tensor,
    wanted: Tensor,
    keep: int,
    audited: Tensor,
    memory: Memory,
) -> ScreenedRoutes:
    ranked = credit.nan_to_num(nan=float("-inf"))
    order = ranked.topk(min(keep, ranked.shape[-1]), dim=-1).indices
    slots = order.unsqueeze(-1).expand(-1, -1, -1, routes.indices.shape[-1])
    kept = LayerRoutes(routes.indices.gather(2, slots), routes.weights.gather(2, slots), routes.has_own_weights)
    scores = score_wanted(base, {layer: kept}, wanted, None, "branch", memory)
    logp = torch.full_like(credit, float("nan"), dtype=scores.logp.dtype).scatter(2, order, scores.logp)
    whole = score_wanted(base, {layer: routes}, audited, None, "branch", memory)
    is_kept = torch.zeros_like(routes.present).scatter(2, order, True) & routes.present & wanted.unsqueeze(-1)
    return ScreenedRoutes(
        credit, logp, scores.logp_standard, scores.logp_null, is_kept, _audit(whole.logp, whole.logp_standard, is_kept)
    )


def _sample(wanted: Tensor, n: int, seed: int) -> Tensor:
    """``n`` of the wanted tokens (all where there are fewer), as a mask."""
    places = wanted.reshape(-1).nonzero().flatten()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:n]
    chosen = torch.zeros_like(wanted)
    chosen.view(-1)[places[order.to(places.device)]] = True
    return chosen


def _audit(logp: Tensor, standard: Tensor, is_kept: Tensor) -> ScreenAudit:
    advantage = (logp - standard.unsqueeze(-1)).nan_to_num(nan=float("-inf"))
    sequence, position = (advantage > float("-inf")).any(dim=-1).nonzero().unbind(1)
    advantage, is_kept = advantage[sequence, position], is_kept[sequence, position]

    def best(values: Tensor) -> np.ndarray:
        return values.amax(dim=-1).double().cpu().numpy()

    return ScreenAudit(
        sequence.cpu().numpy(),
        best(advantage),
        best(advantage.masked_fill(~is_kept, float("-inf"))),
    )


def _at_least_float(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32
