"""TransformerLens' own hooks on MoE layers: as before attaching, beside ours too, and agreeing with ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.hooks.attach import MoEHooks, attach
from tests import tiny
from tests.integration.surface.helpers import TOKENS, build, largest_difference, logits_of, negate, run_hooked

ROUTERS = ("gate", "router", "router_gate")  # what TransformerLens calls a router component


def router_hooks(bridge: TransformerBridge, moe: MoEHooks, layer: Any) -> list[str]:
    """Full names of TransformerLens' hooks after the router of a layer, aliases included."""
    prefix = moe.hook_name("router_in", layer).removesuffix("hook_router_in")
    found = []
    for name in bridge.hook_dict:
        *path, hook = name.removeprefix(prefix).split(".")
        at_router = path in [[*parent, router] for parent in ([], ["mlp"], ["moe"]) for router in ROUTERS]
        opened = at_router and hook in ("hook_out", "hook_expert_weights", "hook_expert_indices")
        if name.startswith(prefix) and (opened or hook == "hook_router_scores"):
            found.append(name)
    # beside gemma4's MoE stands a dense MLP, whose gate is none of ours
    return [name for name in found if not (moe.spec(layer).family.name == "gemma4" and ".mlp." in name)]


def edit(activation: Any, hook: Any) -> Any:
    """Turn whatever it is into something else of its kind: other experts, other logits, other weights."""
    if isinstance(activation, tuple):
        return tuple(edit(part, hook) for part in activation)
    if activation.is_floating_point():
        return 0.5 * activation.flip(-1)
    return activation.flip(-1) if activation.shape[-1] > 2 else (activation + 1) % 8


def test_every_activation_of_transformer_lens_is_as_before(family: str) -> None:
    bridge, inputs = build(family), tiny.model_inputs(family, TOKENS)
    with torch.no_grad():
        before = bridge.run_with_cache(TOKENS, **inputs)[1].cache_dict
        moe = attach(bridge)
        unhooked = bridge.run_with_cache(TOKENS, names_filter=lambda name: name in before, **inputs)[1].cache_dict
        hooked = bridge.run_with_cache(TOKENS, **inputs)[1].cache_dict
    assert unhooked.keys() == before.keys()
    assert hooked.keys() == before.keys() | set(moe.hook_names())
    for name, activation in before.items():
        if isinstance(activation, Tensor):
            assert torch.equal(unhooked[name], activation), name
            torch.testing.assert_close(hooked[name], activation, atol=2e-5, rtol=1e-5, msg=name)


def test_editing_a_router_hook_of_transformer_lens_does_what_it_did(family: str) -> None:
    unattached, moe = build(family), attach(build(family))
    plain = logits_of(unattached, family)
    layer = moe.layers[-1]
    names = router_hooks(moe.bridge, moe, layer)
    assert names or family == "nemotron_h", "TransformerLens has no router hook here"
    for name in names:
        with unattached.hooks(fwd_hooks=[(name, edit)]):
            expected = logits_of(unattached, family)
        with moe.bridge.hooks(fwd_hooks=[(name, edit)]):
            assert torch.equal(logits_of(moe.bridge, family), expected), name
            ours = run_hooked(moe, family, [(moe.filter(), lambda activation, hook: activation)])
        assert largest_difference(ours, expected) <= 5e-6, name
    assert torch.equal(logits_of(moe.bridge, family), plain)


def shown(moe: MoEHooks, layer: Any, hook: str, ours: dict[str, Tensor]) -> Tensor:
    """What one of their router hooks shows, put together by hand from ours: ``[batch, pos, ...]``."""
    family, indices, weights = moe.spec(layer).family.name, ours["expert_indices"], ours["expert_weights"]
    at_full_width = torch.zeros(*TOKENS.shape, 8).scatter(-1, indices, weights.float())
    usual = {
        "hook_out": ours["router_logits"],
        "hook_expert_weights": at_full_width,
        "hook_expert_indices": indices,
        "hook_router_scores": weights,
    }
    if family.startswith("granite"):  # mis-wired: the names are one place off
        return {"hook_out": indices, "hook_expert_weights": weights, "hook_expert_indices": ours["router_logits"]}[hook]
    if family == "llama4":
        return {"hook_out": at_full_width, "hook_router_scores": ours["router_logits"]}[hook]
    if family == "switch_transformers":
        return torch.nn.functional.one_hot(indices[..., 0], 8)
    if family == "gemma4":
        return ours["router_probs"]
    if family == "laguna":
        cap = moe.spec(layer).router.router_logit_softcapping
        return torch.tanh(ours["router_logits"] / cap) * cap
    return usual[hook]


def test_their_router_hooks_agree_with_ours(family: str) -> None:
    moe = attach(build(family))
    inputs = tiny.model_inputs(family, TOKENS)
    for edited in (False, True):
        with torch.no_grad(), moe.bridge.hooks(fwd_hooks=[(moe.filter("router_logits"), negate)] if edited else []):
            cache = moe.bridge.run_with_cache(TOKENS, **inputs)[1].cache_dict
        for layer in moe.layers:
            ours = {name: moe.cached(cache, name, layer) for name in moe.hooks(layer)}
            for name in router_hooks(moe.bridge, moe, layer):
                if name not in cache or (edited and "router_gate" in name):
                    continue  # some never fire; that of afmoe fires inside the router, before our edit
                expected = shown(moe, layer, name.rpartition(".")[2], ours)
                # shape: (batch * pos, ...) -> (batch, pos, ...); switch_transformers' are not flat
                assert torch.equal(cache[name].reshape(expected.shape), expected.to(cache[name].dtype)), (name, edited)
