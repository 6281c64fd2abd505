"""Promoted experts are used and suppressed ones are not: in every family, by every token, for every expert."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable, ScoreRule
from moe_interp.errors import ConfigError, RouteError
from moe_interp.interventions import (
    ablate_experts,
    change_top_k,
    force_experts,
    promote_experts,
    random_routing,
    set_routes,
    suppress_experts,
    uniform_routing,
)
from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import assert_near, biggest_difference, is_hash_routed
from tests.integration.interventions.support import TOKENS, Opened, opened, plain, routes_in_generation, run, same, see

ROUTE = ("router_logits", "expert_indices", "expert_weights")
EVERY = torch.ones_like(TOKENS, dtype=torch.bool)


def chosen(seen: dict[str, Tensor]) -> Tensor:
    return by_hand.chosen_matrix(seen["expert_indices"])


def by_choice(model: Opened, layer: tiny.Label, logits: Tensor) -> Tensor:
    """``[batch, pos, expert]``: what the family ranks by before groups are chosen, from its weights by hand."""
    scores = by_hand.scores(model.name, logits) if model.name != "phimoe" else logits
    rule = model.moe.spec(layer).rule
    bias = getattr(rule, "bias", None)
    return scores if bias is None else scores + bias


def weights_by_hand(model: Opened, layer: tiny.Label, seen: dict[str, Tensor]) -> Tensor:
    flat = by_hand.weights(
        model.name, model.native[layer], seen["router_logits"].flatten(0, 1), chosen(seen).flatten(0, 1)
    )
    return flat.view(*seen["expert_indices"].shape[:2], 8)


def weights_of(model: Opened, matrix: Tensor, logits: Tensor) -> Tensor:
    return by_hand.weights(model.name, model.native[model.last], logits, matrix)


def assert_family_weights(model: Opened, layer: tiny.Label, seen: dict[str, Tensor], where: Any) -> None:
    found = by_hand.weight_matrix(seen["expert_indices"], seen["expert_weights"])
    assert_near(found, weights_by_hand(model, layer, seen), 2e-5, where)


def every_expert(model: Opened, change: Any) -> dict[tiny.Label, tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Expert p at position p, at all layers in one pass: what each layer saw, its own routes, and who was asked for."""
    tokens = tiny.random_tokens(3, 8, seed=4)
    hooks = [hook for expert in range(8) for hook in change(model.moe, None, expert, positions=[expert])]
    found = {}
    kept: dict[tuple[str, tiny.Label], Tensor] = {}
    record = [(name, label, partial(keep, kept, name, label)) for label in model.labels for name in ROUTE]
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
        model.run(record, tokens)
    for label in model.labels:
        seen = {name: kept[name, label] for name in ROUTE}
        if is_hash_routed(model, label):
            own = see(model, [], label, tokens=tokens)[1]["expert_indices"]
        else:
            own = model.moe.spec(label).rule.route(seen["router_logits"])[0]
        found[label] = seen, by_hand.chosen_matrix(own), torch.eye(8, dtype=torch.bool).expand(3, 8, 8)
    return found


def keep(into: dict[Any, Tensor], name: str, label: tiny.Label, value: Tensor) -> None:
    into[name, label] = value.clone()


def test_every_token_uses_a_promoted_expert_with_the_familys_weights(family: str) -> None:
    model = opened(family)
    for layer, (seen, has, asked) in every_expert(model, promote_experts).items():
        now, ranks = chosen(seen), by_choice(model, layer, seen["router_logits"])
        assert now[asked].all(), layer
        assert torch.equal(now.sum(-1), has.sum(-1).clamp(min=1))  # beyond a capacity as well
        # it takes the place of the token's worst
        others = has & ~asked
        worst = ranks.masked_fill(~others, float("inf")).argmin(-1, keepdim=True)
        full = others.sum(-1, keepdim=True) == model.moe.spec(layer).top_k
        assert torch.equal(now, torch.where(full, others.scatter(-1, worst, False), others) | asked), layer
        assert_family_weights(model, layer, seen, layer)


def test_no_token_uses_a_suppressed_expert_and_the_next_best_takes_its_place(family: str) -> None:
    model = opened(family)
    for layer, (seen, has, asked) in every_expert(model, suppress_experts).items():
        now, ranks = chosen(seen), by_choice(model, layer, seen["router_logits"])
        assert not (now & asked).any(), layer
        assert torch.equal(now.sum(-1), has.sum(-1))
        is_open = ~model.moe.spec(layer).rule.choice_logits(seen["router_logits"]).isneginf()
        inside = ~has & ~asked & is_open
        candidates = torch.where(inside.any(-1, keepdim=True), inside, ~has & ~asked)
        best = ranks.masked_fill(~candidates, float("-inf")).argmax(-1, keepdim=True)
        expected = torch.where((has & asked).any(-1, keepdim=True), (has & ~asked).scatter(-1, best, True), has)
        assert torch.equal(now, expected), layer
        assert_family_weights(model, layer, seen, layer)


SOME = ("olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "deepseek_v4", "phimoe", "llama4", "gemma4_text")


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "llama4", "jetmoe", "switch_transformers", "laguna"])
def test_the_model_computes_with_the_resulting_experts(name: str) -> None:
    """Logits against a layer by hand from the weights of an untouched transformers model."""
    model = opened(name)
    for hooks in (promote_experts(model.moe, model.last, 6), suppress_experts(model.moe, model.last, [0, 3, 5])):
        logits, seen = see(model, hooks, model.last)
        matrix = partial(weights_of, model, chosen(seen).flatten(0, 1))
        reference = by_hand.run(model.hf, name, TOKENS, model.last, matrix)
        assert_near(logits, reference.logits)
        assert biggest_difference(logits, plain(model)) > 1e-3


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "llama4"])
def test_several_experts_and_several_layers_at_once(name: str) -> None:
    model = opened(name)
    top_k = min(model.moe.spec(layer).top_k for layer in model.labels)
    up, down = list(range(8))[-top_k:], [1, 2, 4]
    promoted = promote_experts(model.moe, None, up)
    by_layer = promote_experts(model.moe, list(model.labels), dict.fromkeys(model.labels, up))
    assert torch.equal(run(model, promoted), run(model, by_layer))
    both = [*promoted, *suppress_experts(model.moe, model.labels, down)]
    native = chosen(see(model, [], model.last)[1])
    for layer in model.labels:
        now = chosen(see(model, both, layer)[1])
        assert now[..., up].all()
        assert not now[..., down].any()
    # as many are suppressed as can be: what is left is used, and tokens that had them keep their slots
    alone = suppress_experts(model.moe, model.last, range(8 - model.moe.spec(model.last).top_k))
    seen, own = see(model, alone, model.last)[1], see(model, [], model.last)[1]
    assert torch.equal(chosen(seen).sum(-1), native.sum(-1))
    kept = ~native[..., : 8 - model.moe.spec(model.last).top_k].any(-1)
    assert same(seen, own, kept)


# --- by a margin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SOME, "ernie4_5_moe", "laguna"])
def test_no_margin_changes_nothing_a_middle_one_some_tokens_and_a_large_one_all(name: str) -> None:
    model = opened(name)
    layer = model.last
    native = see(model, [], layer, *ROUTE)[1]
    has = chosen(native)
    for expert in (5,):
        for change, sign in ((promote_experts, 1), (suppress_experts, -1)):
            routes = [see(model, change(model.moe, layer, expert, m), layer, *ROUTE)[1] for m in (0.0, 1.0, 400.0)]
            assert same(routes[0], native, EVERY)
            used = [int(chosen(seen)[..., expert].sum()) for seen in routes]
            assert used[0] == int(has[..., expert].sum())
            assert sign * used[0] <= sign * used[1] <= sign * used[2]
            assert used[2] == (TOKENS.numel() if sign > 0 else 0)
            assert_family_weights(model, layer, routes[1], expert)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe", "lfm2_moe", "ernie4_5_moe", "olmoe"])
def test_a_margin_chooses_as_a_router_whose_choice_scores_are_that_much_larger(name: str) -> None:
    """By a loop: scores times e^margin, then groups, then the best; a token takes the expert where this does."""
    model = opened(name)
    layer = model.last
    rule = model.moe.spec(layer).rule
    assert isinstance(rule, ScoreRule)
    native = see(model, [], layer, *ROUTE)[1]
    has, shared = chosen(native), 0.0
    if rule.bias is not None:
        shared = float(torch.zeros(()).clamp(rule.bias.min(), rule.bias.max()))
    size, n_groups = (8 // rule.n_groups, rule.n_groups) if rule.group_score else (8, 1)
    entered = 0
    for margin in (0.3, 1.0):
        for expert in (1, 6):
            raised = (by_choice(model, layer, native["router_logits"]).double() - shared).clamp_min(1e-6)
            raised[..., expert] *= float(torch.tensor(margin).double().exp())
            raised += shared
            now = chosen(see(model, promote_experts(model.moe, layer, expert, margin), layer)[1])
            for token in EVERY.nonzero().tolist():
                row = raised[tuple(token)].tolist()
                groups = [sorted(row[g * size : (g + 1) * size], reverse=True) for g in range(n_groups)]
                best = [g[0] if rule.group_score == "max" else sum(g[:2]) for g in groups]
                keep = sorted(range(n_groups), key=lambda g: -best[g])[: rule.top_groups if n_groups > 1 else 1]
                order = sorted((e for e in range(8) if e // size in keep), key=lambda e: -row[e])
                takes = expert in order[: rule.top_k] or bool(has[tuple(token)][expert])
                assert bool(now[tuple(token)][expert]) == takes, (margin, expert, token)
                entered += takes and not bool(has[tuple(token)][expert])
    assert entered


# --- another number of experts --------------------------------------------------------------------------------


def test_a_smaller_or_larger_k_is_the_router_with_that_k(family: str) -> None:
    """Against an untouched transformers model whose routers are told to take as many."""
    model = opened(family)
    layer = model.last
    rule = model.moe.spec(layer).rule
    is_grouped = isinstance(rule, ScoreRule) and rule.group_score is not None
    most = 8 // rule.n_groups * rule.top_groups if is_grouped else 8  # type: ignore[attr-defined]
    router = model.native[layer].router
    for k in sorted({1, min(rule.top_k + 1, most)}):
        logits, seen = see(model, change_top_k(model.moe, layer, k), layer, *ROUTE)
        assert (chosen(seen).sum(-1) == k).all()
        assert_family_weights(model, layer, seen, k)
        if isinstance(getattr(router, "top_k", None), int) and not isinstance(rule, HashTable) and family != "phimoe":
            before, router.top_k = router.top_k, k
            try:
                assert_near(logits, model.native_logits(), where=k)
            finally:
                router.top_k = before
    assert torch.equal(run(model, change_top_k(model.moe, None, rule.top_k)), plain(model))


def test_which_families_are_compared_with_their_own_router_at_another_k() -> None:
    other = [
        name
        for name in tiny.FAMILIES
        if not isinstance(getattr(opened(name).native[opened(name).last].router, "top_k", None), int)
    ]
    assert other == ["switch_transformers", "gemma4_text", "gemma4"]  # phimoe has two slots, whatever its router says


def test_more_experts_than_the_open_groups_hold_are_refused() -> None:
    model = opened("deepseek_v3")
    rule = model.moe.spec(model.last).rule
    most = 8 // rule.n_groups * rule.top_groups  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"k={most + 1} at layer .* at most {most}, the experts of the groups"):
        change_top_k(model.moe, model.last, most + 1)
    with pytest.raises(ConfigError, match=r"k=9 at layer 1. Expected: at most 8, all of its experts"):
        change_top_k(opened("olmoe").moe, 1, 9)
    for k in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match=r"k="):
            change_top_k(model.moe, model.last, k)  # type: ignore[arg-type]


# --- together -------------------------------------------------------------------------------------------------


def experts_of(model: Opened, hooks: Any, layer: tiny.Label) -> list[set[int]]:
    route = see(model, hooks, layer)[1]["expert_indices"].flatten(0, 1).tolist()
    return [{e for e in slots if e >= 0} for slots in route]


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "llama4"])
def test_they_start_from_the_route_that_earlier_interventions_wrote(name: str) -> None:
    model = opened(name)
    moe, last = model.moe, model.last
    two = set_routes(moe, last, [4, 6])
    promoted = experts_of(model, [*random_routing(moe, [last]), *promote_experts(moe, last, 2)], last)
    drawn = experts_of(model, random_routing(moe, [last]), last)
    assert all(2 in now and len(now) == len(was) and len(was - now) <= 1 for now, was in zip(promoted, drawn))
    # 1 and 2 both hold, promoted one after the other; of the route [4, 6] nothing that was named may go
    if model.moe.spec(last).top_k >= 2:
        both = [*promote_experts(moe, last, 1), *promote_experts(moe, last, 2)]
        assert all({1, 2} <= now for now in experts_of(model, both, last))
        one = [*force_experts(moe, last, 3), *promote_experts(moe, last, 5)]
        assert experts_of(model, one, last) == [{3, 5}] * TOKENS.numel()
    assert experts_of(model, [*two, *promote_experts(moe, last, 4)], last) == [{4, 6}] * TOKENS.numel()
    assert experts_of(model, [*two, *suppress_experts(moe, last, 3)], last) == [{4, 6}] * TOKENS.numel()
    # a token that promotion leaves as it is keeps the weights that it was given
    weighted = set_routes(moe, last, [4, 6], [0.25, 2.0])
    assert same(see(model, [*weighted, *promote_experts(moe, last, 6)], last)[1], see(model, weighted, last)[1], EVERY)
    narrow = [*change_top_k(moe, last, 1), *promote_experts(moe, last, 2)]
    assert experts_of(model, narrow, last) == [{2}] * TOKENS.numel()
    fewer = [*suppress_experts(moe, last, [0, 1]), *ablate_experts(moe, last, [2, 3], mode="reroute")]
    assert all(not now & {0, 1, 2, 3} for now in experts_of(model, fewer, last))


def test_opposite_interventions_are_refused_in_words_whichever_comes_first() -> None:
    model = opened("olmoe")
    moe, before = model.moe, plain(model)
    up, down = promote_experts(moe, 1, 3), suppress_experts(moe, 1, 3)
    for hooks, text in (
        ([*up, *down], r"expert 3 of layer 1 is promoted for sequence 0, position 0 .* and suppressed after that"),
        ([*down, *up], r"expert 3 of layer 1 is suppressed .* and promoted after that. Expected: interventions that"),
        ([*force_experts(moe, 1, 3), *down], r"expert 3 of layer 1 is forced .* and suppressed after that"),
        ([*set_routes(moe, 1, [1, 3]), *down], r"expert 3 of layer 1 is forced"),
        ([*down, *force_experts(moe, 1, 3)], r"is suppressed .* an intervention after that sends the token to it"),
        ([*down, *uniform_routing(moe, [1])], r"is suppressed .* sends the token to it. .*come after what writes"),
        ([*up, *force_experts(moe, 1, 5)], r"is promoted .* an intervention after that leaves it out"),
        ([*up, *ablate_experts(moe, 1, 3, mode="reroute")], r"is promoted .* leaves it out"),
        ([*uniform_routing(moe, [1]), *down], r"7 experts of layer 1 left for .* which uses 8"),
        (
            [*promote_experts(moe, 1, [0, 1]), *promote_experts(moe, 1, 2)],
            r"3 experts of layer 1 asked for by name .* at most the 2 that the token may use",
        ),
        ([*change_top_k(moe, 1, 1), *promote_experts(moe, 1, [0, 1])], r"2 experts .* at most the 1"),
    ):
        with pytest.raises(RouteError, match=text):
            run(model, hooks)
        assert torch.equal(plain(model), before)
    apart = [*promote_experts(moe, 1, 3, positions=[0]), *suppress_experts(moe, 1, 3, positions=[1, 2])]
    found = see(model, apart, 1)[1]["expert_indices"]
    assert (found[:, 0] == 3).any(-1).all()
    assert not (found[:, 1:3] == 3).any()


def test_a_token_beyond_its_capacity_is_promoted_too_and_left_alone_by_suppression(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = opened("switch_transformers")
    layer = model.labels[0]
    monkeypatch.setattr(model.moe.spec(layer).router, "expert_capacity", 4)
    crowded = [(model.moe.hook_name("router_logits", layer), lambda value, hook: value * 0 + torch.arange(8.0))]
    full = see(model, crowded, layer)[1]["expert_indices"]
    assert (full < 0).any()
    assert (full == 7).any()
    assert (see(model, [*crowded, *promote_experts(model.moe, layer, 2)], layer)[1]["expert_indices"] == 2).all()
    kept = see(model, [*crowded, *suppress_experts(model.moe, layer, 7)], layer)[1]["expert_indices"]
    assert torch.equal(kept, torch.where(full == 7, 6, full))


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "deepseek_v4"])
def test_they_hold_under_generate_at_prompt_and_generated_tokens(name: str) -> None:
    model = opened(name)
    for hooks, holds in (
        (promote_experts(model.moe, None, 5, positions="all"), lambda route: (route == 5).any(-1).all()),
        (
            suppress_experts(model.moe, None, [0, 5], positions="all"),
            lambda route: not ((route == 5) | (route == 0)).any(),
        ),
    ):
        steps = routes_in_generation(model, hooks, model.last, 3)
        assert len(steps) == 3
        assert all(holds(route) for route in steps)
    new = routes_in_generation(model, promote_experts(model.moe, model.last, 5, positions="new"), model.last, 3)
    native = routes_in_generation(model, [], model.last, 3)
    assert torch.equal(new[0], native[0])
    assert all((route == 5).any(-1).all() for route in new[1:])


def test_hash_layers_follow() -> None:
    model = opened("deepseek_v4")
    layer = next(label for label in model.labels if is_hash_routed(model, label))
    assert (see(model, promote_experts(model.moe, layer, 3), layer)[1]["expert_indices"] == 3).any(-1).all()
    assert not (see(model, suppress_experts(model.moe, layer, 3), layer)[1]["expert_indices"] == 3).any()


def test_edited_scores_are_what_they_rank_by() -> None:
    model = opened("olmoe")
    reversed_scores = (model.moe.hook_name("router_probs", 1), lambda value, hook: 1 / value)
    native = see(model, [], 1, "router_logits")[1]["router_logits"]
    fewest = native.argsort(-1)
    seen = see(model, [reversed_scores, *suppress_experts(model.moe, 1, 3)], 1)[1]["expert_indices"]
    expected = [[e for e in order if e != 3][:2] for order in fewest.flatten(0, 1).tolist()]
    assert [set(route) for route in seen.flatten(0, 1).tolist()] == [set(route) for route in expected]
