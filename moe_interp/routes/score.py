"""``score_routes``: the realized next token's log-probability under any routes of any tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moe_interp.errors import ConfigError, DataError, RouteError
from moe_interp.hooks.attach import MoEHooks
from moe_interp.hooks.branches import BasePass
from moe_interp.hooks.layer import check_route
from moe_interp.interventions.force import set_routes
from moe_interp.routes.branch import LayerRoutes, RouteScores, branch_scores, log_probs, ruled_routes
from moe_interp.routes.plan import score_dtype
from moe_interp.types import EMPTY, Layer

Method = Literal["auto", "branch", "naive"]
"""How to score: "branch" (exact, one token a route), "naive" (one full forward a route), or "auto"."""


class SlowRoutesWarning(UserWarning):
    """Routes are scored by full forward passes, because branches would not be exact here."""


_said: WeakKeyDictionary[MoEHooks, set[str]] = WeakKeyDictionary()


def score_routes(
    moe: MoEHooks,
    tokens: Tensor,
    layer: Layer,
    routes: Tensor,
    positions: Sequence[int] | Tensor | None = None,
    weights: Tensor | None = None,
    attention_mask: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """Log-probability of the realized next token, for each token and each of its counterfactual routes at one layer.

    ``logp[b, t, r] = log p(tokens[b, t+1] | tokens[b, :t+1], token t takes route r at the layer)``; all other tokens
    and layers as they are (later layers of token t route by what they read).

    Args:
        moe: Attached hooks.
        tokens: ``[batch, pos]`` ids.
        layer: An MoE layer.
        routes: ``[batch, pos, route, slot]`` expert ids, as many slots as the router uses. -1 is an empty slot, a route
            of -1 only is absent (NaN).
        positions: Tokens to score: integers counted in the unpadded sequences (negative from the end), or a bool
            ``[batch, pos]``; all by default.
        weights: Of the shape of ``routes``, used as they are; the family's weights for each set by default.
        attention_mask: ``[batch, pos]``, 0 at padding, on either side.
        method: "branch" is exact and hundreds of times faster; "naive" runs one ``run_with_hooks`` a route and is the
            reference; "auto" takes "branch" where it is exact on this model and says once where it is not.
        memory_budget: Bytes that branches may take at a time, besides the plain forward; by default 1 GiB.

    Returns:
        ``[batch, pos, route]`` in nats, float32 (float64 for a float64 model); NaN at the last position, before and at
        padding, at positions not asked and at absent routes.

    Raises:
        RouteError: repeated or out-of-range experts, another number of slots or shape.
        DataError: no route, no token to score, tokens beyond the model's context, or a log-probability that is not
            finite.
        HookError: the layer is dense or does not exist.
        ConfigError: another method, or "branch" where it would not be exact.

    It does not show whether a route would have been better for the tokens after the next, nor on average over contexts.
    """
    label = decoder_layer(moe, layer)
    indices = None if weights is None else {label: weights}
    return score_joint_routes(
        moe, tokens, {label: routes}, positions, indices, attention_mask, method, memory_budget
    ).logp


def score_joint_routes(
    moe: MoEHooks,
    tokens: Tensor,
    routes: Mapping[int, Tensor],
    positions: Sequence[int] | Tensor | None = None,
    weights: Mapping[int, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
) -> RouteScores:
    """As :func:`score_routes`, with routes at several layers of the token at once: route r of each, jointly."""
    tokens = check_tokens(moe, tokens, attention_mask)
    labels = [decoder_layer(moe, layer) for layer in routes]
    base = BasePass(moe, tokens, sorted(labels), attention_mask)
    given = {
        label: check_routes(base, label, tensor, (weights or {}).get(layer))
        for label, (layer, tensor) in zip(labels, routes.items())
    }
    return score_from_base(base, given, positions, None, method, memory_budget)


def score_from_base(
    base: BasePass,
    routes: Mapping[int, LayerRoutes],
    positions: Sequence[int] | Tensor | None = None,
    targets: Tensor | None = None,
    method: Method = "auto",
    memory_budget: int | None = None,
    names: Sequence[str] | None = None,
) -> RouteScores:
    """Score routes on the sequences of a base pass, which serves any number of layers and of route sets.

    Args:
        base: The plain forward pass, whose router logits routes may have been sampled from.
        routes: By layer, as :func:`check_routes` gives them; several layers are taken jointly.
        positions: See :func:`score_routes`.
        targets: ``[batch, pos, target]`` token ids to score instead of the realized next token, such as draws from the
            model's own prediction; the last axis then stays.
        method, memory_budget: See :func:`score_routes`.
        names: What errors call the sequences; their number in the batch by default.
    """
    wanted = scorable(base, positions)
    ids = base.tokens.roll(-1, dims=1).unsqueeze(-1) if targets is None else targets
    standard = log_probs(base.logits, ids).masked_fill(~wanted.unsqueeze(-1), float("nan"))
    chosen = _method(base, routes, method)
    if chosen == "branch":
        logp, null = branch_scores(base, routes, wanted, ids, memory_budget)
        if method == "auto" and _is_off(null, standard, wanted, base.logits.dtype):
            chosen = _slowly(base, min(routes), "the standard route does not come out as in the plain forward")
    if chosen == "naive":
        logp, null = _naive_scores(base, routes, wanted, ids), standard
    _refuse_non_finite(logp, routes, wanted, names)
    if targets is None:
        logp, null, standard = logp.squeeze(-1), null.squeeze(-1), standard.squeeze(-1)
    return RouteScores(logp, standard, null, router_logp(base, routes), chosen)


def router_logp(base: BasePass, routes: Mapping[int, LayerRoutes]) -> Tensor:
    """``sum_e log pi(e)`` over each route's experts (and over layers), ``[batch, pos, route]``; NaN where absent."""
    total: Tensor | float = 0.0
    for layer, given in routes.items():
        policy = base.moe.spec(layer).rule.log_policy(base.router_logits[layer])
        slots = policy.unsqueeze(2).expand(*given.indices.shape[:3], -1).gather(-1, given.indices.clamp(min=0))
        summed = slots.masked_fill(given.indices == EMPTY, 0.0).sum(dim=-1)
        total = total + summed.masked_fill(~given.present, float("nan"))
    assert isinstance(total, Tensor)
    return total


def scorable(base: BasePass, positions: Sequence[int] | Tensor | None = None) -> Tensor:
    """``[batch, pos]`` bool: real tokens with a real next token, among the positions asked.

    Raises:
        DataError: there is none.
    """
    real = base.is_real
    wanted = torch.zeros_like(real)
    wanted[:, :-1] = real[:, :-1] & real[:, 1:]
    if positions is not None:
        asked = torch.as_tensor(positions, device=real.device)
        if asked.dtype == torch.bool:
            wanted &= asked
        else:
            index, length = real.long().cumsum(dim=1) - 1, real.long().sum(dim=1, keepdim=True)
            asked = torch.where(asked < 0, asked + length, asked.expand(len(real), -1))
            wanted &= (index.unsqueeze(-1) == asked.unsqueeze(1)).any(dim=-1)
    if not bool(wanted.any()):
        raise DataError(
            f"no token to score among {int(real.sum())} real tokens"
            + ("" if positions is None else f" and positions {positions}"),
            "at least one real token followed by a real token",
            "Pass longer sequences, or other positions.",
        )
    return wanted


def check_tokens(moe: MoEHooks, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Token ids as ``[batch, pos]``, refused where the model cannot read them.

    Raises:
        DataError: no integer ids, a mask of another shape, or sequences beyond the context.
    """
    tokens = torch.as_tensor(tokens)
    tokens = (tokens.unsqueeze(0) if tokens.ndim == 1 else tokens).to(moe.bridge.cfg.device)
    if (
        tokens.ndim != 2
        or tokens.is_floating_point()
        or (attention_mask is not None and attention_mask.shape != tokens.shape)
    ):
        mask = "" if attention_mask is None else f" with a mask of shape {tuple(attention_mask.shape)}"
        raise DataError(
            f"tokens of shape {tuple(tokens.shape)} and dtype {tokens.dtype}{mask}",
            "integer ids [batch, pos], and a mask of that shape if any",
            "Tokenise the text and pad it to one width.",
        )
    model: Any = moe.bridge.original_model
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens.shape[1] > context:
        raise DataError(
            f"sequences of {tokens.shape[1]} tokens",
            f"at most {context}, the model's context",
            "Split the sequences.",
        )
    return tokens


def check_routes(base: BasePass, layer: int, indices: Tensor, weights: Tensor | None = None) -> LayerRoutes:
    """Routes of one layer, with their weights, refused where no token could take them.

    Raises:
        RouteError: another shape, another number of slots, repeated or out-of-range experts, or weights that
            do not fit.
        DataError: no route.
    """
    spec, (batch, pos) = base.moe.spec(layer), base.tokens.shape
    given = torch.as_tensor(indices).to(base.tokens.device)
    if given.ndim == 4 and given.shape[2] == 0:
        raise DataError("no route to score", "at least one route a token", "Sample routes first.")
    expected = f"integers of shape [{batch}, {pos}, route, {spec.top_k}]"
    if given.is_floating_point() or given.ndim != 4 or given.shape[:2] != (batch, pos) or given.shape[3] != spec.top_k:
        raise RouteError(
            f"routes of shape {tuple(given.shape)} and dtype {given.dtype}",
            f"{expected}: an equal number of experts",
            "Fill routes of fewer experts with -1.",
        )
    check_route(given, spec.n_experts, f"layer {layer}")
    fixed = None if weights is None else torch.as_tensor(weights).to(base.tokens.device)
    if fixed is not None and (fixed.shape != given.shape or not bool(fixed.isfinite().all())):
        raise RouteError(
            f"weights of shape {tuple(fixed.shape)}" + ("" if fixed.shape != given.shape else " that are not finite"),
            f"a finite weight for each slot, of shape {tuple(given.shape)}",
            "Leave weights out for the family's own.",
        )
    return ruled_routes(base, layer, given, fixed)


def decoder_layer(moe: MoEHooks, layer: Layer) -> int:
    if isinstance(moe.layers[0], tuple):
        raise ConfigError(
            f"{moe.spec(moe.layers[0]).family.name}, an encoder-decoder",
            "a causal decoder",
            "Counterfactual routes are defined for next-token prediction; use the hooks directly.",
        )
    label = moe.layer_label(layer)
    assert isinstance(label, int)
    return label


def _method(base: BasePass, routes: Mapping[int, LayerRoutes], method: Method) -> str:
    if method not in ("auto", "branch", "naive"):
        raise ConfigError(f"method={method!r}", '"auto", "branch" or "naive"', 'Use "auto".')
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


def _slowly(base: BasePass, layer: int, reason: str) -> str:
    said = _said.setdefault(base.moe, set())
    if reason not in said:
        said.add(reason)
        family = base.moe.spec(layer).family.name
        warnings.warn(
            f"Routes of {family} at layer {layer} are scored by one full forward each: {reason}.",
            SlowRoutesWarning,
            stacklevel=4,
        )
    return "naive"


def _is_off(null: Tensor, standard: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Whether the null route misses the plain forward on more tokens than near-ties of later routers explain."""
    tolerance, share = {torch.float64: (1e-6, 0.01), torch.float32: (1e-3, 0.01)}.get(dtype, (1.0, 0.05))
    distance = (null - standard)[wanted].abs().amax(dim=-1)
    return int((~(distance <= tolerance)).sum()) > max(1, share * len(distance))


def _naive_scores(base: BasePass, routes: Mapping[int, LayerRoutes], wanted: Tensor, targets: Tensor) -> Tensor:
    """One ``run_with_hooks`` a route."""
    present = torch.stack([given.present for given in routes.values()]).all(dim=0) & wanted.unsqueeze(-1)
    dtype = score_dtype(base.logits)
    logp = base.logits.new_full((*present.shape, targets.shape[-1]), float("nan"), dtype=dtype)
    for sequence, pos, route in present.nonzero().tolist():
        hooks: list[Any] = []
        mask = base.is_real[sequence : sequence + 1]
        place = [int(mask[0, : pos + 1].sum()) - 1]
        for layer, given in routes.items():
            at = (sequence, pos, route)
            weights = given.weights[at] if given.has_own_weights else None
            hooks += set_routes(base.moe, layer, given.indices[at], weights, place, mask)
        with torch.no_grad():
            # without padding no mask, as in the base pass
            logits = base.moe.bridge.run_with_hooks(
                base.tokens[sequence : sequence + 1],
                fwd_hooks=hooks,
                attention_mask=None if bool(base.is_real.all()) else mask.long(),
            )
        logp[sequence, pos, route] = log_probs(logits[0, pos], targets[sequence, pos])
    return logp


def _refuse_non_finite(
    logp: Tensor, routes: Mapping[int, LayerRoutes], wanted: Tensor, names: Sequence[str] | None
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
