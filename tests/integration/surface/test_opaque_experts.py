"""Experts whose weights cannot be read (quantised, wrapped, of an unknown class) and routers with adapters around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moe_interp.arch.modules import child, unwrap
from moe_interp.errors import AttachError, HookError, MoEInterpError
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.interventions.ablate import ablate_experts
from moe_interp.interventions.force import force_experts
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

ROUTING = ("router_in", "router_logits", "expert_indices", "expert_weights", "routed_out")
# experts called by the protocol (hidden, indices, weights)
CALLED = [f for f in tiny.FAMILIES if f not in ("jetmoe", "switch_transformers", "llama4", "llama4_vl")]


class ParamWrapper(nn.Module):
    """An adapter as peft puts it around fused weights: the module inside is called with the weights changed."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)


class PackedExperts(nn.Module):
    """Quantised experts: the weights are bytes, and only the module knows how to read them."""

    def __init__(self, native: nn.Module) -> None:
        super().__init__()
        self.num_experts = native.num_experts
        self.gate_up_proj = nn.Parameter(torch.zeros(self.num_experts, 4, 4, dtype=torch.uint8), requires_grad=False)
        self._unpacked = [native]  # no submodule

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self._unpacked[0](hidden_states, top_k_index, top_k_weights)


def replace(moe_or_bridge: Any, attribute: str, kind: type[nn.Module]) -> None:
    """Puts a module around every experts module (or router) of a model."""
    attached = isinstance(moe_or_bridge, MoEHooks)
    moe = moe_or_bridge if attached else attach(moe_or_bridge)
    for layer in moe.layers:
        spec = moe.spec(layer)
        *path, name = (spec.family.experts_at if attribute == "experts" else spec.family.router).split(".")
        setattr(child(spec.container, ".".join(path)), name, kind(getattr(spec, attribute)))
    if not attached:
        moe.detach()


# of every family once; a wrapper around the experts differs in what it is called, so few families serve
WRAPPED = ("olmoe", "deepseek_v3", "gpt_oss", "gemma4_text", "laguna")


@pytest.mark.parametrize(
    ("family", "kind"), [(f, PackedExperts) for f in CALLED] + [(f, ParamWrapper) for f in WRAPPED]
)
def test_routing_hooks_attach_to_any_experts(family: str, kind: type[nn.Module]) -> None:
    readable = attach_to(family)
    bridge = build(family)
    replace(bridge, "experts", kind)
    plain = logits_of(bridge, family)
    moe = attach(bridge)
    layer = moe.layers[-1]
    assert not {"expert_post", "expert_out"} & set(moe.hooks(layer))
    assert set(readable.hooks(layer)) - set(moe.hooks(layer)) == {"expert_post", "expert_out"}
    reason = "adapter or a wrapper of the class ParamWrapper" if kind is ParamWrapper else "of the class PackedExperts"
    assert reason in moe.absent(layer)["expert_out"]
    for ask in (lambda: moe.hook_name("expert_out", layer), lambda: moe.filter("expert_post")):
        with pytest.raises(HookError, match=reason):
            ask()
    with pytest.raises(HookError, match=r"[Mm]erge"):
        ablate_experts(moe, layer, [0], mode="mean")
    sizes = [(s.n_experts, s.top_k, s.d_model) for s in (readable.spec(layer), moe.spec(layer))]
    assert sizes[0] == sizes[1]
    seen, expected = cache_of(moe, family), cache_of(readable, family)
    assert set(seen) == {name for name in expected if not name.endswith(("expert_post", "expert_out"))}
    for name, value in seen.items():
        torch.testing.assert_close(value, expected[name], atol=2e-6, rtol=1e-5)
    assert torch.equal(logits_of(bridge, family), plain)
    # edits of the routing, also with empty slots, give what the model with readable experts gives
    name = moe.hook_name("expert_indices", layer)

    def empty(value: Tensor, hook: Any) -> None:
        value[:, ::2, -1] = -1

    for hooks in (
        lambda moe: [(moe.hook_name("router_logits", layer), negate)],
        lambda moe: [(name, empty)],
        lambda moe: force_experts(moe, layer, 2),
    ):
        edited, wanted = run_hooked(moe, family, hooks(moe)), run_hooked(readable, family, hooks(readable))
        assert largest_difference(edited, wanted) <= 5e-5
        assert largest_difference(edited, plain) > 1e-4
    moe.detach()
    assert torch.equal(logits_of(bridge, family), plain)


def test_verify_names_the_hooks_that_are_absent() -> None:
    bridge = build("deepseek_v3")
    replace(bridge, "experts", ParamWrapper)
    table = attach(bridge).verify(TOKENS)
    assert table.ok, table[~table["passed"]]
    absent = table[table["check"] == "the hook is served"]
    assert set(absent["hook"]) == {"expert_post", "expert_out"}
    assert absent["note"].str.contains("absent: an adapter or a wrapper of the class ParamWrapper").all()


def test_experts_that_become_unreadable_after_attaching_are_refused_in_words() -> None:
    moe = attach_to("olmoe")
    replace(moe, "experts", ParamWrapper)
    name = moe.hook_name("expert_out", 1)
    with pytest.raises(HookError, match="adapter or a wrapper of the class ParamWrapper is around the experts"):
        run_hooked(moe, "olmoe", [(name, lambda value, hook: value)])
    edit = [(moe.hook_name("router_logits", 1), negate)]
    assert torch.equal(run_hooked(moe, "olmoe", edit), run_hooked(attach_to("olmoe"), "olmoe", edit))
    moe.detach()


def test_experts_of_an_unknown_form_are_refused_in_words() -> None:
    """They are handed something else than hidden states, ids and weights."""

    class Sorted(nn.Module):
        num_experts = 8

        def forward(self, hidden: Tensor, routing: object, gather: object) -> Tensor:
            return hidden

    def packed(block: Any, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        return block.experts(flat, block.gate(flat), None).view(hidden.shape)

    bridge = build("olmoe")
    for block in bridge.blocks:
        native = unwrap(unwrap(block).mlp)
        native.experts, native.forward = Sorted(), packed.__get__(native)
    moe = attach(bridge)
    plain = logits_of(bridge, "olmoe")
    words = r"experts of the class Sorted at layer 1, which are handed \(Tensor, tuple, NoneType"
    with pytest.raises(HookError, match=words):
        run_hooked(moe, "olmoe", [(moe.hook_name("router_logits", 1), negate)])
    assert torch.equal(logits_of(bridge, "olmoe"), plain)


def test_the_packed_block_of_gpt_oss_is_run_step_by_step() -> None:
    """Its own forward routes inside of a kernel; the names are transformers'."""
    family = "gpt_oss"

    class Mxfp4GptOssExperts(PackedExperts):
        pass

    class Mxfp4GptOssMLP(nn.Module):
        def __init__(self, router: nn.Module, experts: nn.Module) -> None:
            super().__init__()
            self.router, self.experts = router, experts

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            x = hidden.reshape(-1, hidden.shape[-1])
            logits = nn.functional.linear(x, unwrap(self.router).weight, unwrap(self.router).bias)
            weights, ids = logits.topk(unwrap(self.router).top_k)
            return self.experts._unpacked[0](x, ids, weights.softmax(-1)).view(hidden.shape), logits

    readable, bridge = attach_to(family), build(family)
    for block in bridge.blocks:
        layer = unwrap(block)
        native = unwrap(layer.mlp)
        layer.mlp = Mxfp4GptOssMLP(native.router, Mxfp4GptOssExperts(native.experts))
    moe = attach(bridge)
    edit = [(moe.hook_name("router_logits", moe.layers[-1]), negate)]
    torch.testing.assert_close(run_hooked(moe, family, edit), run_hooked(readable, family, edit), atol=2e-5, rtol=1e-5)
    assert "Mxfp4GptOssExperts" in moe.absent(0)["expert_out"]


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gemma4_text", "laguna", "phimoe", "llama4", "jetmoe"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_router_with_an_adapter_around_it_serves_its_hooks(family: str, when: str) -> None:
    bridge = build(family)
    if when == "before":
        replace(bridge, "router", ParamWrapper)
    moe = attach(bridge)
    if when == "after":
        replace(moe, "router", ParamWrapper)
    readable = attach_to(family)
    edit = [(moe.hook_name("router_logits", moe.layers[-1]), negate)]
    assert torch.equal(run_hooked(moe, family, edit), run_hooked(readable, family, edit))
    seen, expected = cache_of(moe, family), cache_of(readable, family)
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


class LowRank(nn.Module):
    """A linear map with a low-rank adapter beside it, as peft names its parts."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        with torch.no_grad():
            for part in (self.lora_A, self.lora_B):
                part.weight.copy_(torch.randn(part.weight.shape, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self) -> Tensor:
        return self.base_layer.weight + self.lora_B.weight @ self.lora_A.weight


def test_a_low_rank_adapter_on_a_routers_linear_map_is_heard() -> None:
    """Gemma 4 returns no logits: they are those of the whole map, not of its parts."""
    adapted, merged = build("gemma4_text"), build("gemma4_text")
    for bridge in (adapted, merged):
        for block in bridge.blocks:
            router = unwrap(unwrap(block).router)
            around = LowRank(unwrap(router.proj))
            if bridge is adapted:
                router.proj = around
            else:
                unwrap(router.proj).weight.data = around.merged().detach()
    moe, reference = attach(adapted), attach(merged)
    seen, expected = cache_of(moe, "gemma4_text"), cache_of(reference, "gemma4_text")
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, atol=2e-5, rtol=1e-4)
    assert moe.spec(0).d_model == reference.spec(0).d_model


def test_parametrized_weights_are_read_as_they_are_computed() -> None:
    """A low-rank update within the fused weights (torch's parametrizations), against the same weights merged."""

    class Shift(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.1 * weight.flip(0)

    moe, merged = attach_to("olmoe"), attach_to("olmoe")
    for layer in moe.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(moe.spec(layer).experts, name, Shift())
            getattr(merged.spec(layer).experts, name).data = getattr(moe.spec(layer).experts, name).detach()
    assert torch.equal(logits_of(moe.bridge, "olmoe"), logits_of(merged.bridge, "olmoe"))
    seen, expected = cache_of(moe, "olmoe"), cache_of(merged, "olmoe")
    assert all(torch.equal(seen[name], expected[name]) for name in expected)


def test_a_router_that_does_not_say_its_rule_is_refused_in_words() -> None:
    class Stranger(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    bridge = build("olmoe")
    unwrap(unwrap(bridge.blocks[1]).mlp).gate = Stranger()
    with pytest.raises(AttachError, match="a router of the class Stranger"):
        attach(bridge)
    # and where it comes after attaching
    moe = attach_to("olmoe")
    moe.spec(1).container.gate = Stranger()
    with pytest.raises(MoEInterpError):
        run_hooked(moe, "olmoe", [(moe.hook_name("router_logits", 1), negate)], TOKENS)
