"""Hooks that only read make the host wait for the device not once more than the model itself does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.hooks.attach import MoEHooks
from tests import tiny
from tests.integration.hooks.support import TOKENS, opened
from tests.integration.hooks.test_training import in_training
from tests.waits import counted_waits

OF_ROUTER = ("router_in", "router_logits", "router_probs", "expert_indices", "expert_weights")
AFTER = ("routed_out", "shared_out")  # expert_post and expert_out are computed expert by expert
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
