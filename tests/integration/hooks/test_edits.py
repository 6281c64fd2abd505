"""Every way to edit is noticed, at every hook, in every gradient mode; what writes nothing is no edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.integration.hooks.support import Opened, assert_moved, opened
from tests.integration.hooks.test_in_place import edit_of
from tests.integration.hooks.test_waits import CONTEXTS

NAMES = ["deepseek_v3", "gpt_oss", "llama4"]  # with shared experts and scores, without either, with a block of our own
TOKENS = tiny.random_tokens(2, 5, seed=7)
Hook = Callable[[Tensor], Tensor | None]


def _into(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    def write(x: Tensor, new: Tensor) -> None:
        view(x).copy_(view(new))

    return write


def _copy_out(x: Tensor, new: Tensor) -> None:
    torch.add(new, torch.zeros_like(new), out=x)


def _by_index(x: Tensor, new: Tensor) -> None:
    x.index_put_((torch.arange(len(x)),), new)


def _set_items(x: Tensor, new: Tensor) -> None:
    x[:, :] = new


def _by_data(x: Tensor, new: Tensor) -> None:
    x.data[:] = new


def _new_data(x: Tensor, new: Tensor) -> None:
    x.data = new.clone()


def _by_numpy(x: Tensor, new: Tensor) -> None:
    x.detach().numpy()[:] = new.numpy()


def _by_array(x: Tensor, new: Tensor) -> None:
    np.asarray(x.detach())[:] = new.numpy()


def _by_dlpack(x: Tensor, new: Tensor) -> None:
    torch.from_dlpack(x.detach()).copy_(new)


def _by_storage(x: Tensor, new: Tensor) -> None:
    x.untyped_storage().copy_(new.clone().untyped_storage())


WRITES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "copy_": _into(lambda x: x),
    "setitem": _set_items,
    "through a view": _into(lambda x: x.view(-1)),
    "through a transposed view": _into(lambda x: x.transpose(0, 1)),
    "through detach": _into(lambda x: x.detach()),
    "through a view of another dtype": _into(lambda x: x.view(torch.uint8)),
    "through one of several views": _into(lambda x: x.unbind(0)[0]),
    "index_put_": _by_index,
    "out=": _copy_out,
    ".data": _by_data,
    ".data =": _new_data,
    "numpy()": _by_numpy,
    "numpy.asarray": _by_array,
    "DLPack": _by_dlpack,
    "storage": _by_storage,
}


def run(model: Opened, mode: str, *edits: tuple[str, Hook]) -> Tensor:
    """Logits with hooks at the last layer, in a gradient mode."""

    def as_hook(edit: Hook) -> Callable[..., Tensor | None]:
        return lambda value, hook: edit(value)

    hooks: Any = [(model.moe.hook_name(name, model.last), as_hook(edit)) for name, edit in edits]
    with CONTEXTS[mode](), model.bridge.hooks(fwd_hooks=hooks):
        return model.bridge(TOKENS, **tiny.model_inputs(model.name, TOKENS)).detach()


def writing(hook: str, write: Callable[[Tensor, Tensor], None]) -> Hook:
    def edit(x: Tensor) -> None:
        with torch.no_grad():
            write(x, edit_of(hook)(x))

    return edit


def idle(x: Tensor) -> None:
    x.float().sum()


@pytest.mark.parametrize("mode", CONTEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_edit_counts(name: str, mode: str) -> None:
    """Also where a second hook at the same point only reads, or hands back what it is given."""
    model = opened(name)
    unhooked = run(model, mode)
    for hook in model.moe.hooks(model.last):
        expected = run(model, mode, (hook, edit_of(hook)))
        assert_moved(expected, unhooked, where=hook)
        for second in (idle, lambda x: x, lambda x: x.view(x.shape)):
            assert torch.equal(run(model, mode, (hook, edit_of(hook)), (hook, second)), expected), hook
        for how in ("copy_", "through a view", ".data"):
            edit = writing(hook, WRITES[how])
            assert torch.equal(run(model, mode, (hook, edit)), expected), (hook, how)
            for second in (idle, lambda x: x):
                assert torch.equal(run(model, mode, (hook, edit), (hook, second)), expected), (hook, how)


@pytest.mark.parametrize("mode", CONTEXTS)
@pytest.mark.parametrize("how", WRITES)
def test_every_way_to_write_counts(how: str, mode: str) -> None:
    model = opened("deepseek_v3")
    for hook in ("router_in", "router_logits", "router_probs", "expert_indices", "expert_weights", "shared_out"):

        def first_sequence(x: Tensor, hook: str = hook) -> Tensor:
            new = x.detach().clone()
            new[0] = edit_of(hook)(x)[0]
            return new

        expected = run(model, mode, (hook, first_sequence if "several" in how else edit_of(hook)))
        assert torch.equal(run(model, mode, (hook, writing(hook, WRITES[how]))), expected), hook


@pytest.mark.parametrize("mode", CONTEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_what_writes_nothing_changes_nothing(name: str, mode: str) -> None:
    """Bit for bit, where the experts' own hooks are not in use: a write of the same values, an equal copy, views."""
    model = opened(name)
    unhooked = run(model, mode)

    def same_values(x: Tensor) -> None:
        with torch.no_grad():
            x.copy_(x.clone())

    reads: list[Hook] = [
        idle,
        same_values,
        lambda x: x,
        lambda x: x.clone(),
        lambda x: x.view(-1).view(x.shape),
        lambda x: x.transpose(0, 1).clone().transpose(0, 1),
        lambda x: idle(x.data.sum()),
        lambda x: idle(torch.tensor(x.detach().numpy().sum())),
    ]
    for hook in ("router_in", "router_logits", "router_probs", "expert_indices", "expert_weights"):
        for number, read in enumerate(reads):
            if hook in model.moe.hooks(model.last):
                assert torch.equal(run(model, mode, (hook, read)), unhooked), (hook, number)


@pytest.mark.parametrize("mode", CONTEXTS)
def test_a_later_hook_may_take_an_edit_back(mode: str) -> None:
    model = opened("deepseek_v3")
    unhooked, kept = run(model, mode), []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x + 1

    for hook in ("router_logits", "expert_weights"):
        assert torch.equal(run(model, mode, (hook, keep), (hook, lambda x: kept[-1])), unhooked)


@pytest.mark.parametrize("mode", CONTEXTS)
def test_a_write_after_the_hook_has_returned_is_no_edit(mode: str) -> None:
    """One hook keeps what it is given, a later one writes into it."""
    model, kept = opened("deepseek_v3"), []
    unhooked = run(model, mode)

    def spoil(x: Tensor) -> None:
        with torch.no_grad():
            kept.pop().zero_()

    for hook in ("router_in", "router_logits", "router_probs"):
        assert torch.equal(run(model, mode, (hook, kept.append), ("expert_indices", spoil)), unhooked), hook


def test_one_that_reads_nan_is_no_edit() -> None:
    """NaN is not equal to itself, which must not make an edit of it."""
    model = opened("olmoe")
    nan: Any = (model.moe.hook_name("router_logits", model.moe.layers[0]), lambda value, hook: value * 1)
    embed: Any = ("hook_embed" if "hook_embed" in model.bridge.hook_dict else "embed.hook_out", _nan_first)
    found = []
    for hooks in ([embed], [embed, (nan[0], lambda value, hook: found.append(value))]):
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
            logits = model.bridge(TOKENS)
        assert logits[0].isnan().all()
        assert not logits[1].isnan().any()
    assert found[0][0].isnan().all()


def _nan_first(value: Tensor, hook: Any) -> Tensor:
    value = value.clone()
    value[0] = torch.nan
    return value
