"""Switch Transformers: a token over capacity uses no expert, and written routes bypass the capacity."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import TOKENS, Opened, assert_moved, assert_near

NAME = "switch_transformers"


@pytest.fixture(scope="module")
def tight() -> Opened:
    """One token an expert and sequence, in all three copies of the model."""
    model = Opened(NAME, torch.float32)
    for copy in (model.hf, model.plain.original_model, model.bridge.original_model):
        for module in copy.modules():
            if hasattr(module, "expert_capacity"):
                module.expert_capacity = 1
    return model


def test_capacity_is_kept_whatever_is_hooked(tight: Opened) -> None:
    expected = tight.native_logits()
    roomy = tiny.native_logits(tiny.build_hf(NAME), NAME, TOKENS)
    assert_moved(expected, roomy)
    assert torch.equal(tight.run(), tight.plain_logits())
    assert_near(tight.run(), expected)
    logits, seen = tight.see()
    assert_near(logits, expected)
    for label in tight.labels:
        indices = seen["expert_indices", label]
        over = indices < 0
        assert 0 < int(over.sum()) < over.numel()
        for hook in ("expert_weights", "expert_post", "expert_out"):
            assert (seen[hook, label][over] == 0).all()
        assert (seen["routed_out", label][over.squeeze(-1)] == 0).all()
        used = torch.nn.functional.one_hot(indices.squeeze(-1) + 1, 9)[..., 1:].sum(1)
        assert int(used.max()) == 1


def test_edited_logits_count_capacity_anew(tight: Opened) -> None:
    """All tokens to expert 3: the first of each sequence gets it, the others none."""
    label = tight.last

    def all_to_three(z: torch.Tensor) -> None:
        z[..., 3] = 50.0

    _, seen = tight.see([("router_logits", label, all_to_three)], labels=[label])
    assert seen["expert_indices", label][:, 0].tolist() == [[3], [3]]
    assert (seen["expert_indices", label][:, 1:] == -1).all()
    alone = tight.run([("router_logits", label, all_to_three)])
    layer = tiny.native_layers(tight.hf)[label]
    handle = layer.linear.register_forward_hook(lambda m, a, z: all_to_three(z))
    try:
        assert_near(alone, tight.native_logits())
    finally:
        handle.remove()


@pytest.mark.parametrize("slots", [1, 3])
def test_written_routes_bypass_the_capacity(tight: Opened, slots: int) -> None:
    label = tight.last
    indices = torch.arange(slots).expand(*TOKENS.shape, slots).clone()
    logits, seen = tight.see([("expert_indices", label, lambda _: indices)], labels=[label])
    assert torch.equal(seen["expert_indices", label], indices)
    assert (seen["expert_weights", label] > 0).all()
    chosen = by_hand.chosen_matrix(indices).flatten(0, 1)
    expected = by_hand.run(
        tight.hf, NAME, TOKENS, label, lambda z: by_hand.weights(NAME, tight.native[label], z, chosen)
    )
    assert_near(logits, expected.logits)
    assert_near(tight.run([("expert_indices", label, lambda _: indices)]), expected.logits)


def test_a_token_given_back_its_expert_gets_its_own_weight(tight: Opened) -> None:
    """Where the native route is empty, the rule weighs the written expert; the others keep every bit of theirs."""
    label = tight.last
    _, natural = tight.see(labels=[label])
    best = natural["router_logits", label].argmax(-1, keepdim=True)
    _, seen = tight.see([("expert_indices", label, lambda _: best)], labels=[label])
    probabilities = natural["router_probs", label].gather(-1, best)
    over = natural["expert_indices", label] < 0
    assert torch.equal(seen["expert_weights", label][~over], natural["expert_weights", label][~over])
    assert_near(seen["expert_weights", label], probabilities, 1e-7)
