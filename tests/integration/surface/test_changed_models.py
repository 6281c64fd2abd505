"""What is changed after attaching is what the next pass runs with, or is refused in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_interp.arch.modules import unwrap
from moe_interp.errors import HookError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.hooks.layer import Opened
from moe_interp.interventions.router import random_routing
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


def set_k(model: nn.Module, k: int) -> None:
    """As users do: on every module and configuration that has the number."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name in ("top_k", "num_experts_per_tok", "top_k_experts"):
                if isinstance(getattr(holder, "__dict__", {}).get(name), int):
                    setattr(holder, name, k)


def assert_as_attached_now(moe: MoEHooks, family: str) -> None:
    """An attached model gives what a copy of its unattached model gives when attached now."""
    plain = copy.deepcopy(moe.bridge)
    plain.__dict__["_moe_interp_hooks"].detach()
    assert torch.equal(logits_of(moe.bridge, family), logits_of(plain, family))
    now = attach(plain)
    layer = moe.layers[-1]
    found, expected = moe.spec(layer), now.spec(layer)
    for name in ("n_experts", "top_k", "d_model", "d_expert", "expert_dtype"):
        assert getattr(found, name) == getattr(expected, name), name
    seen, wanted = cache_of(moe, family), cache_of(now, family)
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)
    edited = [(moe.hook_name("router_logits", layer), negate)]
    assert torch.equal(run_hooked(moe, family, edited), run_hooked(now, family, edited))
    drawn = [run_hooked(each, family, random_routing(each, [layer])) for each in (moe, now)]
    assert torch.equal(*drawn)


def test_another_k_after_attaching(family: str) -> None:
    moe = attach_to(family)
    before = moe.spec(moe.layers[-1]).top_k
    _ = logits_of(moe.bridge, family)
    set_k(moe.bridge.original_model, 1)
    assert_as_attached_now(moe, family)
    slots = cache_of(moe, family, "expert_indices")[moe.hook_name("expert_indices", moe.layers[-1])].shape[-1]
    # Phi-MoE's sparse mixer always takes two, tables of experts have their own width
    fixed = family == "phimoe" or hasattr(unwrap(moe.spec(moe.layers[-1]).router), "tid2eid")
    assert moe.spec(moe.layers[-1]).top_k == slots == (before if fixed else 1)


WEIGHTS = ["olmoe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "laguna", "nemotron_h", "jetmoe"]
PARTS = ("experts", "gate", "router", "shared_expert", "shared_experts")


@pytest.mark.parametrize("family", WEIGHTS)
def test_other_weights_after_attaching(family: str) -> None:
    """In place, as data, as new parameters and from a state dictionary; correction biases and scales included."""
    draw = torch.Generator().manual_seed(0)
    moe = attach_to(family)
    run_hooked(moe, family, [(moe.hook_name("expert_out", moe.layers[-1]), lambda value, hook: value)])
    spec = moe.spec(moe.layers[-1])
    with torch.no_grad():
        for module in {*spec.router.modules(), *spec.experts.modules(), spec.container}:
            for i, (name, parameter) in enumerate(list(module.named_parameters(recurse=False))):
                new = parameter + 0.3 * torch.randn(parameter.shape, generator=draw)
                if i % 3 == 0:
                    parameter.copy_(new)
                elif i % 3 == 1:
                    parameter.data = new
                else:
                    setattr(module, name, nn.Parameter(new, requires_grad=parameter.requires_grad))
    for name in ("norm_topk_prob", "routed_scaling_factor", "router_logit_softcapping"):
        for module in (spec.router, spec.container):
            if name in vars(module):
                setattr(module, name, not vars(module)[name] if name == "norm_topk_prob" else 1.7)
    assert_as_attached_now(moe, family)
    other = build(family).original_model.state_dict()
    moe.bridge.original_model.load_state_dict(other, strict=False)
    assert_as_attached_now(moe, family)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "nemotron_h", "llama4"])
def test_other_modules_after_attaching(family: str) -> None:
    """Experts, routers and shared experts in the place of the old ones are opened at the next pass."""
    moe, other = attach_to(family), build(family)
    plain = logits_of(moe.bridge, family)
    _ = cache_of(moe, family)
    for block, theirs in zip(moe.bridge.blocks, other.blocks):
        for name in [name for name, _ in unwrap(block).named_modules()]:
            parent, _, leaf = name.rpartition(".")
            if leaf in PARTS and parent:
                new = copy.deepcopy(theirs.get_submodule(f"_original_component.{name}"))
                with torch.no_grad():
                    for parameter in new.parameters():
                        parameter.mul_(1.1)
                setattr(unwrap(block).get_submodule(parent), leaf, new)
    assert largest_difference(logits_of(moe.bridge, family), plain) > 1e-4
    assert_as_attached_now(moe, family)
    moe.detach()
    forwards = [getattr(vars(module).get("forward"), "__self__", None) for module in moe.bridge.modules()]
    assert not any(isinstance(owner, Opened) for owner in forwards)


def test_fewer_experts_after_attaching() -> None:
    moe = attach_to("mixtral")
    for layer in moe.layers:
        spec = moe.spec(layer)
        experts, router = spec.experts, spec.router
        for module, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (router, "weight")):
            setattr(module, name, nn.Parameter(getattr(module, name)[:5].detach().clone()))
        experts.num_experts = router.num_experts = 5
    assert moe.spec(1).n_experts == 5
    assert_as_attached_now(moe, "mixtral")


def test_a_block_in_the_place_of_an_attached_one_is_refused() -> None:
    moe = attach_to("olmoe")
    hooks = [(moe.hook_name("router_logits", 1), negate)]
    before = run_hooked(moe, "olmoe", hooks)
    layers: Any = moe.bridge.original_model.model.layers
    kept, layers[1] = layers[1], copy.deepcopy(layers[0])
    with pytest.raises(HookError, match="hooks at layer 1, whose experts' block was replaced after attaching"):
        run_hooked(moe, "olmoe", hooks)
    layers[1] = kept
    assert torch.equal(run_hooked(moe, "olmoe", hooks), before)


def test_forwards_that_were_replaced_after_attaching_are_refused() -> None:
    """A patched forward knows nothing of hooks: it is not passed over in silence."""
    for part in ("experts", "router"):
        moe = attach_to("olmoe")
        module = getattr(moe.spec(1), part)
        module.forward = type(module).forward.__get__(module)
        with pytest.raises(HookError, match=rf"the {part} \(.*\) did not run through the forward that was opened"):
            run_hooked(moe, "olmoe", [(moe.hook_name("router_logits", 1), negate)])
        assert torch.isfinite(logits_of(moe.bridge, "olmoe")).all()


def test_a_forward_that_wraps_ours_lives_on_after_detaching() -> None:
    moe = attach_to("olmoe")
    plain = logits_of(moe.bridge, "olmoe")
    experts: Any = moe.spec(1).experts
    opened = experts.forward

    def doubled(*args: Tensor) -> Tensor:
        return 2 * opened(*args)

    experts.forward = doubled
    changed = logits_of(moe.bridge, "olmoe")
    assert largest_difference(changed, plain) > 1e-4
    moe.detach()
    assert experts.forward is doubled
    assert torch.equal(logits_of(moe.bridge, "olmoe", TOKENS), changed)
