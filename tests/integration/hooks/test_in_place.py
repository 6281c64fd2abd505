"""Edits in place count as much as returned ones, and reach nothing but the activation they are given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.integration.hooks.support import TOLERANCE, Opened, assert_moved, assert_near, opened

Edit = Callable[[Tensor], Tensor]


def edit_of(hook: str) -> Edit:
    """Other experts, or other numbers."""
    if hook == "expert_indices":
        return lambda x: (x + 3) % 8
    return lambda x: x.detach() + torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


def in_place(edit: Edit) -> Callable[[Tensor], None]:
    """The same edit, written into the activation; returns None."""

    def write(x: Tensor) -> None:
        with torch.no_grad():
            x.copy_(edit(x))

    return write


def test_an_edit_in_place_that_returns_none_counts(family: str) -> None:
    """For every hook, alone and, where edits are told by value, with all others hooked."""
    model, label = opened(family), opened(family).last
    unhooked = model.run()
    idle = [(hook, label, lambda x: None) for hook in model.moe.hooks(label)]
    for hook in model.moe.hooks(label):
        edit = edit_of(hook)
        expected = model.run([(hook, label, edit)])
        assert_moved(expected, unhooked, where=hook)
        assert torch.equal(model.run([(hook, label, in_place(edit))]), expected), hook
        if hook in ("router_logits", "expert_indices", "expert_weights", "shared_out"):
            assert_near(model.run([*idle, (hook, label, in_place(edit))]), expected, 2 * TOLERANCE, hook)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "nemotron_h", "llama4", "jetmoe", "switch_transformers"])
def test_an_edit_in_place_counts_where_gradients_flow(name: str) -> None:
    model, label = opened(name), opened(name).last
    for hook in model.moe.hooks(label):
        edit = edit_of(hook)
        expected = model.run([(hook, label, edit)], grad=True)
        assert torch.equal(model.run([(hook, label, in_place(edit))], grad=True), expected), hook


def test_garbage_written_by_a_hook_stays_in_its_pass(family: str) -> None:
    """No buffer, parameter, cached hidden state or constant of the model is aliased by what a hook is given."""
    model = opened(family)
    unhooked, state = model.run(), {n: t.clone() for n, t in _tensors(model)}

    def spoil(x: Tensor) -> None:
        x.fill_(7.5)

    for hook in model.moe.hooks(model.last):
        if hook != "expert_indices":
            model.run([(hook, label, spoil) for label in model.labels])
    assert torch.equal(model.run(), unhooked)
    assert all(torch.equal(tensor, state[name]) for name, tensor in _tensors(model))


def _tensors(model: Opened) -> list[tuple[str, Tensor]]:
    original = model.bridge.original_model
    return [*original.named_parameters(), *original.named_buffers()]


def test_what_a_hook_was_given_is_not_changed_afterwards(family: str) -> None:
    """A cached activation is what it was when its hook fired, though blocks add to their tensors in place."""
    model = opened(family)
    kept: list[tuple[str, Tensor, Tensor]] = []

    def keep(hook: str) -> Callable[[Tensor], None]:
        return lambda x: kept.append((hook, x, x.clone()))

    model.run([(hook, label, keep(hook)) for label in model.labels for hook in model.moe.hooks(label)])
    assert len(kept) == len(model.moe.hook_names())
    for hook, given, at_the_time in kept:
        assert torch.equal(given, at_the_time), hook


def test_a_returned_tensor_is_not_changed_by_the_model(family: str) -> None:
    """A hook may return the same constant again and again."""
    model, label = opened(family), opened(family).last
    _, seen = model.see(labels=[label])
    for hook in model.moe.hooks(label):
        constant = edit_of(hook)(seen[hook, label])
        before = constant.clone()
        first = model.run([(hook, label, lambda _, constant=constant: constant)])
        second = model.run([(hook, label, lambda _, constant=constant: constant)])
        assert torch.equal(constant, before), hook
        assert torch.equal(first, second), hook


def test_an_exception_in_a_hook_leaves_nothing_behind(family: str) -> None:
    model = opened(family)
    unhooked = model.run()

    def fail(x: Tensor) -> None:
        raise ZeroDivisionError

    for hook in model.moe.hooks(model.last):
        with pytest.raises(ZeroDivisionError):
            model.run([(hook, model.last, fail)])
        assert torch.equal(model.run(), unhooked), hook
