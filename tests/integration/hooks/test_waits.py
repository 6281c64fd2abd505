"""Hooks that only read make the host wait for the device not once more than the model itself does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.arch.expert_functions import StackedFunctions
from moe_interp.arch.grouped_experts import takes_grouped_products
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.hooks.names import HOOK_NAMES
from tests import tiny
from tests.integration.hooks.support import TOKENS, opened
from tests.integration.hooks.test_training import in_training
from tests.waits import counted_waits

OF_ROUTER = ("router_in", "router_logits", "router_probs", "expert_indices", "expert_weights")
AFTER = ("routed_out", "shared_out")
OF_EXPERTS = ("expert_post", "expert_out")
CONTEXTS = {"no_grad": torch.no_grad, "enable_grad": torch.enable_grad, "inference_mode": torch.inference_mode}
Reader = Callable[..., Tensor | None]


def nothing(value: Tensor, hook: Any) -> None:
    """Reads shapes alone."""


def same(value: Tensor, hook: Any) -> Tensor:
    return value


def view(value: Tensor, hook: Any) -> Tensor:
    return value.flatten().view(value.shape)


def computing(value: Tensor, hook: Any) -> None:
    hook.ctx["kept"] = (value, value.float().mean(), value.detach()[..., :1], value.argmax(-1))


def waits(
    moe: MoEHooks, family: str, reader: Reader, context: Callable[[], AbstractContextManager[Any]], *names: str
) -> list[str]:
    """What a pass with the reader at these hooks of all layers waits for."""
    hooks = [(moe.hook_name(name, layer), reader) for layer in moe.layers for name in names if name in moe.hooks(layer)]
    torch.manual_seed(0)
    with moe.bridge.hooks(fwd_hooks=hooks), context(), counted_waits() as seen:
        moe.bridge(TOKENS, **tiny.model_inputs(family, TOKENS))
    return sorted(seen)


def test_the_counter_counts() -> None:
    values = torch.arange(6.0)
    cases: list[Callable[[], Any]] = [
        lambda: bool(values[0]),
        lambda: values[1].item(),
        lambda: values.tolist(),
        lambda: values.numpy(),
        lambda: torch.equal(values, values + 1),
        lambda: values.nonzero(),
        lambda: values.long().unique(),
        lambda: values[values > 2],
        lambda: values.masked_select(values > 2),
        lambda: torch.bincount(values.long()),
        lambda: torch.where(values > 2),
        lambda: int(values.max()),
        lambda: values.clone().index_put_((values > 2,), torch.tensor(1.0)),
    ]
    for case in cases:
        with counted_waits() as seen:
            case()
        assert seen
    with counted_waits() as seen:
        (values * 2).masked_fill(values > 2, 0.0).sort().values[torch.tensor([1, 2])].sum()
    assert not seen


@pytest.mark.parametrize("mode", CONTEXTS)
def test_reading_waits_for_nothing(family: str, mode: str) -> None:
    moe, context = opened(family).moe, CONTEXTS[mode]
    natural = waits(moe, family, nothing, context)
    assert waits(moe, family, nothing, context, *OF_ROUTER) == natural
    assert waits(moe, family, computing, context, *OF_ROUTER, *AFTER) == natural


@pytest.mark.parametrize("reader", [same, view])
def test_handing_back_what_was_given_waits_for_nothing(family: str, reader: Reader) -> None:
    moe = opened(family).moe
    natural = waits(moe, family, nothing, torch.no_grad)
    assert waits(moe, family, reader, torch.no_grad, *OF_ROUTER, *AFTER) == natural


# its experts are modules, not stacks: they are called one after the other, here and in the family's own block, which
# waits for each that has a token
ONE_BY_ONE = ("switch_transformers",)


def cached(moe: MoEHooks, family: str, *names: str) -> list[str]:
    """What ``run_with_cache`` of these hooks of all layers waits for."""
    wanted = {moe.hook_name(name, layer) for layer in moe.layers for name in names if name in moe.hooks(layer)}
    with torch.no_grad(), counted_waits() as seen:
        _, cache = moe.bridge.run_with_cache(
            TOKENS, names_filter=wanted.__contains__, **tiny.model_inputs(family, TOKENS)
        )
    assert set(cache.keys()) == wanted
    return sorted(seen)


def test_experts_outputs_wait_for_nothing(family: str) -> None:
    """By grouped products, as on a GPU: each hook alone, all together, and through ``run_with_cache``."""
    moe = opened(family).moe
    natural, plainly = waits(moe, family, nothing, torch.no_grad), cached(moe, family)
    for names in ((OF_EXPERTS[0],), (OF_EXPERTS[1],), HOOK_NAMES):
        for found, before in (
            (waits(moe, family, nothing, torch.no_grad, *names), natural),
            (cached(moe, family, *names), plainly),
        ):
            if family in ONE_BY_ONE:
                assert 0 < len(found) < len(before)
                assert len([wait for wait in found if "grouped_products" in wait]) == len(moe.layers)
            else:
                assert set(found) <= set(before), names
                assert len(found) <= len(before), names


@pytest.mark.parametrize("mode", CONTEXTS)
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "llama4", "jetmoe", "nemotron_h"])
def test_experts_outputs_wait_for_nothing_in_any_mode(name: str, mode: str) -> None:
    moe = opened(name).moe
    natural = waits(moe, name, nothing, CONTEXTS[mode])
    assert set(waits(moe, name, computing, CONTEXTS[mode], *HOOK_NAMES)) <= set(natural)


def test_without_a_grouped_product_a_loop_asks_once_a_layer_for_the_rows_of_each_expert() -> None:
    """The only wait of a reading hook: where torch has no grouped product, as in float64 on any device."""
    model = opened("olmoe", torch.float64)
    natural = waits(model.moe, "olmoe", nothing, torch.no_grad)
    found = waits(model.moe, "olmoe", nothing, torch.no_grad, *HOOK_NAMES)
    more = [wait for wait in found if wait not in natural]
    assert len(more) == len(model.moe.layers)
    assert all("Tensor.tolist" in wait and "grouped_products" in wait for wait in more)


def test_away_from_a_processor_no_loop_is_taken(family: str) -> None:
    """However many rows there are. torch tells of a device without values for bfloat16 alone."""
    experts = opened(family).moe.spec(opened(family).last).expert_functions
    if family in ONE_BY_ONE:
        assert not isinstance(experts, StackedFunctions)
        return
    elsewhere = copy.copy(experts)
    elsewhere.stacks = tuple(stack.detach().to("meta", torch.bfloat16) for stack in experts.stacks)
    for n_rows in (1, 10**6):
        assert takes_grouped_products(elsewhere, elsewhere.stacks[0].new_empty(1, 16), n_rows)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v2", "llama4", "nemotron_h", "laguna"])
def test_a_hooked_pass_runs_where_no_value_can_be_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values, any look at one is an error of torch's."""
    equal = torch.equal
    # TransformerLens compares a tensor with itself, for which no kernel reads a value
    monkeypatch.setattr(torch, "equal", lambda a, b: a is b or equal(a, b))
    hf = tiny.build_hf(name, dtype=torch.bfloat16)
    hf.config._experts_implementation = "grouped_mm"
    moe = attach(tiny.build_bridge(hf.to("meta"), name))
    seen: list[torch.Size] = []
    hooks = [
        (moe.hook_name(hook, layer), lambda value, hook: seen.append(value.shape))
        for layer in moe.layers
        for hook in moe.hooks(layer)
    ]
    with torch.no_grad():
        moe.bridge.run_with_hooks(TOKENS.to("meta"), fwd_hooks=hooks)
    assert len(seen) == len(hooks)


@pytest.mark.parametrize("name", ["olmoe", "llama4", "jetmoe", "switch_transformers", "nemotron_h", "qwen2_moe"])
def test_each_hook_alone_waits_for_nothing(name: str) -> None:
    moe = opened(name).moe
    natural = waits(moe, name, nothing, torch.no_grad)
    for hook in (*OF_ROUTER, *AFTER):
        assert waits(moe, name, nothing, torch.no_grad, hook) == natural, hook


def test_reading_in_training_waits_for_nothing(family: str) -> None:
    moe = in_training(family)
    natural = waits(moe, family, nothing, torch.enable_grad)
    assert waits(moe, family, nothing, torch.enable_grad, *OF_ROUTER) == natural
    assert waits(moe, family, computing, torch.enable_grad, *OF_ROUTER, *AFTER) == natural


def test_backward_hooks_wait_for_nothing(family: str) -> None:
    moe = opened(family).moe
    natural = waits(moe, family, nothing, torch.enable_grad)
    names = [moe.hook_name(n, layer) for layer in moe.layers for n in moe.hooks(layer) if n in (*OF_ROUTER, *AFTER)]
    hooks = [(name, nothing) for name in names if not name.endswith("expert_indices")]
    with moe.bridge.hooks(bwd_hooks=hooks):
        assert waits(moe, family, nothing, torch.enable_grad, *OF_ROUTER) == natural


def test_a_hook_that_writes_is_waited_for() -> None:
    """The counter sees the comparison and the checks that an edit costs."""
    model = opened("olmoe")
    natural = waits(model.moe, "olmoe", nothing, torch.no_grad)

    def write(value: Tensor, hook: Any) -> None:
        value[:, 0] = 0

    assert len(waits(model.moe, "olmoe", write, torch.no_grad, "router_logits")) > len(natural)
