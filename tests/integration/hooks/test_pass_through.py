"""Attaching, reading and caching change nothing, and what the hooks show is what the model itself computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_interp.hooks.names import HOOK_NAMES
from tests import tiny
from tests.integration.hooks.support import TOKENS, TOLERANCE, Opened, assert_near, biggest_difference, opened
from tests.unit.arch.test_rules_native import Route, native_route

MANY_TOKENS = tiny.random_tokens(3, 9, seed=7)


def test_attached_and_unhooked_is_the_model_bit_for_bit(family: str) -> None:
    model = opened(family)
    for tokens in (TOKENS, tiny.random_tokens(1, 1), tiny.random_tokens(3, 9)):
        assert torch.equal(model.run(tokens=tokens), model.plain_logits(tokens))
        assert_near(model.run(tokens=tokens), model.native_logits(tokens))


def test_all_hooks_cached_changes_rounding_only(family: str) -> None:
    model = opened(family)
    logits, seen = model.see(tokens=MANY_TOKENS)
    assert_near(logits, model.run(tokens=MANY_TOKENS))
    assert {label for _, label in seen} == set(model.labels)


def test_all_hooks_cached_in_float64(family: str) -> None:
    model = opened(family, torch.float64)
    logits, _ = model.see(tokens=MANY_TOKENS)
    alone = torch.cat([model.run(tokens=row[None]) for row in MANY_TOKENS])
    unhooked = model.run(tokens=MANY_TOKENS)
    assert logits.dtype == torch.float64
    bound = max(1e-12, 2 * biggest_difference(unhooked, alone))
    assert bound <= 1e-11
    assert_near(logits, unhooked, bound)
    assert torch.equal(unhooked, model.plain_logits(MANY_TOKENS))


def test_a_hook_that_does_nothing_changes_nothing(family: str) -> None:
    """Each hook alone, returning None or a copy of what it was given; all together where gradients flow."""
    model = opened(family)
    unhooked = model.run()
    names = model.moe.hooks(model.last)
    for hook in names:
        for idle in (lambda x: None, lambda x: x.clone()):
            difference = biggest_difference(model.run([(hook, model.last, idle)]), unhooked)
            recomputed = hook in ("expert_post", "expert_out", "routed_out", "shared_out")
            assert difference <= (TOLERANCE if recomputed else 0.0), (hook, difference)
    assert_near(model.run([(hook, model.last, lambda x: None) for hook in names], grad=True).detach(), unhooked)


def test_shapes_and_number_formats(family: str) -> None:
    model = opened(family)
    _, seen = model.see()
    batch, pos = TOKENS.shape
    for label in model.labels:
        spec = model.moe.spec(label)
        experts, width, slots = spec.n_experts, spec.d_model, spec.top_k
        shapes = {
            "router_in": (width,),
            "router_logits": (experts,),
            "router_probs": (experts,),
            "expert_indices": (slots,),
            "expert_weights": (slots,),
            "expert_post": (slots, spec.d_expert),
            "expert_out": (slots, width),
            "routed_out": (width,),
            "shared_out": (width,),
        }
        for hook in model.moe.hooks(label):
            assert seen[hook, label].shape == (batch, pos, *shapes[hook]), (hook, label)
            expected = torch.int64 if hook == "expert_indices" else torch.float32
            assert seen[hook, label].dtype == expected, (hook, label)
        assert (experts, width) == (8, 32)
        assert spec.d_expert == (48 if family == "deepseek_v4" else 24)


HAVE_NO_SCORES = ("gpt_oss", "granite_moe", "granite_moe_hybrid", "jetmoe", "llama4", "llama4_vl", "phimoe")
HAVE_SHARED = (
    *("qwen2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_vl", "deepseek_v2", "deepseek_v2_greedy", "deepseek_v3"),
    *("deepseek_v4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "granite_moe_hybrid", "llama4", "llama4_vl"),
    *("ernie4_5_moe", "afmoe", "laguna", "nemotron_h"),
)


def test_every_hook_that_a_family_can_serve_is_there(family: str) -> None:
    model = opened(family)
    absent = {"router_probs"} if family in HAVE_NO_SCORES else set()
    absent |= set() if family in HAVE_SHARED else {"shared_out"}
    assert set(model.labels) == set(model.native)
    for label in model.labels:
        assert model.moe.hooks(label) == tuple(name for name in HOOK_NAMES if name not in absent)


def routes_of(model: Opened, routers: dict[tiny.Label, Any], run: Callable[[], Any]) -> dict[tiny.Label, Route]:
    """Indices and weights ``[batch, pos, slot]`` that router modules return while ``run`` runs."""
    routes: dict[tiny.Label, Route] = {}

    def reader(label: tiny.Label) -> Callable[..., None]:
        def read(module: Any, args: Any, out: Any) -> None:
            indices, weights = native_route(model.name, model.native[label], out)
            routes[label] = (indices, weights)

        return read

    handles = [router.register_forward_hook(reader(label)) for label, router in routers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return routes


def count_flips(model: Opened, tokens: Tensor) -> tuple[int, int, float]:
    """Token-layers, those of them routed otherwise than in the untouched model, and the widest margin among these."""
    routers = {label: layer.router for label, layer in model.native.items()}
    native = routes_of(model, routers, lambda: model.native_logits(tokens))
    _, seen = model.see(tokens=tokens, only=("router_logits", "expert_indices"))
    tokens_seen, flips, widest = 0, 0, 0.0
    for label, (indices, _) in native.items():
        ours, indices = seen["expert_indices", label], indices.reshape(*tokens.shape, -1)
        flipped = (ours.sort(-1).values != indices.sort(-1).values).any(-1)
        ranked = model.moe.spec(label).rule.choice_logits(seen["router_logits", label]).sort(-1, descending=True).values
        slots = indices.shape[-1]
        margin = ranked[..., slots - 1] - ranked[..., slots]
        tokens_seen, flips = tokens_seen + flipped.numel(), flips + int(flipped.sum())
        widest = max([widest, *margin[flipped].tolist()])
    return tokens_seen, flips, widest


def test_routes_are_those_of_the_untouched_model() -> None:
    """Over all families together: a flip needs a margin below 1e-5, and there are fewer than one in 10^4."""
    total = [0, 0]
    tokens = tiny.random_tokens(8, 32, seed=9)
    for name in tiny.FAMILIES:
        n, flips, widest = count_flips(opened(name), tokens)
        assert widest < 1e-5, name
        total = [total[0] + n, total[1] + flips]
    assert total[0] > 2e4
    assert total[1] / total[0] < 1e-4


def test_no_route_flips_in_float64(family: str) -> None:
    assert count_flips(opened(family, torch.float64), MANY_TOKENS)[1] == 0


def test_indices_and_weights_are_the_router_s_own_bit_for_bit(family: str) -> None:
    model = opened(family)
    routers = {label: model.moe.spec(label).router for label in model.labels}
    unhooked = routes_of(model, routers, model.run)
    _, seen = model.see(only=("expert_indices", "expert_weights"))
    for label, (indices, weights) in unhooked.items():
        assert torch.equal(seen["expert_indices", label].reshape(indices.shape), indices), label
        assert torch.equal(seen["expert_weights", label].reshape(weights.shape), weights), label
