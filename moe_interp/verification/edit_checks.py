"""The checks of what hooks show, and of what writing to them does, against the block computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable
from moe_interp.types import Layer
from moe_interp.verification import reference_rules as reference
from moe_interp.verification.block_by_hand import LayerByHand, layer_by_hand
from moe_interp.verification.finding import Finding, excepted, near, relative, rounding
from moe_interp.verification.model_under_test import Edit, ModelUnderTest, difference
from moe_interp.verification.rule_checks import random_sets

MATTERS = "an edit changes the logits"
_OF_EXPERTS = ("expert_post", "expert_out")


# -- what they show ----------------------------------------------------------------------------------------------------


def values_are_shown(tested: ModelUnderTest) -> Iterator[Finding]:
    """Each hook shows what the modules themselves were called with, or what the experts' weights give by hand."""
    check = "a hook shows the block's own value"
    for layer in tested.layers:
        hand = layer_by_hand(tested, layer)
        read = [(hook, layer) for hook in _OF_EXPERTS if hook in tested.moe.hooks(layer)]
        shown = {hook: value for (hook, at), value in tested.seen.items() if at == layer}
        shown |= {hook: value for (hook, _), value in tested.see(read=read)[1].items()}
        expected = _natural(hand)
        for hook in tested.moe.hooks(layer):
            value, own = shown[hook], expected[hook]()
            if value.shape[:2] != tested.tokens.shape:
                yield Finding(check=check, layer=layer, hook=hook, figure=float("inf"), note="not [batch, pos, ...]")
            elif hook == "expert_indices":
                yield Finding(check=check, layer=layer, hook=hook, figure=difference(value.reshape(own.shape), own))
            else:
                yield near(check, layer, hook, value.flatten(0, 1).flatten(1), own.flatten(1), tested)


def _natural(hand: LayerByHand) -> dict[str, Callable[[], Tensor]]:
    """By hook, its value with nothing edited, flat."""

    def neurons() -> Tensor:
        return hand.neurons(hand.indices, hand.weights)

    def outputs() -> Tensor:
        return hand.outputs(neurons(), hand.indices)

    def shared() -> Tensor:
        assert hand.shared is not None
        return hand.shared

    return {
        "router_in": lambda: hand.router_in,
        "router_logits": lambda: hand.logits,
        "router_probs": lambda: _scores(hand),
        "expert_indices": lambda: hand.indices,
        "expert_weights": lambda: hand.weights,
        "expert_post": neurons,
        "expert_out": outputs,
        "routed_out": lambda: hand.routed_of(hand.indices, hand.weights),
        "shared_out": shared,
    }


def _scores(hand: LayerByHand) -> Tensor:
    found = reference.scores(hand.rule, hand.logits)
    assert found is not None
    return found


# -- what writing to them does -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpectedEdit:
    """An edit of a hook, and what the block then returns by hand."""

    hook: str
    edit: Edit
    block: Callable[[], Tensor]
    note: str = ""


def edits_do_what_they_say(tested: ModelUnderTest) -> Iterator[Finding]:
    """An edit of every token's value at once: the block returns what it returns by hand, and the logits change.

    Every token and slot is written another value, so that an edit at a wrong token, slot or sequence shows.
    """
    for layer in tested.layers:
        hand = layer_by_hand(tested, layer)
        unedited = hand.route(hand.indices, hand.weights)
        for written in _edits_of_hooks(tested, layer, hand):
            yield from _compared(tested, layer, written, unedited)
        yield from _through_the_block_alone(tested, layer, hand)
        if hand.spec.family.shared_on_layer is not None and "shared_out" in tested.moe.hooks(layer):
            yield from _shared_on_layer(tested, layer)


def _compared(tested: ModelUnderTest, layer: Layer, written: ExpectedEdit, unedited: Tensor) -> Iterator[Finding]:
    """Block and logits under one edit."""
    logits, block = tested.run_and_observe(layer, {(written.hook, layer): written.edit})
    expected = written.block()
    yield near("writing does what the table says", layer, written.hook, block, expected, tested, written.note)
    if written.note:
        return
    if relative(expected, unedited) <= 2 * rounding(tested, layer):
        yield excepted(MATTERS, layer, written.hook, "by hand, too, this edit changes nothing here")
    else:
        yield _moved(tested, layer, written.hook, logits)


def _through_the_block_alone(tested: ModelUnderTest, layer: Layer, hand: LayerByHand) -> Iterator[Finding]:
    """All hooks of a layer edited: the same logits as where the block is made to return the same output."""
    edits = {
        (hook, layer): _edit_of(hook, hand) for hook in tested.moe.hooks(layer) if not _is_shared_on_layer(hand, hook)
    }
    logits, block = tested.run_and_observe(layer, edits)
    figure = difference(logits, tested.run_with(tested.observed(layer), block))
    check = "edits reach the model through their block alone"
    yield Finding(check=check, layer=layer, hook="all", figure=figure, bound=tested.noise)


def _shared_on_layer(tested: ModelUnderTest, layer: Layer) -> Iterator[Finding]:
    """Shared experts beside the block: their edited output against a module that returns it."""
    hook, module = "shared_out", tested.specs[layer].shared
    assert module is not None
    logits = tested.run({(hook, layer): _mirrored})
    expected = tested.run_with(module, _mirrored(tested.shared_calls[layer].output))
    yield near("writing does what the table says", layer, hook, logits, expected, tested)
    yield _moved(tested, layer, hook, logits)


def _moved(tested: ModelUnderTest, layer: Layer, hook: str, logits: Tensor) -> Finding:
    unit = float(torch.finfo(tested.natural.dtype).eps * tested.natural.abs().max())
    bound, moved = max(10 * tested.noise, unit), difference(logits, tested.natural)
    return Finding(check=MATTERS, layer=layer, hook=hook, figure=moved, relation=">", bound=bound)


def edits_in_place_count(tested: ModelUnderTest) -> Iterator[Finding]:
    """A hook that edits in place and returns None does what the same edit does that is returned."""
    hooks = list(dict.fromkeys(hook for layer in tested.layers for hook in tested.moe.hooks(layer)))
    for hook in hooks:
        layers = [layer for layer in tested.layers if hook in tested.moe.hooks(layer)]
        edit = _swapped_experts(tested.specs[layers[0]].n_experts) if hook == "expert_indices" else _scaled
        returned = tested.run({(hook, layer): edit for layer in layers})
        in_place = tested.run({(hook, layer): _in_place(edit) for layer in layers})
        figure = difference(in_place, returned)
        yield Finding(check="an edit in place counts", layer=layers[0], hook=hook, figure=figure, bound=tested.noise)


# -- the edits ---------------------------------------------------------------------------------------------------------


def _edits_of_hooks(tested: ModelUnderTest, layer: Layer, hand: LayerByHand) -> Iterator[ExpectedEdit]:
    """One edit of each hook, and two of the experts: more of them a token, and some slots empty."""
    hooks, n = tested.moe.hooks(layer), len(hand.x)
    # each expert runs for some token, and more experts a token than the router takes
    slots = min(hand.rule.n_experts, max(hand.rule.top_k + 1, -(-hand.rule.n_experts // n)))
    device = hand.x.device
    for hook in hooks:
        if hook == "expert_indices":
            for indices, note in (
                (_covering(hand.rule.n_experts, n, slots), ""),
                (random_sets(hand.rule, n, seed=1, empty=True), "some slots empty"),
            ):
                ids = indices.to(device)
                yield ExpectedEdit(hook, _constant(ids.view(*tested.tokens.shape, -1)), _route_of(hand, ids), note)
        elif not _is_shared_on_layer(hand, hook):
            yield ExpectedEdit(hook, _edit_of(hook, hand), _EXPECTED[hook](tested, layer, hand))


def _edit_of(hook: str, hand: LayerByHand) -> Edit:
    if hook == "expert_indices":
        return _swapped_experts(hand.rule.n_experts)
    if hook in ("router_in", "router_logits", "router_probs"):
        return _of_other_tokens
    return _scaled if hook == "expert_weights" else _mirrored


def _of_other_tokens(value: Tensor) -> Tensor:
    """Each token's value from the token before it, turned along the last axis; real values, but others."""
    flat = value.flip(-1).flatten(0, 1)
    return flat.roll(1, dims=0).view(value.shape)


def _scaled(value: Tensor) -> Tensor:
    """Each token's value by a factor of its own, and each slot's; from a half to one and a half."""
    steps = torch.arange(value[..., 0].numel(), device=value.device).view(value.shape[:-1]).unsqueeze(-1)
    column = torch.arange(value.shape[-1], device=value.device)
    return value * (0.5 + ((steps * 7 + column * 3) % 11) / 10).to(value.dtype)


def _mirrored(value: Tensor) -> Tensor:
    return _scaled(value.flip(-1))


def _swapped_experts(n_experts: int) -> Edit:
    return lambda ids: torch.where(ids < 0, ids, n_experts - 1 - ids)


def _constant(new: Tensor) -> Edit:
    return lambda value: new.to(value.dtype)


def _in_place(edit: Edit) -> Edit:
    def write(value: Tensor) -> None:
        value.copy_(_required(edit(value)))

    return write


def _required(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _covering(n_experts: int, n: int, slots: int) -> Tensor:
    """``[n, slots]`` distinct experts: all of them in turn, from token to token."""
    order = torch.randperm(n_experts, generator=torch.Generator().manual_seed(0))
    place = torch.arange(n).unsqueeze(1) * slots + torch.arange(slots)
    return order[place % n_experts]


def _is_shared_on_layer(hand: LayerByHand, hook: str) -> bool:
    return hook == "shared_out" and hand.spec.family.shared_on_layer is not None


# -- what the block then returns, by hand ------------------------------------------------------------------------------


def _route_of(hand: LayerByHand, indices: Tensor) -> Callable[[], Tensor]:
    """Given experts with the family's weights."""
    return lambda: hand.route(indices, reference.weights(hand.rule, hand.logits, indices))


def _of_router_in(tested: ModelUnderTest, layer: Layer, hand: LayerByHand) -> Callable[[], Tensor]:
    """The router's own reply to the edited input; the experts read the unedited one."""

    def block() -> Tensor:
        call = tested.router_calls[layer]
        shown = tested.seen["router_in", layer]
        hidden = _of_other_tokens(shown).reshape(call.args[0].shape)
        reply = hand.reply(hidden, call.args[1:], call.kwargs)
        _, indices, weights = (part.reshape(len(hand.x), -1) for part in hand.replied(hidden, reply))
        return hand.route(indices, weights)

    return block


def _of_router_logits(tested: ModelUnderTest, layer: Layer, hand: LayerByHand) -> Callable[[], Tensor]:
    def block() -> Tensor:
        logits = _of_other_tokens(tested.seen["router_logits", layer])
        indices = hand.rule.route(logits, tested.tokens)[0]
        weights = reference.weights(hand.rule, logits, indices)
        return hand.route(indices.flatten(0, 1), weights.flatten(0, 1))

    return block


def _of_router_probs(tested: ModelUnderTest, layer: Layer, hand: LayerByHand) -> Callable[[], Tensor]:
    def block() -> Tensor:
        logits, probs = tested.seen["router_logits", layer], _of_other_tokens(tested.seen["router_probs", layer])
        if isinstance(hand.rule, HashTable):
            indices = hand.indices.view(*tested.tokens.shape, -1)
        else:
            indices = hand.rule.route_scores(probs)[0]
        weights = reference.weights(hand.rule, logits, indices, given=probs)
        return hand.route(indices.flatten(0, 1), weights.flatten(0, 1))

    return block


def _of_weights(tested: ModelUnderTest, layer: Layer, hand: LayerByHand) -> Callable[[], Tensor]:
    shape = tested.tokens.shape
    return lambda: hand.route(hand.indices, _scaled(hand.weights.view(*shape, -1)).flatten(0, 1))


def _of_outputs(tested: ModelUnderTest, layer: Layer, hand: LayerByHand, *, at_neurons: bool) -> Callable[[], Tensor]:
    def mirrored(value: Tensor) -> Tensor:
        return _mirrored(value.view(*tested.tokens.shape, *value.shape[1:])).flatten(0, 1)

    def block() -> Tensor:
        neurons = hand.neurons(hand.indices, hand.weights)
        neurons = mirrored(neurons) if at_neurons else neurons
        outputs = hand.outputs(neurons, hand.indices)
        outputs = outputs if at_neurons else mirrored(outputs)
        return hand.block(hand.routed(outputs, hand.weights), hand.shared)

    return block


def _of_parts(tested: ModelUnderTest, layer: Layer, hand: LayerByHand, *, at_shared: bool) -> Callable[[], Tensor]:
    def mirrored(value: Tensor) -> Tensor:
        return _mirrored(value.view(*tested.tokens.shape, -1)).flatten(0, 1)

    def block() -> Tensor:
        routed = hand.routed_of(hand.indices, hand.weights)
        if at_shared:
            assert hand.shared is not None
            return hand.block(routed, mirrored(hand.shared))
        return hand.block(mirrored(routed), hand.shared)

    return block


_EXPECTED: dict[str, Callable[[ModelUnderTest, Layer, LayerByHand], Callable[[], Tensor]]] = {
    "router_in": _of_router_in,
    "router_logits": _of_router_logits,
    "router_probs": _of_router_probs,
    "expert_weights": _of_weights,
    "expert_post": partial(_of_outputs, at_neurons=True),
    "expert_out": partial(_of_outputs, at_neurons=False),
    "routed_out": partial(_of_parts, at_shared=False),
    "shared_out": partial(_of_parts, at_shared=True),
}
