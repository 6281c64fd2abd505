"""Detaching gives back the very model: modules, hooks, forwards, modes and weights, and logits 0.0 apart."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from moe_interp.errors import AttachError
from moe_interp.hooks.attach import MoEHooks, attach, attached
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


def modules_of(bridge: TransformerBridge) -> Iterator[tuple[str, nn.Module]]:
    """Every module, under each of its names, of the bridge and of the transformers model inside."""
    yield from bridge.named_modules(remove_duplicate=False)
    for name, module in bridge.original_model.named_modules(remove_duplicate=False):
        yield f"original.{name}", module


def build_used(family: str) -> TransformerBridge:
    """A bridge that has cached once: transformers then registers capturing hooks of its own, for good."""
    bridge = build(family)
    bridge.run_with_cache(TOKENS, **tiny.model_inputs(family, TOKENS))
    return bridge


def state_of(module: nn.Module) -> dict[str, Any]:
    """What attaching could leave behind in a module, by identity where it has one."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "id": id(module),
        "children": {name: id(child) for name, child in module._modules.items()},
        "attributes": set(module.__dict__),
        "forward": module.__dict__.get("forward"),
        "training": module.training,
        "handles": {kind: list(getattr(module, kind)) for kind in hooks},
        "lens_handles": (len(module.fwd_hooks), len(module.bwd_hooks)) if isinstance(module, HookPoint) else None,
    }


def snapshot(bridge: TransformerBridge) -> dict[str, Any]:
    model = bridge.original_model
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "modules": {name: state_of(module) for name, module in modules_of(bridge)},
        "hook_dict": {name: id(point) for name, point in bridge.hook_dict.items()},
        "registry": {name: id(point) for name, point in bridge._hook_registry.items()},
        "tensors": {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for kind in ("modules", "hook_dict", "registry", "tensors"):
        assert before[kind].keys() == after[kind].keys(), kind
    for name, state in before["modules"].items():
        assert state == after["modules"][name], name
    assert before["hook_dict"] == after["hook_dict"]
    assert list(before["registry"].items()) == list(after["registry"].items())
    for name, (identity, values) in before["tensors"].items():
        other, now = after["tensors"][name]
        assert identity == other, name
        assert torch.equal(values, now), name


def use(moe: MoEHooks, family: str) -> None:
    """Caching, edits before and after selection, and a permanent hook that stays."""
    cache_of(moe, family)
    layer = moe.layers[-1]
    indices = torch.arange(moe.spec(layer).top_k).expand(*TOKENS.shape, -1)
    run_hooked(moe, family, [(moe.hook_name("router_logits", layer), negate)])
    run_hooked(moe, family, [(moe.hook_name("expert_indices", layer), lambda activation, hook: indices)])
    moe.bridge.add_perma_hook(moe.hook_name("routed_out", layer), lambda activation, hook: None)
    logits_of(moe.bridge, family)


def test_detaching_gives_back_the_very_model(family: str) -> None:
    bridge = build_used(family)
    plain = logits_of(bridge, family)
    before = snapshot(bridge)
    moe = attach(bridge)
    assert set(moe.hook_names()) <= set(bridge.hook_dict)
    assert torch.equal(logits_of(bridge, family), plain)
    use(moe, family)
    moe.detach()
    assert_same(before, snapshot(bridge))
    assert torch.equal(logits_of(bridge, family), plain)
    assert attached(bridge) is None
    assert not moe.is_attached


def test_a_models_own_forwards_and_hooks_survive() -> None:
    """Such as accelerate's, which replaces `forward`, and a user's hooks on TransformerLens' own points."""
    bridge = build_used("qwen2_moe")
    container: Any = bridge.blocks[1].mlp.original_component
    inner, calls = container.forward, []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    container.forward = wrapped
    bridge.add_perma_hook("blocks.1.hook_resid_pre", lambda activation, hook: calls.append(2))
    before = snapshot(bridge)
    plain = logits_of(bridge, "qwen2_moe")
    with attach(bridge) as moe:
        cache_of(moe, "qwen2_moe")
        assert calls == [2, 1, 2, 1]
    assert container.__dict__["forward"] is wrapped
    assert_same(before, snapshot(bridge))
    assert torch.equal(logits_of(bridge, "qwen2_moe"), plain)


def test_the_context_manager_detaches_also_after_an_error() -> None:
    bridge = build_used("olmoe")
    before = snapshot(bridge)
    with attach(bridge) as moe:
        assert attached(bridge) is moe
    assert_same(before, snapshot(bridge))
    with pytest.raises(ZeroDivisionError), attach(bridge):
        raise ZeroDivisionError
    assert_same(before, snapshot(bridge))
    with attach(bridge) as moe:
        moe.detach()
    assert_same(before, snapshot(bridge))


def test_attaching_and_detaching_twice() -> None:
    for family in ("deepseek_v3", "llama4", "switch_transformers"):
        bridge = build_used(family)
        before = snapshot(bridge)
        first = attach(bridge)
        cached = cache_of(first, family)
        first.detach()
        second = attach(bridge)
        again = cache_of(second, family)
        assert cached.keys() == again.keys()
        assert all(torch.equal(cached[name], again[name]) for name in cached)
        with pytest.raises(AttachError, match="no longer attached to"):
            first.detach()
        assert attached(bridge) is second
        second.detach()
        assert_same(before, snapshot(bridge))


def test_some_layers_only_and_without_expert_outputs() -> None:
    bridge = build_used("olmoe")
    before = snapshot(bridge)
    moe = attach(bridge, layers=[2, 0], expert_outputs=False)
    assert moe.layers == (0, 2)
    added = set(bridge.hook_dict) - set(before["hook_dict"])
    assert added == {f"blocks.{i}.hook_{name}" for i in (0, 2) for name in moe.hooks(0)}
    assert not {"expert_post", "expert_out"} & set(moe.hooks(0))
    moe.detach()
    assert_same(before, snapshot(bridge))


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "nemotron_h", "llama4", "jetmoe", "gemma4"])
def test_an_exception_in_a_hook_leaves_no_state(family: str) -> None:
    moe = attach_to(family)
    plain = logits_of(moe.bridge, family)
    before = snapshot(moe.bridge)

    def fail(activation: Tensor, hook: Any) -> Tensor:
        activation.zero_()
        raise ZeroDivisionError

    for layer in moe.layers:
        for name in moe.hooks(layer):
            with pytest.raises(ZeroDivisionError):
                run_hooked(moe, family, [(moe.hook_name(name, layer), fail)])
            assert torch.equal(logits_of(moe.bridge, family), plain), name
    assert_same(before, snapshot(moe.bridge))


def test_an_exception_with_permanent_hooks_then_a_good_run() -> None:
    """The shared experts run before the routed ones here: an aborted pass must not hand its value to the next."""
    moe = attach_to("qwen2_moe")
    other = tiny.random_tokens(2, 8, seed=9)
    expected = cache_of(moe, "qwen2_moe", tokens=other)

    def fail(activation: Tensor, hook: Any) -> Tensor:
        raise ZeroDivisionError

    names = [name for name in moe.hook_names(1) if "indices" not in name]
    hooks = [(name, fail if name.endswith("expert_out") else negate) for name in names]
    with pytest.raises(ZeroDivisionError):
        run_hooked(moe, "qwen2_moe", hooks)
    again = cache_of(moe, "qwen2_moe", tokens=other)
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_detaching_frees_the_hooks() -> None:
    bridge = build_used("olmoe")
    moe = attach(bridge)
    alive = weakref.ref(moe)
    point = weakref.ref(bridge.hook_dict[moe.hook_name("router_logits", 0)])
    moe.detach()
    del moe
    gc.collect()
    assert alive() is None
    assert point() is None


def test_plain_runs_keep_nothing_of_a_pass() -> None:
    moe = attach_to("olmoe")
    kept: list[Any] = []

    def keep(activation: Tensor, hook: Any) -> None:
        kept.append(weakref.ref(activation))

    run_hooked(moe, "olmoe", [(moe.hook_name("expert_out", 1), keep)])
    gc.collect()
    assert kept[0]() is None
    assert largest_difference(logits_of(moe.bridge, "olmoe"), logits_of(build("olmoe"), "olmoe")) == 0.0
