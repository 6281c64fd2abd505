"""Hooks fire in the stated order, each sees what earlier edits make of it, and the last edit wins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_interp.hooks.names import HOOK_NAMES
from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import TOKENS, Opened, Seen, assert_moved, assert_near, is_hash_routed, opened
from tests.integration.hooks.test_router_edits import wanted_logits
from tests.integration.hooks.test_routes import at_slots, shuffled


def noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def hand_weights(model: Opened, label: tiny.Label, logits: Tensor, indices: Tensor) -> Tensor:
    """The family's weights ``[batch, pos, slot]`` for these experts, from these logits, by hand."""
    chosen = by_hand.chosen_matrix(indices.flatten(0, 1))
    return at_slots(by_hand.weights(model.name, model.native[label], logits.flatten(0, 1), chosen), indices)


def weighted_sum(model: Opened, seen: Seen, label: tiny.Label) -> Tensor:
    outputs = seen["expert_out", label]
    if model.name.startswith("llama4"):  # its outputs are weighted already
        return outputs.sum(-2)
    return (outputs * seen["expert_weights", label].unsqueeze(-1)).sum(-2)


def hand_outputs(model: Opened, label: tiny.Label, neurons: Tensor, indices: Tensor) -> Tensor:
    """Outputs ``[batch, pos, slot, d_model]`` from (edited) neurons, through the second linear map alone."""
    block, name = model.native[label].block, model.name
    out = torch.zeros(*indices.shape, 32)
    for place in (indices >= 0).nonzero().tolist():
        e, h = int(indices[tuple(place)]), neurons[tuple(place)]
        if name == "jetmoe":
            y = block.output_linear.weight[e] @ h
        elif name == "switch_transformers":
            y = block.experts[f"expert_{e}"].wo.weight @ h
        elif name == "gpt_oss":
            y = h @ block.experts.down_proj[e] + block.experts.down_proj_bias[e]
        elif name.startswith("llama4"):
            y = h @ block.experts.down_proj[e]
        else:
            y = block.experts.down_proj[e] @ h
        out[tuple(place)] = block.fc2_latent_proj.weight @ y if name == "nemotron_h" else y
    return out.detach()


def test_hooks_fire_in_the_order_of_the_table(family: str) -> None:
    model = opened(family)
    _, seen = model.see()
    for label in model.labels:
        fired = [hook for hook, at in seen if at == label]
        assert fired == [hook for hook in HOOK_NAMES if hook in model.moe.hooks(label)]
    places = [model.labels.index(label) for _, label in seen]
    assert places == sorted(places)


def test_each_hook_sees_what_earlier_edits_make_of_it(family: str) -> None:
    """One pass that edits at every hook point in turn, each recomputed by hand from the edit before it."""
    model, label = opened(family), opened(family).last
    _, natural = model.see(labels=[label])
    given: Seen = {}

    def at(hook: str, new: Tensor) -> None:
        """Edit by adding, so that the edit builds on what the hook was given."""
        edits.append((hook, label, lambda x: given.__setitem__((hook, label), x.clone()) or x + new))

    edits: list = []
    slots = natural["expert_indices", label].shape[-1]
    at("router_in", noise(natural["router_in", label], 1))
    at("router_logits", noise(natural["router_logits", label], 2))
    # the next expert of a ring, in the place of each: other experts, still distinct
    edits.append(
        ("expert_indices", label, lambda x: given.__setitem__(("expert_indices", label), x.clone()) or (x + 1) % 8)
    )
    at("expert_weights", noise(natural["expert_weights", label], 4))
    at("expert_post", noise(natural["expert_post", label], 5))
    at("expert_out", noise(natural["expert_out", label], 6))
    at("routed_out", noise(natural["routed_out", label], 7))
    _, seen = model.see(edits, labels=[label])

    layer = model.native[label]
    linear_in = tiny.linear_input(layer, seen["router_in", label].flatten(0, 1))
    assert_near(given["router_logits", label].flatten(0, 1), tiny.raw_logits(layer, linear_in), where="logits")
    if ("router_probs", label) in seen:
        scores = by_hand.scores(family, seen["router_logits", label])
        assert_near(seen["router_probs", label], scores, where="scores")
    if not is_hash_routed(model, label):
        ruled = model.moe.spec(label).rule.route(seen["router_logits", label])[0]
        assert torch.equal(given["expert_indices", label], ruled)
        assert not torch.equal(ruled, natural["expert_indices", label])
    indices = seen["expert_indices", label]
    weights = hand_weights(model, label, seen["router_logits", label], indices)
    assert_near(given["expert_weights", label], weights, where="weights")
    assert indices.shape[-1] == slots
    scaled = by_hand.weight_matrix(indices, seen["expert_weights", label]).flatten(0, 1)
    expected = by_hand.run(model.hf, family, TOKENS, label, lambda z: scaled)
    assert_near(given["expert_post", label], at_slots(expected.neurons, indices), 1e-5, where="neurons")
    outputs = hand_outputs(model, label, seen["expert_post", label], indices)
    assert_near(given["expert_out", label], outputs, 2e-5, where="outputs")  # of neurons several times their size
    assert_near(given["routed_out", label], weighted_sum(model, seen, label), 2e-5, where="sum")


def test_logits_indices_and_weights_at_once(family: str) -> None:
    """Later hooks see earlier edits; indices win over logits, weights over both."""
    model, label = opened(family), opened(family).last
    _, natural = model.see(labels=[label])
    logits = wanted_logits(natural["router_logits", label], seed=1)
    indices = shuffled(3, seed=2)
    weights = noise(indices.float(), 3)
    edit_logits = ("router_logits", label, lambda _: logits)
    edit_indices = ("expert_indices", label, lambda _: indices)
    edit_weights = ("expert_weights", label, lambda _: weights)

    out, seen = model.see([edit_logits, edit_indices, edit_weights], labels=[label])
    matrix = by_hand.weight_matrix(indices, weights).flatten(0, 1)
    expected = by_hand.run(model.hf, family, TOKENS, label, lambda z: matrix)
    assert_near(out, expected.logits)
    assert torch.equal(seen["router_logits", label], logits)

    out, seen = model.see([edit_logits, edit_indices], labels=[label])
    edited = hand_weights(model, label, logits, indices)  # the edited logits weigh the written route
    assert_near(seen["expert_weights", label], edited)
    matrix_of_edited = by_hand.weight_matrix(indices, edited).flatten(0, 1)
    assert_near(out, by_hand.run(model.hf, family, TOKENS, label, lambda z: matrix_of_edited).logits)
    if family not in ("phimoe",):
        assert_moved(
            seen["expert_weights", label], hand_weights(model, label, natural["router_logits", label], indices)
        )

    _, re_routed = model.see([edit_logits], labels=[label])
    fixed = noise(natural["expert_weights", label], 4)
    out, seen = model.see([edit_logits, ("expert_weights", label, lambda _: fixed)], labels=[label])
    assert torch.equal(seen["expert_indices", label], re_routed["expert_indices", label])
    assert torch.equal(seen["expert_weights", label], fixed)


def test_scores_win_over_logits_and_weigh_written_routes(family: str) -> None:
    model, label = opened(family), opened(family).last
    if "router_probs" not in model.moe.hooks(label):
        with pytest.raises(Exception, match="full-width scores"):
            model.moe.hook_name("router_probs", label)
        return
    _, natural = model.see(labels=[label])
    first, second = (wanted_logits(natural["router_logits", label], seed) for seed in (1, 2))
    second = second.roll(3, -1)
    scores, indices = by_hand.scores(family, second), shuffled(3, seed=3)
    edits = [("router_logits", label, lambda _: first), ("router_probs", label, lambda _: scores)]
    assert_near(model.run(edits), model.run([("router_logits", label, lambda _: second)]))
    _, seen = model.see([*edits, ("expert_indices", label, lambda _: indices)], labels=[label])
    assert_near(seen["expert_weights", label], hand_weights(model, label, second, indices))


def test_a_later_hook_at_the_same_point_sees_the_earlier_one(family: str) -> None:
    model, label = opened(family), opened(family).last
    twice = model.run([("router_logits", label, lambda z: z + 1), ("router_logits", label, lambda z: z.flip(-1))])
    once = model.run([("router_logits", label, lambda z: (z + 1).flip(-1))])
    assert torch.equal(twice, once)
