"""In training, too, a hook that only reads changes nothing: dropout, jitter and random routes are on here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_interp.hooks.attach import MoEHooks, attach
from tests import tiny

TOKENS = tiny.random_tokens(2, 7, seed=5)
ROUNDING = 2e-5  # of experts computed one by one, and of gradients that are summed in another order
OF_EXPERTS = ("expert_post", "expert_out", "routed_out", "shared_out")
Hooks = list[tuple[str, Callable[..., Any]]]


@cache
def in_training(family: str) -> MoEHooks:
    """A tiny model in training, with all the noise that its family has."""
    moe = attach(tiny.build_bridge(tiny.build_hf(family), family))
    for module in [*moe.bridge.modules(), *moe.bridge.original_model.modules()]:
        for name in ("jitter_noise", "input_jitter_noise"):
            if hasattr(module, name):
                setattr(module, name, 0.1)
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.1
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    moe.bridge.train()
    moe.bridge.original_model.train()
    return moe


def step(
    moe: MoEHooks, family: str, hooks: Hooks, context: AbstractContextManager[Any] | None = None
) -> dict[str, Tensor]:
    """Logits, random state, gradients of all parameters and all buffers after one forward and backward pass."""
    torch.manual_seed(0)
    model = moe.bridge.original_model
    model.zero_grad(set_to_none=True)
    with moe.bridge.hooks(fwd_hooks=hooks):
        with context or nullcontext():
            logits = moe.bridge(TOKENS, **tiny.model_inputs(family, TOKENS))
        found = {"logits": logits.detach().float(), "random": torch.get_rng_state().float()}
        if logits.requires_grad:
            direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
            (logits.float() * direction).sum().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    buffers = {f"buffer {n}": b.clone().float() for n, b in model.named_buffers() if not b.is_complex()}
    return found | gradients | buffers


def reading(moe: MoEHooks, *names: str) -> Hooks:
    return [
        (moe.hook_name(name, layer), lambda value, hook: None)
        for layer in moe.layers
        for name in names or moe.hooks(layer)
        if name in moe.hooks(layer)
    ]


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], where: str, logits: float = 0.0, gradients: float = ROUNDING
) -> None:
    """Logits and gradients within tolerances relative to their largest entry; everything else bit for bit."""
    assert found.keys() == expected.keys(), where
    for name, value in expected.items():
        tolerance = logits if name == "logits" else gradients if name.startswith("gradient") else 0.0
        scale = max(1.0, float(value.abs().max()))
        assert float((found[name] - value).abs().max()) <= tolerance * scale, f"{where}: {name}"


def test_hooks_leave_logits_gradients_random_numbers_and_buffers(family: str) -> None:
    moe = in_training(family)
    natural = step(moe, family, [])
    assert_same(step(moe, family, []), natural, "nothing hooked", gradients=0.0)
    of_router = [name for name in moe.hooks(moe.layers[-1]) if name not in OF_EXPERTS]
    assert_same(step(moe, family, reading(moe, *of_router)), natural, "hooks of the router")
    assert_same(step(moe, family, reading(moe)), natural, "all hooks", ROUNDING)


# each way to take a hook's gradient, and each kind of noise
@pytest.mark.parametrize(
    "name", ["phimoe", "switch_transformers", "deepseek_v3", "gpt_oss", "llama4", "nemotron_h", "jetmoe", "gemma4_text"]
)
def test_each_hook_alone(name: str) -> None:
    moe = in_training(name)
    natural = step(moe, name, [])
    for hook in moe.hooks(moe.layers[-1]):
        assert_same(step(moe, name, reading(moe, hook)), natural, hook, ROUNDING if hook in OF_EXPERTS else 0.0)


@pytest.mark.parametrize("name", ["phimoe", "switch_transformers", "mixtral", "minimax_m2"])
def test_the_noise_of_these_routers_is_on(name: str) -> None:
    moe = in_training(name)
    torch.manual_seed(1)
    first, second = (moe.bridge(TOKENS, **tiny.model_inputs(name, TOKENS)) for _ in range(2))
    assert float((first - second).detach().abs().max()) > 0.01


@pytest.mark.parametrize("name", ["phimoe", "switch_transformers"])
def test_the_jitter_is_not_written_into_the_tensor_that_a_hook_returned(name: str) -> None:
    moe = in_training(name)
    layer = moe.layers[-1]
    shape = (*TOKENS.shape, moe.spec(layer).d_model)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    kept = given.clone()
    experts_read: dict[str, Tensor] = {}

    def read(key: str) -> Callable[..., None]:
        return lambda module, args: experts_read.__setitem__(key, args[0].detach().clone())

    for key, hooks in (("natural", []), ("edited", [(moe.hook_name("router_in", layer), lambda value, hook: given)])):
        handle = moe.spec(layer).experts.register_forward_pre_hook(read(key))
        step(moe, name, hooks)
        handle.remove()
    assert torch.equal(given, kept)
    # the experts read the block's tensor with the same jitter, whatever the router read
    assert torch.equal(experts_read["edited"], experts_read["natural"])


@pytest.mark.parametrize("name", ["phimoe", "olmoe", "deepseek_v3", "gpt_oss", "llama4", "nemotron_h", "laguna"])
def test_under_autocast(name: str) -> None:
    """Router hooks keep every bit; the experts one by one round otherwise in bfloat16, which phimoe's draws follow."""
    moe = in_training(name)

    def context() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    natural = step(moe, name, [], context())
    for hook in moe.hooks(moe.layers[-1]):
        bounds = (0.05, 0.2) if hook in OF_EXPERTS else (0.0, 0.02)
        if hook not in OF_EXPERTS or name != "phimoe":
            assert_same(step(moe, name, reading(moe, hook), context()), natural, hook, *bounds)


@pytest.mark.parametrize("name", ["phimoe", "switch_transformers", "deepseek_v3"])
def test_in_inference_mode(name: str) -> None:
    moe = in_training(name)
    natural = step(moe, name, [], torch.inference_mode())
    for hook in moe.hooks(moe.layers[-1]):
        assert_same(step(moe, name, reading(moe, hook), torch.inference_mode()), natural, hook, ROUNDING)
    layer = moe.layers[-1]
    edit = [(moe.hook_name("router_in", layer), lambda value, hook: value.flip(-1))]
    edited = step(moe, name, edit, torch.inference_mode())
    assert_same(edited, step(moe, name, edit, torch.no_grad()), "edited")
    assert float((edited["logits"] - natural["logits"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["phimoe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_with_gradient_checkpointing(name: str) -> None:
    moe = in_training(name)
    model: Any = moe.bridge.original_model
    plain = step(moe, name, [])
    # renamed in newer versions of transformers
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    enable()
    try:
        natural = step(moe, name, [])
        assert_same(natural, plain, "checkpointing alone")
        for hook in moe.hooks(moe.layers[-1]):
            assert_same(step(moe, name, reading(moe, hook)), natural, hook, ROUNDING)
    finally:
        disable()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "phimoe", "gpt_oss"])
def test_the_auxiliary_loss_is_computed_from_the_same_logits(name: str) -> None:
    moe = in_training(name)
    model: Any = moe.bridge.original_model

    def losses(hooks: Hooks) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        with moe.bridge.hooks(fwd_hooks=hooks):
            out = model(TOKENS, labels=TOKENS, output_router_logits=True)
        out.loss.backward()
        router = moe.spec(moe.layers[0]).router
        return out.loss.detach(), out.aux_loss.detach(), next(p.grad for p in router.parameters() if p.ndim == 2)

    natural, read = losses([]), losses(reading(moe, "router_in", "router_logits", "expert_indices", "expert_weights"))
    assert torch.equal(read[0], natural[0])
    assert torch.equal(read[1], natural[1])
    torch.testing.assert_close(read[2], natural[2])
