"""Everything that runs a TransformerLens model runs an attached one, with our hooks as with its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.utilities import get_act_name

from moe_interp.hooks.names import HOOK_NAMES
from tests import tiny
from tests.integration.surface.helpers import (
    TOKENS,
    attach_to,
    build,
    cache_of,
    largest_difference,
    logits_of,
    negate,
    run_hooked,
)

BATCH, POS = TOKENS.shape
# what these tests hold does not depend on the family's rule: one of each way of opening a block is enough
SOME = ["olmoe", "qwen2_moe", "gpt_oss", "deepseek_v3", "llama4", "jetmoe", "gemma4_text"]


def expected_shape(moe: Any, name: str, layer: Any) -> tuple[int, ...]:
    spec = moe.spec(layer)
    last = {
        "router_in": (spec.d_model,),
        "router_logits": (spec.n_experts,),
        "router_probs": (spec.n_experts,),
        "expert_indices": (spec.top_k,),
        "expert_weights": (spec.top_k,),
        "expert_post": (spec.top_k, spec.d_expert),
        "expert_out": (spec.top_k, spec.d_model),
        "routed_out": (spec.d_model,),
        "shared_out": (spec.d_model,),
    }[name]
    return BATCH, POS, *last


# --- caching --------------------------------------------------------------------------------------------------


def test_unfiltered_caching_holds_every_hook_in_its_shape_and_changes_nothing(family: str) -> None:
    bridge = build(family)
    plain = logits_of(bridge, family)
    unattached = set(bridge.run_with_cache(TOKENS, **tiny.model_inputs(family, TOKENS))[1])
    moe = attach_to(family)
    with torch.no_grad():
        logits, cache = moe.bridge.run_with_cache(TOKENS, **tiny.model_inputs(family, TOKENS))
    assert largest_difference(logits, plain) <= 5e-6
    assert set(cache) - unattached == set(moe.hook_names())
    assert unattached <= set(cache)
    for layer in moe.layers:
        for name in moe.hooks(layer):
            activation = moe.cached(cache, name, layer)
            assert activation.shape == expected_shape(moe, name, layer), (name, layer)
            assert activation.is_floating_point() != (name == "expert_indices")


@pytest.mark.parametrize("family", [*SOME, "switch_transformers"])
def test_string_list_and_callable_filters_cache_the_same(family: str) -> None:
    moe = attach_to(family)
    inputs = tiny.model_inputs(family, TOKENS)
    everything = cache_of(moe, family)
    assert set(everything) == set(moe.hook_names())
    last = moe.layers[-1]
    names = [moe.hook_name("router_logits", last), moe.hook_name("expert_out", last)]
    with torch.no_grad():
        for names_filter in (names[0], names, moe.filter("router_logits", "expert_out", layers=[last])):
            cache = moe.bridge.run_with_cache(TOKENS, names_filter=names_filter, **inputs)[1].cache_dict
            assert set(cache) == ({names[0]} if names_filter == names[0] else set(names))
            for name in cache:
                assert largest_difference(cache[name], everything[name]) <= 5e-6, name


def test_the_filter_leaves_the_hooks_of_like_name_of_transformer_lens_out() -> None:
    moe = attach_to("olmoe")
    alike = "blocks.0.mlp.hook_expert_weights"
    assert alike in moe.bridge.hook_dict
    assert not moe.filter("expert_weights")(alike)
    assert set(cache_of(moe, "olmoe", "expert_weights")) == {f"blocks.{i}.hook_expert_weights" for i in range(3)}


def test_a_position_slice_and_a_dropped_batch_axis() -> None:
    for family in SOME:
        moe = attach_to(family)
        whole, last = cache_of(moe, family), cache_of(moe, family, pos_slice=-1)
        single = cache_of(moe, family, tokens=TOKENS[:1], remove_batch_dim=True)
        for name, activation in whole.items():
            assert torch.equal(last[name].squeeze(1), activation[:, -1]), name
            assert single[name].shape == activation.shape[1:], name
            torch.testing.assert_close(single[name], activation[0], atol=2e-5, rtol=1e-5)


def test_hooks_without_a_batch_axis_edit_as_with_it() -> None:
    moe = attach_to("olmoe")
    name = moe.hook_name("router_logits", 1)
    shapes = []

    def edit(activation: Tensor, hook: Any) -> Tensor:
        shapes.append(activation.shape)
        return negate(activation, hook)

    with_axis = run_hooked(moe, "olmoe", [(name, edit)], TOKENS[:1])
    without = run_hooked(moe, "olmoe", [(name, edit)], TOKENS[:1], remove_batch_dim=True)
    assert torch.equal(with_axis, without)
    assert shapes == [(1, POS, 8), (POS, 8)]


@pytest.mark.parametrize("name", SOME)
def test_act_names_and_cache_lookups_by_layer(name: str) -> None:
    moe = attach_to(name)
    with torch.no_grad():
        cache = moe.bridge.run_with_cache(TOKENS, names_filter=moe.filter())[1]
    for layer in moe.layers:
        for hook in moe.hooks(layer):
            assert get_act_name(hook, layer) == moe.hook_name(hook, layer)
            assert cache[hook, layer] is moe.cached(cache, hook, layer)


def test_encoder_decoder_layers_are_labelled_by_their_stack() -> None:
    family = "switch_transformers"
    moe = attach_to(family)
    assert moe.layers == (("encoder", 1), ("encoder", 3), ("decoder", 1), ("decoder", 3))
    assert moe.hook_name("router_logits", ("encoder", 3)) == "encoder_blocks.3.hook_router_logits"
    assert moe.layer_label("decoder.1") == ("decoder", 1)
    cache = cache_of(moe, family, "router_logits")
    assert [moe.cached(cache, "router_logits", layer).shape for layer in moe.layers] == [(BATCH, POS, 8)] * 4
    plain = logits_of(moe.bridge, family)
    for layer in moe.layers:
        hook = (moe.hook_name("router_logits", layer), negate)
        assert largest_difference(run_hooked(moe, family, [hook]), plain) > 1e-3


def test_an_encoder_and_a_decoder_of_different_lengths_keep_their_own_positions() -> None:
    moe = attach_to("switch_transformers")
    with torch.no_grad():
        _, cache = moe.bridge.run_with_cache(TOKENS, decoder_input_ids=TOKENS[:, :3], names_filter=moe.filter())
    for layer in moe.layers:
        n_pos = POS if layer[0] == "encoder" else 3
        assert all(moe.cached(cache, name, layer).shape[:2] == (BATCH, n_pos) for name in moe.hooks(layer))


# --- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SOME, "phimoe", "laguna", "nemotron_h", "deepseek_v4"])
def test_backward_caching_holds_the_gradient_of_every_differentiable_hook(name: str) -> None:
    moe = attach_to(name)
    floats = [hook for hook in HOOK_NAMES if hook != "expert_indices" and any(hook in moe.hooks(i) for i in moe.layers)]
    plain = moe.bridge(TOKENS, return_type="loss")
    loss, cache = moe.bridge.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=moe.filter(*floats))
    assert largest_difference(loss, plain) <= 5e-6
    for layer in moe.layers:
        for hook in moe.hooks(layer):
            if hook != "expert_indices":
                full = moe.hook_name(hook, layer)
                assert cache[f"{full}_grad"].shape == cache[full].shape
                assert torch.isfinite(cache[f"{full}_grad"]).all()
        assert cache[f"{moe.hook_name('routed_out', layer)}_grad"].abs().max() > 0
    assert not any(_handles(moe))


def test_backward_hooks_alone_see_gradients() -> None:
    moe = attach_to("olmoe")
    seen: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.clone()

    names = [moe.hook_name(hook, 1) for hook in moe.hooks(1) if hook != "expert_indices"]
    with moe.bridge.hooks(bwd_hooks=[(name, keep) for name in names]):
        moe.bridge(TOKENS, return_type="loss").backward()
    assert set(seen) == set(names)
    assert all(gradient.abs().max() > 0 for gradient in seen.values())


# --- hooks that stay, hooks that go ---------------------------------------------------------------------------


def _handles(moe: Any) -> list[Any]:
    return [handle for name in moe.hook_names() for handle in moe.bridge.hook_dict[name]._forward_hooks]


@pytest.mark.parametrize("family", [*SOME, "switch_transformers"])
def test_four_ways_of_adding_a_hook_give_the_same_logits(family: str) -> None:
    moe = attach_to(family)
    bridge = moe.bridge
    plain = logits_of(bridge, family)
    # hash layers (deepseek_v4) do not re-route, so the last layer is edited
    name = moe.hook_name("router_logits", moe.layers[-1])
    edited = run_hooked(moe, family, [(name, negate)])
    assert largest_difference(edited, plain) > 1e-3
    by_filter = run_hooked(moe, family, [(moe.filter("router_logits", layers=moe.layers[-1:]), negate)])
    assert torch.equal(by_filter, edited)
    with bridge.hooks(fwd_hooks=[(name, negate)]):
        assert torch.equal(logits_of(bridge, family), edited)
    assert torch.equal(logits_of(bridge, family), plain)
    bridge.add_hook(name, negate)
    assert torch.equal(logits_of(bridge, family), edited)
    bridge.reset_hooks()
    bridge.add_perma_hook(name, negate)
    bridge.reset_hooks()
    assert torch.equal(logits_of(bridge, family), edited)
    bridge.reset_hooks(including_permanent=True)
    assert torch.equal(logits_of(bridge, family), plain)
    assert not _handles(moe)


@pytest.mark.parametrize("name", SOME)
def test_stopping_at_a_layer_caches_the_layers_before(name: str) -> None:
    moe = attach_to(name)
    plain = logits_of(moe.bridge, name)
    stop = moe.layers[-1]
    whole = cache_of(moe, name)
    with torch.no_grad():
        residual, cache = moe.bridge.run_with_cache(TOKENS, stop_at_layer=stop, names_filter=moe.filter())
        resid_pre = moe.bridge.run_with_cache(TOKENS, names_filter=f"blocks.{stop}.hook_resid_pre")[1]
    torch.testing.assert_close(residual, resid_pre["resid_pre", stop], atol=5e-6, rtol=0)
    assert set(cache) == {full for layer in moe.layers[:-1] for full in moe.hook_names(layer)}
    assert all(torch.equal(cache[full], whole[full]) for full in cache)
    assert torch.equal(logits_of(moe.bridge, name), plain)


# --- patching -------------------------------------------------------------------------------------------------


def patch_logit(corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
    _, pos, expert = index
    corrupted[:, pos, expert] = clean[:, pos, expert]
    return corrupted


def test_a_patching_sweep_over_router_logits_equals_hooks_by_hand() -> None:
    family = "qwen2_moe"  # layer 0 is dense
    moe = attach_to(family)
    clean, corrupted = TOKENS[:1, :4], tiny.random_tokens(1, 4, seed=5)
    cache = moe.bridge.run_with_cache(clean, names_filter=moe.filter("router_logits"))[1]

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 7] - logits[0, -1, 11]

    cells = moe.patch_index(axes=("layer", "pos", "expert"), n_pos=4)
    assert cells.shape == (2 * 4 * 8, 3)
    with torch.no_grad():
        table = patching.generic_activation_patch(
            moe.bridge, corrupted, cache, metric, patch_logit, "router_logits", index_df=cells
        )
        plain = metric(moe.bridge(corrupted))
        for row in (5, 20, 63):
            layer, pos, expert = cells.iloc[row]

            def by_hand(activation: Tensor, hook: Any, at: Any = (layer, pos, expert)) -> Tensor:
                return patch_logit(activation, list(at), cache["router_logits", at[0]])

            hook = (moe.hook_name("router_logits", layer), by_hand)
            assert metric(moe.bridge.run_with_hooks(corrupted, fwd_hooks=[hook])) == table[row]
    assert len(table.unique()) > 10
    assert (table != plain).any()


def test_index_axis_names_cannot_serve_models_with_dense_layers() -> None:
    """The limit of TransformerLens' own helper that `patch_index` is there for."""
    moe = attach_to("qwen2_moe")
    cache = moe.bridge.run_with_cache(TOKENS, names_filter=moe.filter("router_logits"))[1]
    arguments = (moe.bridge, TOKENS, cache, lambda logits: logits[0, -1, 7], patch_logit, "router_logits")
    with pytest.raises(KeyError):
        patching.generic_activation_patch(*arguments, index_axis_names=("layer", "pos"))
    with pytest.raises(KeyError, match="expert"):
        patching.generic_activation_patch(*arguments, index_axis_names=("layer", "pos", "expert"))
