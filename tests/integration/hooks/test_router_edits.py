"""Edits before selection re-route by the family's own code: compared with untouched models made to route so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import ONE_TOKEN, TOKENS, Opened, assert_moved, assert_near, is_hash_routed, opened


def wanted_logits(seen: Tensor, seed: int) -> Tensor:
    """New logits of like size that turn the order of the experts upside down."""
    noise = torch.rand(seen.shape, generator=torch.Generator().manual_seed(seed), dtype=seen.dtype)
    return -seen + 0.3 * noise


def rank_one_logits(model: Opened, label: tiny.Label, new: Tensor) -> Tensor:
    """One token through an untouched model whose router weight was changed to give these logits."""
    with tiny.recorded_router_inputs(model.hf) as inputs:
        model.native_logits(ONE_TOKEN)
    updated = tiny.build_hf(model.name)
    tiny.rank_one_router_update(updated, label, inputs[label], new)
    return tiny.native_logits(updated, model.name, ONE_TOKEN)


def test_edited_logits_equal_a_router_that_computes_them(family: str) -> None:
    model = opened(family)
    before, natural = model.see(tokens=ONE_TOKEN)
    for label in model.labels:
        new = wanted_logits(natural["router_logits", label], seed=1)
        logits, seen = model.see([("router_logits", label, lambda z, new=new: new)], ONE_TOKEN)
        assert_near(logits, rank_one_logits(model, label, new), where=label)
        assert_moved(logits, before, where=label)
        old, now = natural["expert_indices", label], seen["expert_indices", label]
        if is_hash_routed(model, label):  # the token's id chooses the experts: edited logits change weights only
            assert torch.equal(now, old)
            assert_moved(seen["expert_weights", label], natural["expert_weights", label])
        else:
            assert set(now.flatten().tolist()) != set(old.flatten().tolist()), label


def test_edited_logits_re_route_each_token_on_its_own(family: str) -> None:
    """Editing some positions leaves the route of the others as it was, bit for bit."""
    model, label = opened(family), opened(family).last

    def edit(z: Tensor) -> Tensor:
        z[1, 2:4] = wanted_logits(z[1, 2:4], seed=2)
        return z

    _, natural = model.see(labels=[label])
    _, seen = model.see([("router_logits", label, edit)], labels=[label])
    edited = torch.zeros(TOKENS.shape, dtype=torch.bool)
    edited[1, 2:4] = True
    for hook in ("expert_indices", "expert_weights"):
        assert torch.equal(seen[hook, label][~edited], natural[hook, label][~edited]), hook
    assert not torch.equal(seen["expert_indices", label][edited], natural["expert_indices", label][edited])
    assert_near(seen["routed_out", label][~edited], natural["routed_out", label][~edited])


def test_written_scores_equal_the_logits_they_come_from(family: str) -> None:
    """Selecting again by scores includes the correction bias and the group limit, as selecting by logits does."""
    model = opened(family)
    _, natural = model.see()
    for label in model.labels:
        if "router_probs" not in model.moe.hooks(label):
            continue
        new = wanted_logits(natural["router_logits", label], seed=3)
        scores = by_hand.scores(family, new)
        by_logits, _ = model.see([("router_logits", label, lambda z, new=new: new)])
        by_scores, seen = model.see([("router_probs", label, lambda p, scores=scores: scores)])
        assert_near(by_scores, by_logits, where=label)
        assert torch.equal(seen["router_logits", label], natural["router_logits", label])
        assert_moved(by_scores, model.run(), where=label)


def test_scores_seen_are_those_of_the_family(family: str) -> None:
    model = opened(family)
    _, seen = model.see(only=("router_logits", "router_probs"))
    for label in model.labels:
        if ("router_probs", label) in seen:
            expected = by_hand.scores(family, seen["router_logits", label])
            assert_near(seen["router_probs", label], expected, 1e-6, where=label)


def test_weights_follow_written_scores_that_are_no_distribution() -> None:
    """Without normalisation, doubled scores give doubled weights for the same experts; with it, the same weights."""
    for name, factor in (("jamba", 2.0), ("deepseek_v2", 2.0), ("switch_transformers", 2.0), ("mixtral", 1.0)):
        model = opened(name)
        label = model.last
        _, natural = model.see(labels=[label])
        _, seen = model.see([("router_probs", label, lambda p: p * 2)], labels=[label])
        assert torch.equal(seen["expert_indices", label], natural["expert_indices", label]), name
        assert_near(seen["expert_weights", label], factor * natural["expert_weights", label], 1e-6)


def test_only_the_router_reads_an_edited_router_in(family: str) -> None:
    model = opened(family)
    _, natural = model.see()
    for label in model.labels:
        noise = torch.randn(natural["router_in", label].shape, generator=torch.Generator().manual_seed(4))

        def edit(x: Tensor, noise: Tensor = noise) -> None:
            x.add_(noise)

        def inject(module: nn.Module, args: tuple[Any, ...], noise: Tensor = noise) -> tuple[Any, ...]:
            return args[0] + noise.reshape(args[0].shape), *args[1:]

        logits, seen = model.see([("router_in", label, edit)])
        handle = model.native[label].router.register_forward_pre_hook(inject)
        try:
            expected = model.native_logits()
        finally:
            handle.remove()
        assert_near(logits, expected, where=label)
        assert_moved(seen["router_logits", label], natural["router_logits", label], 0.1, where=label)


def test_minus_infinity_leaves_an_expert_without_a_part(family: str) -> None:
    """Its score is 0. A correction bias may still choose it, as it would in the family's own router, with weight 0."""
    model, label = opened(family), opened(family).last
    _, natural = model.see(labels=[label])
    busiest = int(natural["expert_indices", label].flatten().mode().values)

    def shut(z: Tensor) -> None:
        z[..., busiest] = float("-inf")

    logits, seen = model.see([("router_logits", label, shut)], labels=[label])
    assert torch.isfinite(logits).all()
    assert_moved(logits, model.run())
    chosen = seen["expert_indices", label] == busiest
    assert (seen["expert_weights", label][chosen] == 0).all()
    if model.moe.spec(label).rule.choice_logits(torch.full((8,), -torch.inf)).isneginf().all():
        assert not chosen.any()
