"""Written routes and weights run exactly those experts: compared with layers computed by hand at full width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import TOKENS, TOLERANCE, Opened, Seen, assert_moved, assert_near, opened

BATCH, POS = TOKENS.shape


def shuffled(slots: int, seed: int = 0) -> Tensor:
    """Distinct random experts ``[batch, pos, slot]``."""
    return torch.rand(BATCH, POS, 8, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :slots]


def holed() -> Tensor:
    """One to four experts a token, holes anywhere, and a token without any."""
    indices = shuffled(4, seed=5)
    keep = torch.rand(indices.shape, generator=torch.Generator().manual_seed(6)) < 0.6
    keep[..., 2] = True
    keep[0, 3], keep[1, 0] = False, True
    return indices.masked_fill(~keep, -1)


ROUTES: dict[str, Callable[[], Tensor]] = {
    "as many": lambda: shuffled(2, seed=1),
    "more": lambda: shuffled(5, seed=2),
    "all": lambda: shuffled(8, seed=3),
    "fewer": lambda: shuffled(1, seed=4),
    "mixed and empty": holed,
}


def reference(model: Opened, label: tiny.Label, indices: Tensor) -> by_hand.Reference:
    """By hand: these experts, with the family's weights for them."""
    chosen = by_hand.chosen_matrix(indices.reshape(BATCH * POS, -1))
    layer = model.native[label]
    return by_hand.run(model.hf, model.name, TOKENS, label, lambda z: by_hand.weights(model.name, layer, z, chosen))


def at_slots(per_expert: Tensor, indices: Tensor) -> Tensor:
    """``[token, expert, ...] -> [batch, pos, slot, ...]``; zero at empty slots."""
    flat = indices.reshape(BATCH * POS, -1)
    picked = per_expert[torch.arange(len(flat))[:, None], flat.clamp(min=0)]
    empty = (flat < 0).view(*flat.shape, *[1] * (picked.ndim - 2))
    return picked.masked_fill(empty, 0.0).view(*indices.shape, *picked.shape[2:])


def check_layer(seen: Seen, label: tiny.Label, expected: by_hand.Reference, indices: Tensor) -> None:
    """Everything that the hooks of the layer show, against the layer computed by hand."""
    assert torch.equal(seen["expert_indices", label], indices)
    weights = at_slots(expected.weights, indices)
    assert_near(seen["expert_weights", label], weights, where="weights")
    assert_near(seen["expert_post", label], at_slots(expected.neurons, indices), 2 * TOLERANCE, "neurons")
    assert_near(seen["expert_out", label], at_slots(expected.outputs, indices), where="outputs")
    assert_near(seen["routed_out", label].flatten(0, 1), expected.routed, where="sum")
    for hook in ("expert_weights", "expert_post", "expert_out"):
        assert (seen[hook, label][indices < 0] == 0).all(), hook


def test_the_model_s_own_route_by_hand(family: str) -> None:
    model = opened(family)
    logits, seen = model.see()
    for label in model.labels:
        indices = seen["expert_indices", label]
        expected = reference(model, label, indices)
        assert_near(logits, expected.logits, where=label)
        check_layer(seen, label, expected, indices)


@pytest.mark.parametrize("kind", ROUTES)
def test_written_routes_run_exactly_those_experts(family: str, kind: str) -> None:
    model, label, indices = opened(family), opened(family).last, ROUTES[kind]()
    expected = reference(model, label, indices)
    edit = [("expert_indices", label, lambda _: indices)]
    alone = model.run(edit)
    assert_near(alone, expected.logits, where="indices hooked alone")
    assert_moved(alone, model.run())
    logits, seen = model.see(edit, labels=[label])
    assert_near(logits, expected.logits, where="all hooked")
    check_layer(seen, label, expected, indices)


def test_written_routes_in_every_layer_and_stack(family: str) -> None:
    model = opened(family)
    for label in model.labels[:-1]:
        indices = ROUTES["more"]()
        logits = model.run([("expert_indices", label, lambda _, indices=indices: indices)])
        assert_near(logits, reference(model, label, indices).logits, where=label)


def test_written_weights_are_used_as_they_are(family: str) -> None:
    """Negative, zero and large ones, not normalised after; on the model's own route and on a written one."""
    model, label = opened(family), opened(family).last
    _, natural = model.see(only=["expert_indices"])
    for indices in (natural["expert_indices", label], holed()):
        weights = torch.randn(indices.shape, generator=torch.Generator().manual_seed(7))
        weights[0, 0, 0] = 0.0
        matrix = by_hand.weight_matrix(indices, weights).flatten(0, 1)
        expected = by_hand.run(model.hf, family, TOKENS, label, lambda z, matrix=matrix: matrix)
        edits = [
            ("expert_indices", label, lambda _, indices=indices: indices),
            ("expert_weights", label, lambda _, weights=weights: weights),
        ]
        assert_near(model.run(edits), expected.logits, 2 * TOLERANCE)
        logits, seen = model.see(edits, labels=[label])
        assert_near(logits, expected.logits, 2 * TOLERANCE)
        assert_near(seen["expert_weights", label].masked_fill(indices < 0, 0), weights.masked_fill(indices < 0, 0), 0.0)
        assert_near(seen["routed_out", label].flatten(0, 1), expected.routed)


def test_a_written_route_leaves_other_tokens_as_they_were(family: str) -> None:
    """Their weights keep every bit, though the route of the call became wider."""
    model, label = opened(family), opened(family).last
    _, natural = model.see(labels=[label])
    wide = torch.nn.functional.pad(natural["expert_indices", label], (0, 2), value=-1)
    slots = wide.shape[-1]
    wide[0, 1] = torch.arange(slots)
    _, seen = model.see([("expert_indices", label, lambda _: wide)], labels=[label])
    others = torch.ones(BATCH, POS, dtype=torch.bool)
    others[0, 1] = False
    before, after = natural["expert_weights", label][others], seen["expert_weights", label][others]
    assert torch.equal(after[..., : before.shape[-1]], before)
    assert (after[..., before.shape[-1] :] == 0).all()
    assert_near(seen["routed_out", label][others], natural["routed_out", label][others])


def test_the_order_of_a_written_route_does_not_matter(family: str) -> None:
    model, label, indices = opened(family), opened(family).last, shuffled(4, seed=9)
    forward = model.run([("expert_indices", label, lambda _: indices)])
    backward = model.run([("expert_indices", label, lambda _: indices.flip(-1))])
    assert_near(forward, backward)


def test_no_expert_at_all_adds_nothing(family: str) -> None:
    """Every slot empty is the layer without its routed experts."""
    model, label = opened(family), opened(family).last
    nobody = torch.full((BATCH, POS, 2), -1)
    logits, seen = model.see([("expert_indices", label, lambda _: nobody)], labels=[label])
    assert (seen["routed_out", label] == 0).all()
    assert torch.isfinite(logits).all()
    expected = by_hand.run(model.hf, family, TOKENS, label, torch.zeros_like)
    assert_near(logits, expected.logits)
    assert_near(model.run([("routed_out", label, lambda x: x * 0)]), expected.logits)


def test_sparse_mixer_weighs_written_routes_among_near_logits() -> None:
    """Phi-MoE's typical logits lie far apart and weigh 1: here they are near, and the masked maxima show."""
    model, label, indices = opened("phimoe"), opened("phimoe").last, shuffled(4, seed=10)
    _, natural = model.see(labels=[label])
    near = 10 + 0.3 * natural["router_logits", label]
    _, seen = model.see(
        [("router_logits", label, lambda _: near), ("expert_indices", label, lambda _: indices)], labels=[label]
    )
    chosen = by_hand.chosen_matrix(indices).flatten(0, 1)
    weights = by_hand.weights("phimoe", model.native[label], near.flatten(0, 1), chosen)
    assert_near(seen["expert_weights", label], at_slots(weights, indices))
    assert seen["expert_weights", label].std() > 0.1
