"""The check of ``moe.verify()`` that branches score routes as full forward passes do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_interp.engine.recorded_pass import record_pass
from moe_interp.hooks.attach import MoEHooks
from moe_interp.interventions.random_keys import uniform_keys
from moe_interp.routes.inputs import check_routes
from moe_interp.routes.score import score_from_base
from moe_interp.verification.finding import Finding, excepted
from moe_interp.verification.model_under_test import ModelUnderTest

CHECK = "branch scoring equals naive scoring"
HOOK = "expert_indices"
BOUND = {torch.float64: 1e-6, torch.float32: 1e-3}  # nats
HALF = 0.25  # the same for other formats, about what these differ from float32
N_ROUTES = 2


def branches_equal_naive(tested: ModelUnderTest) -> Iterator[Finding]:
    """Random routes of a token in the middle of each sequence: by branches and by one ``run_with_hooks`` a route.

    The figure is the largest difference in nats, over the routes and the standard route. Layers at which branches are
    not exact are excepted: there, routes are scored by full forward passes.
    """
    moe = tested.moe
    if not isinstance(moe, MoEHooks) or isinstance(tested.layers[0], tuple):
        for layer in tested.layers:
            yield excepted(CHECK, layer, HOOK, "counterfactual routes are defined for causal decoders")
        return
    layers = [layer for layer in tested.layers if isinstance(layer, int)]
    base = record_pass(moe, tested.tokens, layers)
    for layer in layers:
        reason = base.refusal(layer)
        if reason is not None or tested.tokens.shape[1] < 2:
            yield excepted(CHECK, layer, HOOK, reason or "a single token has no next one")
            continue
        given = {layer: check_routes(base, layer, _random_routes(moe, layer, tested.tokens))}
        middle = [(tested.tokens.shape[1] - 1) // 2]
        fast = score_from_base(base, given, middle, None, "branch")
        slow = score_from_base(base, given, middle, None, "naive")
        distance = (fast.logp - slow.logp).abs().nan_to_num()  # NaN: positions that are not asked
        figure = max(float(distance.max()), fast.null_distance)
        # a model may return a finer format than it computes in
        formats = [base.logits.dtype, moe.spec(layer).expert_dtype]
        formats += [torch.float32] if any(map(_has_digits_of_float32, base.weights.values())) else []
        bound = max(BOUND.get(dtype, HALF) for dtype in formats)
        yield Finding(check=CHECK, layer=layer, hook=HOOK, figure=figure, bound=bound)


def _has_digits_of_float32(weights: Tensor) -> bool:
    """Whether a router of a finer model weighs in float32, as many do by name."""
    return torch.equal(weights, weights.float().to(weights.dtype))


def _random_routes(moe: MoEHooks, layer: int, tokens: Tensor) -> Tensor:
    """``[batch, pos, route, slot]``, uniform; the same in every run."""
    spec = moe.spec(layer)
    place = torch.arange(tokens.numel() * N_ROUTES, device=tokens.device).view(*tokens.shape, N_ROUTES)
    keys = uniform_keys(place, spec.n_experts, layer)
    return keys.topk(spec.top_k, dim=-1).indices
