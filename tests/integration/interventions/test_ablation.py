"""The four ablations against hooks written naively, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.interventions import ablate_experts, bias_router
from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import assert_moved, assert_near
from tests.integration.interventions.support import LEFT, TOKENS, Opened, opened, plain, run, same, see

BATCH, POS = TOKENS.shape
VALUES = ["olmoe", "llama4", "gpt_oss", "jetmoe", "nemotron_h", "switch_transformers"]


def busiest(model: Opened, count: int = 2) -> list[int]:
    """The last layer's experts that most tokens use."""
    native = see(model, [], model.last)[1]["expert_indices"]
    return torch.bincount(native[native >= 0], minlength=8).topk(count).indices.tolist()


def users(model: Opened, gone: list[int]) -> Tensor:
    """``[batch, pos]``: the tokens whose own route holds one of the experts."""
    native = see(model, [], model.last)[1]["expert_indices"]
    return torch.isin(native, torch.tensor(gone)).any(-1)


def test_zero_leaves_the_other_experts_their_weights(family: str) -> None:
    model = opened(family)
    gone = busiest(model)
    layer = model.native[model.last]
    native = see(model, [], model.last)[1]["expert_indices"]
    chosen = by_hand.chosen_matrix(native).flatten(0, 1)

    def without(logits: Tensor) -> Tensor:
        weights = by_hand.weights(family, layer, logits, chosen).clone()
        weights[:, gone] = 0.0
        return weights

    logits = run(model, ablate_experts(model.moe, model.last, gone))
    assert_near(logits, by_hand.run(model.hf, family, TOKENS, model.last, without).logits)
    assert_moved(logits, plain(model))


@pytest.mark.parametrize("name", VALUES)
def test_mean_is_the_mean_over_the_experts_own_tokens(name: str) -> None:
    model = opened(name)
    gone = busiest(model)
    mask = torch.ones_like(LEFT) if name == "switch_transformers" else LEFT
    inputs = {} if name == "switch_transformers" else {"attention_mask": mask}
    names = ("expert_indices", "expert_out")
    before = see(model, [], model.last, *names, **inputs)[1]
    hooks = ablate_experts(model.moe, model.last, gone, mode="mean", attention_mask=mask)
    after = see(model, hooks, model.last, *names, **inputs)[1]
    expected = before["expert_out"].clone()
    for expert in gone:
        places = [
            (b, p, s)
            for b in range(BATCH)
            for p in range(POS)
            for s, e in enumerate(before["expert_indices"][b, p].tolist())
            if e == expert and mask[b, p]
        ]
        for place in places:
            expected[place] = torch.stack([before["expert_out"][other] for other in places]).mean(0)
    assert not torch.equal(expected, before["expert_out"])
    assert_near(after["expert_out"], expected, 1e-6)
    assert torch.equal(after["expert_indices"], before["expert_indices"])


@pytest.mark.parametrize("name", VALUES)
def test_resample_gives_the_output_of_a_token_that_uses_the_expert(name: str) -> None:
    model = opened(name)
    gone = busiest(model)
    names = ("expert_indices", "expert_out")
    before = see(model, [], model.last, *names)[1]
    used = before["expert_indices"] == gone[0]
    pool = before["expert_out"][used]
    others = torch.ones_like(used) ^ used

    def outputs(seed: int, **options: Any) -> Tensor:
        hooks = ablate_experts(model.moe, model.last, gone[0], mode="resample", seed=seed, **options)
        return see(model, hooks, model.last, "expert_out")[1]["expert_out"]

    draws = []
    for seed in range(12):
        out = outputs(seed)
        assert torch.equal(out[others], before["expert_out"][others])
        match = (out[used].unsqueeze(1) == pool).all(-1)  # [user, pool]
        assert match.any(-1).all()
        draws.append(match.int().argmax(-1))
    assert torch.equal(outputs(3), outputs(3))
    if len(pool) > 1:
        assert all(len(column.unique()) > 1 for column in torch.stack(draws).T)
    first = outputs(1, positions=[0])
    assert torch.equal(first[:, 1:], before["expert_out"][:, 1:])


def test_resampled_tokens_draw_apart_from_each_other_and_alike_under_any_padding() -> None:
    model = opened("olmoe")
    names = ("expert_indices", "expert_out")
    tokens = tiny.random_tokens(1, 40, seed=4)

    def sources(tokens: Tensor, mask: Tensor) -> Tensor:
        """Which of the expert's tokens, in their order, each of them got its output from."""
        inputs: dict[str, Any] = {"tokens": tokens, "attention_mask": mask}
        before = see(model, [], 0, *names, **inputs)[1]
        hooks = ablate_experts(model.moe, 0, 2, mode="resample", seed=1, attention_mask=mask)
        after = see(model, hooks, 0, "expert_out", **inputs)[1]["expert_out"]
        used = (before["expert_indices"] == 2) & mask.bool().unsqueeze(-1)
        return (after[used].unsqueeze(1) == before["expert_out"][used]).all(-1).int().argmax(-1)

    alone = sources(tokens, torch.ones_like(tokens))
    assert len(alone.unique()) > 3
    padding = torch.zeros_like(tokens[:, :3])
    for parts in ([padding, tokens], [tokens, padding]):
        padded = torch.cat(parts, dim=1)
        assert torch.equal(sources(padded, (padded > 0).int()), alone)
    twice = sources(tokens.repeat(2, 1), torch.ones_like(tokens.repeat(2, 1)))
    assert not torch.equal(twice[: len(alone)] % len(alone), twice[len(alone) :] % len(alone))


# --- re-routing -----------------------------------------------------------------------------------------------


def rerouted_by_hand(model: Opened, gone: list[int]) -> list[list[int]]:
    """Each token's own experts without those gone, then the best ranked that are left."""
    seen = see(model, [], model.last, "router_logits", "expert_indices")[1]
    ranks = model.moe.spec(model.last).rule.choice_logits(seen["router_logits"]).flatten(0, 1)
    routes = []
    for route, rank in zip(seen["expert_indices"].flatten(0, 1).tolist(), ranks):
        kept = [e for e in route if e not in gone]
        order = [e for e in rank.argsort(descending=True).tolist() if rank[e] > float("-inf")]
        spare = [e for e in order if e not in gone and e not in kept]
        new = kept + spare[: len(route) - len(kept)]
        routes.append(new + [-1] * (len(route) - len(new)))
    return routes


def test_reroute_keeps_the_others_and_takes_the_next_best_with_the_familys_weights(family: str) -> None:
    model = opened(family)
    gone = busiest(model)
    native = see(model, [], model.last)[1]
    logits, seen = see(model, ablate_experts(model.moe, model.last, gone, mode="reroute"), model.last)
    expected = rerouted_by_hand(model, gone)
    assert seen["expert_indices"].flatten(0, 1).tolist() == expected
    assert not torch.isin(seen["expert_indices"], torch.tensor(gone)).any()
    assert same(seen, native, ~users(model, gone))
    layer, chosen = model.native[model.last], by_hand.chosen_matrix(seen["expert_indices"]).flatten(0, 1)
    reference = by_hand.run(model.hf, family, TOKENS, model.last, lambda z: by_hand.weights(family, layer, z, chosen))
    assert_near(logits, reference.logits)
    assert_moved(logits, plain(model))


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss", "llama4", "jamba", "phimoe", "granite_moe"])
def test_reroute_takes_the_route_of_the_router_with_the_expert_shut_out(name: str) -> None:
    model = opened(name)
    gone = busiest(model)
    shut = torch.zeros(8)
    shut[gone] = float("-inf")
    rerouted = see(model, ablate_experts(model.moe, model.last, gone, mode="reroute"), model.last)[1]
    biased = see(model, bias_router(model.moe, model.last, shut), model.last)[1]
    assert torch.equal(rerouted["expert_indices"], biased["expert_indices"])
    if name not in ("olmoe", "jamba", "phimoe"):  # theirs are shares of all experts, the ablated ones included
        assert_near(rerouted["expert_weights"], biased["expert_weights"])


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_reroute_never_brings_an_expert_back_where_the_group_limit_leaves_too_few(name: str) -> None:
    model = opened(name)
    gone = [0, 1, 2, 3, 4, 6]
    routes = see(model, ablate_experts(model.moe, model.last, gone, mode="reroute"), model.last)[1]["expert_indices"]
    assert set(routes.flatten().tolist()) <= {5, 7, -1}
    assert routes.flatten(0, 1).tolist() == [route[: routes.shape[-1]] for route in rerouted_by_hand(model, gone)]
    assert (routes == -1).any()


def test_a_hash_layer_keeps_the_experts_of_its_table() -> None:
    model = opened("deepseek_v4")
    gone = busiest(model)
    native = see(model, [], 0)[1]["expert_indices"]
    routes = see(model, ablate_experts(model.moe, 0, gone, mode="reroute"), 0)[1]["expert_indices"]
    kept = native.masked_fill(torch.isin(native, torch.tensor(gone)), -1)
    for before, after in zip(kept.flatten(0, 1).tolist(), routes.flatten(0, 1).tolist()):
        assert {e for e in before if e >= 0} <= set(after)
        assert not set(after) & {*gone, -1}


def test_tokens_that_do_not_use_the_experts_keep_their_route_and_their_output() -> None:
    for mode in ("zero", "mean", "resample", "reroute"):
        for name in ("olmoe", "llama4", "deepseek_v3"):
            model = opened(name)
            hooks = ablate_experts(model.moe, model.last, busiest(model, 1), mode=mode)
            others = ~users(model, busiest(model, 1))
            assert others.any()
            assert (~others).any()
            before, after = (
                see(model, h, model.last, "routed_out", "expert_out")[1]["routed_out"] for h in ([], hooks)
            )
            assert_near(after[others], before[others])
            moved = (after != before).any(-1)
            assert moved[~others].any()


def test_an_expert_that_nobody_uses_can_be_ablated_in_every_mode() -> None:
    model = opened("olmoe")
    token = TOKENS[:1, :1]
    unused = (set(range(8)) - set(see(model, [], 1, tokens=token)[1]["expert_indices"].flatten().tolist())).pop()
    expected = plain(model, token)
    for mode in ("zero", "mean", "resample", "reroute"):
        assert_near(run(model, ablate_experts(model.moe, 1, unused, mode=mode), token), expected, 2e-6)
