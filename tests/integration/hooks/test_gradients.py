"""Gradients at the hook points against central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.integration.hooks.support import Opened, opened

FAMILIES = ["olmoe", "gpt_oss", "deepseek_v3", "llama4", "jetmoe", "phimoe"]
TOKENS = tiny.random_tokens(1, 4)
STEP = 1e-5


def readout(logits: Tensor) -> Tensor:
    """A fixed direction of the logits: a scalar that every token has a part in."""
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (logits * direction).sum()


def gradient(model: Opened, hook: str, label: tiny.Label) -> Tensor:
    """At an addend of the hooked activation, as a learned edit has it."""
    addends: list[Tensor] = []

    def add(x: Tensor) -> Tensor:
        addends.append(torch.zeros_like(x, requires_grad=True))
        return x + addends[0]

    with model.precision():
        readout(model.run([(hook, label, add)], TOKENS, grad=True)).backward()
    model.bridge.zero_grad()
    assert addends[0].grad is not None
    return addends[0].grad


def difference(model: Opened, hook: str, label: tiny.Label, direction: Tensor) -> float:
    """The central difference of the readout along a direction of the hooked activation."""

    def shifted(step: float) -> Tensor:
        with model.precision():
            return readout(model.run([(hook, label, lambda x: x + step * direction)], TOKENS))

    return float(shifted(STEP) - shifted(-STEP)) / (2 * STEP)


def directions(like: Tensor) -> list[Tensor]:
    """A random one, and one number alone."""
    single = torch.zeros_like(like)
    single[0, 2, ..., 1 % like.shape[-1]] = 1.0
    return [torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), single]


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_agree_with_central_differences(name: str) -> None:
    model = opened(name, torch.float64)
    label = model.labels[-2]
    for hook in model.moe.hooks(label):
        if hook == "expert_indices":
            continue
        grad = gradient(model, hook, label)
        for direction in directions(grad):
            expected = difference(model, hook, label, direction)
            found = float((grad * direction).sum())
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), (hook, found, expected)
        flat = name == "phimoe" and hook in ("router_in", "router_logits")  # far-apart experts: the weights stay 1
        assert flat or grad.abs().max() > 1e-3, hook


def test_gradients_at_phimoe_s_logits_where_experts_are_near() -> None:
    model = opened("phimoe", torch.float64)
    label = model.last
    _, seen = model.see(labels=[label], tokens=TOKENS)
    near = 10 + 0.1 * seen["router_logits", label]
    addend = torch.zeros_like(near, requires_grad=True)
    with model.precision():
        readout(model.run([("router_logits", label, lambda _: near + addend)], TOKENS, grad=True)).backward()
    model.bridge.zero_grad()
    assert addend.grad is not None
    direction = directions(near)[0]

    def shifted(step: float) -> Tensor:
        with model.precision():
            return readout(model.run([("router_logits", label, lambda _: near + step * direction)], TOKENS))

    expected = float(shifted(STEP) - shifted(-STEP)) / (2 * STEP)
    assert abs(expected) > 1e-3
    assert float((addend.grad * direction).sum()) == pytest.approx(expected, rel=1e-6)


def test_backward_hooks_need_no_forward_hook(family: str) -> None:
    """They see the gradient, also at the experts' hooks: each of these alone, and all together."""
    model, label = opened(family), opened(family).last
    names = [hook for hook in model.moe.hooks(label) if hook != "expert_indices"]
    for chosen in (["router_logits"], ["expert_out"], names):
        gradients = backward(model, label, chosen)
        assert set(gradients) == set(chosen)
        for name, grad in gradients.items():
            flat = family == "phimoe" and name in ("router_in", "router_logits")
            assert flat or grad.abs().max() > 0, name


def backward(model: Opened, label: tiny.Label, names: list[str]) -> dict[str, Tensor]:
    gradients: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda grad, hook: gradients.__setitem__(name, grad.detach().clone())

    hooks = [(model.moe.hook_name(name, label), keep(name)) for name in names]
    inputs = tiny.model_inputs(model.name, TOKENS)
    with model.bridge.hooks(bwd_hooks=hooks):
        readout(model.bridge(TOKENS, **inputs).double()).backward()
    model.bridge.zero_grad()
    return gradients


def test_gradients_of_the_parameters_are_those_of_the_unhooked_model(family: str) -> None:
    model = opened(family)
    hooks = [(hook, label, lambda x: x * 1) for label in model.labels for hook in model.moe.hooks(label)]
    hooks = [(hook, label, edit) for hook, label, edit in hooks if hook != "expert_indices"]
    found = []
    for edits in ([], hooks):
        readout(model.run(edits, TOKENS, grad=True).double()).backward()
        original = model.bridge.original_model
        found.append({n: p.grad.clone() for n, p in original.named_parameters() if p.grad is not None})
        model.bridge.zero_grad()
    unhooked, hooked = found
    assert set(hooked) == set(unhooked)
    for name, grad in unhooked.items():
        scale = max(1.0, float(grad.abs().max()))
        assert (hooked[name] - grad).abs().max() <= 1e-4 * scale, name
