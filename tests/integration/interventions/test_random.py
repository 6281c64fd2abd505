"""Random routes: as many different experts as the router's, uniform, and a token's own whatever runs beside it."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from moe_interp.hooks.attach import attach
from moe_interp.interventions import force_experts, random_routing
from tests import tiny
from tests.integration.interventions.support import LEFT, RIGHT, TOKENS, opened, routes_in_generation, see

SOME = ("olmoe", "deepseek_v4", "llama4", "jetmoe", "switch_transformers")


def drawn(seed: int, layer: int, batch: int, pos: int, slots: int = 2) -> Tensor:
    """Draws of one layer ``[batch, pos, slot]``, without running a model."""
    moe = opened("olmoe").moe
    moe.bridge(TOKENS)  # the last pass found no cache
    writer: Any = random_routing(moe, [layer], seed=seed)[0][1]
    return writer.__self__.route(torch.arange(slots).expand(batch, pos, slots))


def test_as_many_different_experts_as_the_router_takes_with_the_familys_weights(family: str) -> None:
    model = opened(family)
    native, drawn = (
        see(model, hooks, model.last)[1] for hooks in ([], random_routing(model.moe, [model.last], seed=2))
    )
    routes = drawn["expert_indices"]
    assert routes.shape == native["expert_indices"].shape
    assert not torch.equal(routes, native["expert_indices"])
    assert all(len(set(route)) == len(route) and set(route) <= set(range(8)) for route in routes.flatten(0, 1).tolist())
    rule, logits = model.moe.spec(model.last).rule, see(model, [], model.last, "router_logits")[1]["router_logits"]
    assert torch.equal(drawn["expert_weights"], rule.weights(logits, routes))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_set_of_experts_is_equally_likely(slots: int) -> None:
    for seed, layer, batch, pos in [(0, 0, 100, 100), (1, 1, 5000, 2), (2, 2, 2, 5000)]:
        routes = drawn(seed, layer, batch, pos, slots)
        counts = dict.fromkeys(combinations(range(8), slots), 0)
        for route in routes.sort(dim=-1).values.flatten(0, 1).tolist():
            counts[tuple(route)] += 1
        assert stats.chisquare(list(counts.values())).pvalue > 0.005
        for slot in range(slots):
            assert stats.chisquare(torch.bincount(routes[..., slot].flatten(), minlength=8).numpy()).pvalue > 0.005


def test_draws_of_seeds_layers_rows_and_positions_are_independent() -> None:
    """The share of tokens with the same pair of experts is 1/28 for any two of them: also with labels exchanged."""
    base = torch.stack([torch.stack([drawn(seed, layer, 40, 40) for layer in range(3)]) for seed in range(8)])
    pairs = base.sort(dim=-1).values.double() @ torch.tensor([8.0, 1.0], dtype=torch.float64)  # [seed, layer, row, pos]
    for axis in range(4):
        for lag in (1, 2):
            a, b = pairs.movedim(axis, 0)[:-lag], pairs.movedim(axis, 0)[lag:]
            assert stats.binomtest(int((a == b).sum()), a.numel(), 1 / 28).pvalue > 0.001
    for i, j in combinations(range(4), 2):
        n = min(pairs.shape[i], pairs.shape[j])
        square = pairs.movedim((i, j), (0, 1))[:n, :n]
        apart = ~torch.eye(n, dtype=torch.bool)
        for shift in (0, 1):
            other = square.transpose(0, 1).roll(shift, 0)
            agree = (square == other)[apart if shift == 0 else torch.triu(torch.ones(n, n), 2).bool()]
            if n > 3 or shift == 0:
                share = int(agree.sum()) // (2 if shift == 0 else 1)  # each exchanged pair is met twice
                total = agree.numel() // (2 if shift == 0 else 1)
                assert stats.binomtest(share, total, 1 / 28).pvalue > 0.001, (i, j, shift)


def test_one_seed_gives_the_same_routes_again_and_another_gives_others() -> None:
    for name in SOME:
        model = opened(name)
        layer = model.last
        first, again, other = (
            see(model, random_routing(model.moe, seed=seed), layer)[1]["expert_indices"] for seed in (4, 4, 5)
        )
        assert torch.equal(first, again)
        assert (first != other).any()
        assert (first[0] != first[1]).any()
        before = see(model, random_routing(model.moe, seed=4), model.labels[-2])[1]["expert_indices"]
        assert (before != first).any()


def test_padding_does_not_move_the_draws() -> None:
    """Each row's real tokens draw alike when padded on either side, or not at all."""
    for name in ("olmoe", "llama4"):
        model = opened(name)
        routes = {}
        for side, mask in (("left", LEFT), ("right", RIGHT), ("none", LEFT[:, 2:] | 1)):
            hooks = random_routing(model.moe, seed=1, attention_mask=mask)
            tokens = TOKENS[:, : mask.shape[1]]
            found = see(model, hooks, model.last, tokens=tokens, attention_mask=mask)[1]["expert_indices"]
            routes[side] = [row[keep.bool()].tolist() for row, keep in zip(found, mask)]
        assert routes["left"] == routes["right"]
        assert [row[:4] for row in routes["left"]] == routes["none"]


def test_step_by_step_and_at_once_draw_the_same() -> None:
    for name in ("olmoe", "gpt_oss", "nemotron_h", "llama4"):
        model = opened(name)
        hooks = random_routing(model.moe, seed=3, positions="all")
        steps = routes_in_generation(model, hooks, model.last, 4)
        assert [step.shape[1] for step in steps] == [6, 1, 1, 1]
        whole = see(model, hooks, model.last, tokens=tiny.random_tokens(2, 9, seed=8))[1]["expert_indices"]
        assert torch.equal(torch.cat(steps, dim=1), whole)


def test_the_draws_of_a_layer_do_not_depend_on_which_others_are_attached() -> None:
    model = opened("olmoe")
    expected = see(model, random_routing(model.moe, seed=6), 2)[1]["expert_indices"]
    bridge = tiny.build_bridge(model.hf, "olmoe")
    with attach(bridge, layers=[2]) as moe, torch.no_grad():
        name = moe.hook_name("expert_indices", 2)
        found = []
        record = (name, lambda value, hook: found.append(value.clone()))
        bridge.run_with_hooks(TOKENS, fwd_hooks=[*random_routing(moe, seed=6), record])
    assert torch.equal(found[0], expected)


def test_tokens_that_use_fewer_experts_draw_as_few() -> None:
    model = opened("olmoe")
    hooks = [*force_experts(model.moe, 1, 0, positions=[2]), *random_routing(model.moe, [1], seed=1)]
    routes = see(model, hooks, 1)[1]["expert_indices"]
    assert (routes >= 0).sum(-1).tolist() == [[2, 2, 1, 2, 2, 2]] * 2
