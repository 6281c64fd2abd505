"""``score_routes``: the realized next token's log-probability under any routes of any tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moe_interp.engine import threads_asleep
from moe_interp.engine.eval_mode import in_eval_mode
from moe_interp.engine.memory import Memory, out_of_memory_in_words
from moe_interp.engine.pass_inputs import Tokens, check_memory, check_tokens
from moe_interp.engine.recorded_pass import RecordedPass, record_pass
from moe_interp.errors import ConfigError, DataError, RouteError, warn
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.force import set_routes
from moe_interp.routes.branch_scores import LayerRoutes, RouteScores, ruled_routes
from moe_interp.routes.grid_scores import exact_scores
from moe_interp.routes.inputs import by_label, checked_experts, decoder_layer, scorable
from moe_interp.routes.plan import score_dtype
from moe_interp.routes.predictions import log_probs, mean_entropy
from moe_interp.types import EMPTY, Layer

Method = Literal["auto", "branch", "naive"]
"""How to score: "branch" (exact, one token a route), "naive" (one full forward a route), or "auto"."""


class SlowRoutesWarning(UserWarning):
    """Routes are scored by full forward passes, because branches would not be exact here."""


_said: WeakKeyDictionary[MoEHooks, set[str]] = WeakKeyDictionary()


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def score_routes(
    moe: MoEHooks,
    tokens: Tokens,
    layer: Layer,
    routes: Tensor,
    positions: Sequence[int] | Tensor | None = None,
    weights: Tensor | None = None,
    attention_mask: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
    compile: bool = False,
) -> Tensor:
    """Log-probability of the realized next token, for each token and each of its counterfactual routes at one layer.

    ``logp[b, t, r] = log p(tokens[b, t+1] | tokens[b, :t+1], token t takes route r at the layer)``; all other tokens
    and layers as they are (later layers of token t route by what they read).

    Args:
        moe: Attached hooks.
        tokens: ``[batch, pos]`` ids, or texts: they become what ``bridge.to_tokens`` makes of them, with BOS once.
        layer: An MoE layer.
        routes: ``[batch, pos, route, slot]`` expert ids, as many slots as the router uses. -1 is an empty slot, a route
            of -1 only is absent (NaN).
        positions: Tokens to score: integers counted in the unpadded sequences (negative from the end), or a bool
            ``[batch, pos]``; all by default.
        weights: Of the shape of ``routes``, used as they are; the family's weights for each set by default.
        attention_mask: ``[batch, pos]``, 0 at padding, on either side.
        method: "branch" is exact and hundreds of times faster; "naive" runs one ``run_with_hooks`` a route and is the
            reference; "auto" takes "branch" where it is exact on this model and says once where it is not.
        memory_budget: Bytes that branches may take at a time, besides the plain forward; by default what is
            free (on a processor half of it). Where it does not do all the same, fewer are taken, with a warning.
        compile: Run the layers above under ``torch.compile``, where branches run as a grid (on a GPU, with most
            positions scored). The same results to rounding, in half the time for the layers; compiling takes about 12
            seconds for each shape of a group of branches, so it is worth it from about a hundred thousand routes. Where
            it cannot be done, branches run without, and a warning says once why.

    Returns:
        ``[batch, pos, route]`` in nats, float32 (float64 for a float64 model); NaN at the last position, before and at
        padding, at positions not asked and at absent routes.

    Raises:
        RouteError: repeated or out-of-range experts, another number of slots or shape.
        DataError: no route, no token to score, a position that no sequence has, tokens beyond the model's context, or a
            log-probability that is not finite.
        HookError: the layer is dense or does not exist.
        AttachError: hooks that were detached, or a bridge in their place.
        ConfigError: another method, "branch" where it would not be exact, or a budget that is no number.

    It does not show whether a route would have been better for the tokens after the next, nor on average over contexts.
    """
    label = decoder_layer(moe, layer)
    indices = None if weights is None else {label: weights}
    return score_joint_routes(
        moe, tokens, {label: routes}, positions, indices, attention_mask, method, memory_budget, compile
    ).logp


@out_of_memory_in_words()
@threads_asleep()
@in_eval_mode
def score_joint_routes(
    moe: MoEHooks,
    tokens: Tokens,
    routes: Mapping[int, Tensor],
    positions: Sequence[int] | Tensor | None = None,
    weights: Mapping[int, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
    compile: bool = False,
) -> RouteScores:
    """As :func:`score_routes`, with routes at several layers of the token at once: route r of each, jointly.

    Raises:
        RouteError: also other numbers of routes at some layers than at others, a layer named twice, or weights for a
            layer without routes.
    """
    ids, mask = check_tokens(moe, tokens, attention_mask)
    indices = by_label(moe, routes)
    fixed = by_label(moe, weights, "weights") if weights else {}
    counts = {layer: tuple(given.shape[:3]) for layer, given in indices.items()}
    if not indices or set(fixed) - set(indices) or len(set(counts.values())) > 1:
        raise RouteError(
            f"routes [batch, pos, route] by layer {counts}, weights at layers {sorted(fixed)}",
            "at least one layer, the same numbers at all, and weights for layers with routes only",
            "Route r of one layer is taken with route r of the others.",
        )
    _check_method(method)
    given = {layer: checked_experts(moe, ids, layer, tensor, fixed.get(layer)) for layer, tensor in indices.items()}
    wanted = scorable(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool(), positions)
    memory = check_memory(moe, memory_budget)

    def score(rows: slice) -> RouteScores:
        base = record_pass(moe, ids[rows], sorted(given), None if mask is None else mask[rows])
        routes = {
            layer: ruled_routes(base, layer, experts[rows], None if weights is None else weights[rows])
            for layer, (experts, weights) in given.items()
        }
        return score_wanted(base, routes, wanted[rows], None, method, memory, range(len(ids))[rows], compile=compile)

    found = _joined(memory.in_parts(score, len(ids), "sequences"))
    memory.say()
    return found


def score_from_base(
    base: RecordedPass,
    routes: Mapping[int, LayerRoutes],
    positions: Sequence[int] | Tensor | None = None,
    targets: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | Memory | None = None,
    names: Sequence[str] | None = None,
    averaged: Tensor | None = None,
    compile: bool = False,
) -> RouteScores:
    """Score routes on the sequences of a base pass, which serves any number of layers and of route sets.

    Args:
        base: The plain forward pass, whose router logits routes may have been sampled from.
        routes: By layer, as :func:`check_routes` gives them; several layers are taken jointly.
        positions: See :func:`score_routes`.
        targets: ``[batch, pos, target]`` token ids to score instead of the realized next token, such as draws from the
            model's own prediction; the last axis then stays.
        method: See :func:`score_routes`.
        memory_budget: Likewise, or the memory of a longer run.
        names: What errors call the sequences; their number in the batch by default.
        averaged: ``[batch, pos, route]`` bool, the routes of a token whose predictions are averaged, for
            ``mean_entropy``.
        compile: See :func:`score_routes`.
    """
    _check_method(method)
    wanted, memory = scorable(base.is_real, positions), check_memory(base.moe, memory_budget)
    return score_wanted(base, routes, wanted, targets, method, memory, names, averaged, compile)


def score_wanted(
    base: RecordedPass,
    routes: Mapping[int, LayerRoutes],
    wanted: Tensor,
    targets: Tensor | None,
    method: Method,
    memory: Memory,
    names: Sequence[Any] | None = None,
    averaged: Tensor | None = None,
    compile: bool = False,
) -> RouteScores:
    """As :func:`score_from_base`, at the tokens ``wanted`` ``[batch, pos]``, which may be none."""
    ids = base.tokens.roll(-1, dims=1).unsqueeze(-1) if targets is None else targets
    standard = log_probs(base.logits, ids).masked_fill(~wanted.unsqueeze(-1), float("nan"))
    chosen = _method(base, routes, method)
    if chosen == "branch":
        logp, null, entropy = exact_scores(base, routes, wanted, ids, memory, averaged, compile)
        if method == "auto" and _is_off(null, standard, wanted, base.logits.dtype):
            chosen = _slowly(base, min(routes), "the standard route does not come out as in the plain forward")
    if chosen == "naive":
        logp, null, entropy = _naive_scores(base, routes, wanted, ids, averaged)
    _refuse_non_finite(logp, routes, wanted, names)
    if targets is None:
        logp, null, standard = logp.squeeze(-1), null.squeeze(-1), standard.squeeze(-1)
    mean_entropies = None if averaged is None else entropy
    return RouteScores(logp, standard, null, router_logp(base, routes), chosen, mean_entropies)


def _joined(parts: list[RouteScores]) -> RouteScores:
    """Scores of all sequences, from those of some each, without mean predictions."""
    if len(parts) == 1:
        return parts[0]

    def whole(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    method = "naive" if any(part.method == "naive" for part in parts) else "branch"
    return RouteScores(whole("logp"), whole("logp_standard"), whole("logp_null"), whole("router_logp"), method)


def router_logp(base: RecordedPass, routes: Mapping[int, LayerRoutes]) -> Tensor:
    """``sum_e log pi(e)`` over each route's experts (and over layers), ``[batch, pos, route]``; NaN where absent."""
    total: Tensor | float = 0.0
    for layer, given in routes.items():
        policy = base.moe.spec(layer).rule.log_policy(base.router_logits[layer])
        slots = policy.unsqueeze(2).expand(*given.indices.shape[:3], -1).gather(-1, given.indices.clamp(min=0))
        summed = slots.masked_fill(given.indices == EMPTY, 0.0).sum(dim=-1)
        total = total + summed.masked_fill(~given.present, float("nan"))
    assert isinstance(total, Tensor)
    return total


def _check_method(method: Method) -> None:
    if method not in ("auto", "branch", "naive"):
        raise ConfigError(f"method={method!r}", '"auto", "branch" or "naive"', 'Use "auto".')


def _method(base: RecordedPass, routes: Mapping[int, LayerRoutes], method: Method) -> str:
    if method == "naive":
        return "naive"
    reason = base.refusal(min(routes))
    if any(point.has_hooks() for point in base.moe.bridge.hook_dict.values()):
        reason = "other hooks are on the bridge, which may depend on a token's place in the batch"
    if any(base.moe.spec(layer).weight_on_input and given.has_own_weights for layer, given in routes.items()):
        reason = "given weights scale the experts' inputs in this family"
    if reason is None:
        return "branch"
    if method == "branch":
        given = f'method="branch" at layer {min(routes)}, but {reason}'
        raise ConfigError(given, "a layer that branches are exact at", 'Use "auto".')
    return _slowly(base, min(routes), reason)


def _slowly(base: RecordedPass, layer: int, reason: str) -> str:
    said = _said.setdefault(base.moe, set())
    if reason not in said:
        said.add(reason)
        family = base.moe.spec(layer).family.name
        warn(f"Routes of {family} at layer {layer} are scored by one full forward each: {reason}.", SlowRoutesWarning)
    return "naive"


def _is_off(null: Tensor, standard: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether the null route misses the plain forward on more tokens than near-ties of later routers explain."""
    tolerance, share = {torch.float64: (1e-6, 0.01), torch.float32: (1e-3, 0.01)}.get(dtype, (1.0, 0.05))
    distance = (null - standard)[wanted].abs().amax(dim=-1)
    return int((~(distance <= tolerance)).sum()) > max(1, share * len(distance))


def _naive_scores(
    base: RecordedPass, routes: Mapping[int, LayerRoutes], wanted: Tensor, targets: Tensor, averaged: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One ``run_with_hooks`` a route, the standard route's among them; as :func:`exact_scores`."""
    with_null = {layer: given.with_standard(base, layer) for layer, given in routes.items()}
    present = torch.stack([given.present for given in with_null.values()]).all(dim=0)
    present[:, :, 0] = True  # also of a token whose experts were all full
    present &= wanted.unsqueeze(-1)
    dtype = score_dtype(base.logits)
    logp = base.logits.new_full((*present.shape, targets.shape[-1]), float("nan"), dtype=dtype)
    entropy = logp.new_full(wanted.shape, float("nan"))
    for sequence, pos in wanted.nonzero().tolist():
        sums, n = logp.new_zeros(base.logits.shape[-1]), 0
        for route in present[sequence, pos].nonzero().flatten().tolist():
            log = _naive_logits(base, with_null, sequence, pos, route).to(dtype).log_softmax(dim=-1)
            logp[sequence, pos, route] = log[targets[sequence, pos]]
            if averaged is not None and route and bool(averaged[sequence, pos, route - 1]):
                sums, n = sums + log.exp(), n + 1
        if n:
            entropy[sequence, pos] = mean_entropy(sums / n)
    return logp[:, :, 1:], logp[:, :, 0], entropy


def _naive_logits(base: RecordedPass, routes: Mapping[int, LayerRoutes], sequence: int, pos: int, route: int) -> Tensor:
    """``[vocab]``: a full forward pass of the sequence, in which one token takes a route."""
    hooks: list[Any] = []
    mask = base.is_real[sequence : sequence + 1]
    place = [int(mask[0, : pos + 1].sum()) - 1]
    for layer, given in routes.items():
        at = (sequence, pos, route)
        weights = given.weights[at] if given.has_own_weights else None
        hooks += set_routes(base.moe, layer, given.indices[at], weights, place, mask)
    with torch.no_grad():
        # without padding no mask, as in the base pass
        logits: Tensor = base.moe.bridge.run_with_hooks(
            base.tokens[sequence : sequence + 1],
            fwd_hooks=hooks,
            attention_mask=None if bool(base.is_real.all()) else mask.long(),
        )
    return logits[0, pos]


def _refuse_non_finite(
    logp: Tensor, routes: Mapping[int, LayerRoutes], wanted: Tensor, names: Sequence[Any] | None
) -> None:
    present = torch.stack([given.present for given in routes.values()]).all(dim=0) & wanted.unsqueeze(-1)
    bad = present & ~logp.isfinite().all(dim=-1)
    if bool(bad.any()):
        sequence, pos, route = bad.nonzero()[0].tolist()
        name = sequence if names is None else repr(names[sequence])
        experts = {layer: given.indices[sequence, pos, route].tolist() for layer, given in routes.items()}
        raise DataError(
            f"log-probability {logp[sequence, pos, route].tolist()} of sequence {name}, position {pos} under route "
            f"{route} (experts by layer: {experts})",
            "finite log-probabilities",
            "Look for overflow in the model at this number format, or for weights that are too large.",
        )
