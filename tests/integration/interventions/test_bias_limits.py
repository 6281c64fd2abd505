"""A bias on the logits warns exactly where the family ranks by something that it cannot move far enough."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_interp.arch.rules import HashTable, RoutingRule, ScoreRule, SigmoidTopK, SoftmaxTopK
from moe_interp.interventions import bias_router
from moe_interp.interventions.reach import limits
from moe_interp.interventions.router import BiasLimitWarning
from tests import tiny
from tests.integration.interventions.support import opened, see

FAR = 60.0
MANY = tiny.random_tokens(4, 40, seed=3)


def one(expert: int, value: float) -> Tensor:
    return torch.zeros(8).index_fill(0, torch.tensor([expert]), value)


ANYWHERE = 8 * torch.randn(8_000, 8, generator=torch.Generator().manual_seed(0))  # scores of nearly 0, or nearly 1


def share(rule: RoutingRule, expert: int, value: float) -> float:
    """Of tokens with logits all over the range, and just beside the expert's own score, how many use it."""
    logits = ANYWHERE
    if isinstance(rule, SigmoidTopK) and rule.score is torch.sigmoid and rule.bias is not None:
        at_limit = float(value > 0) + rule.bias[expert] - rule.bias + (1e-4 if value > 0 else -1e-4)
        ends = torch.stack([torch.full((8,), -40.0), torch.full((8,), 40.0), at_limit.clamp(1e-6, 1 - 1e-6).logit()])
        choice = torch.cartesian_prod(*[torch.arange(3)] * 8)
        logits = torch.cat([logits, ends.gather(0, choice)])
    return float((rule.route(logits + one(expert, value))[0] == expert).any(-1).float().mean())


def test_limits_are_where_some_token_does_not_follow_and_only_there(family: str) -> None:
    model = opened(family)
    for layer in model.labels:
        rule = model.moe.spec(layer).rule
        if isinstance(rule, HashTable) or family in tiny.ENCODER_DECODERS:
            continue
        experts = range(8) if isinstance(rule, ScoreRule) and rule.bias is not None else (2, 5)
        found_up, found_down = (
            {e for e in range(8) if getattr(limits(rule, one(e, sign).double()), side)}
            for side, sign in (("up", 1.0), ("down", -1.0))
        )
        for expert in experts:
            assert (share(rule, expert, FAR) < 1.0) == (expert in found_up), (layer, expert)
            assert (share(rule, expert, -FAR) > 0.0) == (expert in found_down), (layer, expert)


RANKED_BY_LOGITS = [
    "mixtral",
    "olmoe",
    "flex_olmo",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "qwen3_5_moe_vl",
    "qwen3_vl_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v2_greedy",
    "phimoe",
    "granite_moe",
    "granite_moe_hybrid",
    "jamba",
    "jetmoe",
    "llama4",
    "llama4_vl",
    "switch_transformers",
    "gemma4_text",
    "gemma4",
]


def test_families_that_rank_by_their_logits_never_warn(family: str) -> None:
    model = opened(family)
    layer = model.last
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for expert in range(8):
            for value in (50.0, -50.0, 0.5, float("-inf")):
                bias_router(model.moe, layer, one(expert, value))
        bias_router(model.moe, layer, torch.zeros(8))
    assert (not caught) == (family in RANKED_BY_LOGITS)
    assert all(w.category is BiasLimitWarning for w in caught)


@pytest.mark.parametrize("name", ["deepseek_v3", "lfm2_moe", "minimax_m2", "ernie4_5_moe", "laguna", "deepseek_v4"])
def test_the_warning_names_the_experts_and_tokens_of_the_model_bear_it_out(name: str) -> None:
    model = opened(name)
    rule = model.moe.spec(model.last).rule
    for expert in range(8):
        up, down = (getattr(limits(rule, one(expert, s).double()), side) for side, s in (("up", 1.0), ("down", -1.0)))
        for value, text, some in ((FAR, "tokens use expert", up), (-FAR, "no token uses expert", down)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                hooks = bias_router(model.moe, model.last, one(expert, value))
                used = (see(model, hooks, model.last, tokens=MANY)[1]["expert_indices"] == expert).any(-1)
            assert len(caught) == bool(some)  # once a call, and none when it runs
            if some:
                assert f"({name}" in str(caught[0].message)
                assert f"a bias cannot ensure that {text} {expert} (" in str(caught[0].message)
            else:
                assert used.float().mean() == float(value > 0)


def test_a_hash_layer_says_that_its_choice_does_not_move() -> None:
    model = opened("deepseek_v4")
    native = see(model, [], 0)[1]
    with pytest.warns(BiasLimitWarning, match=r"layer 0 \(deepseek_v4\) chooses experts by token id.*never the choice"):
        hooks = bias_router(model.moe, 0, one(3, 50.0))
    biased = see(model, hooks, 0)[1]
    assert torch.equal(biased["expert_indices"], native["expert_indices"])
    assert not torch.equal(biased["expert_weights"], native["expert_weights"])


def test_limits_of_rules_by_hand() -> None:
    plain = SigmoidTopK(n_experts=4, top_k=1)
    added = torch.tensor([1.0, 0, 0, -1], dtype=torch.float64)
    assert limits(plain, added).up == {}
    # expert 0 reaches 1.0; expert 1 reaches 1.5
    biased = replace(plain, bias=torch.tensor([0.0, 0.5, 0.0, 0.0]))
    assert list(limits(biased, added).up) == [0]
    assert limits(biased, added).down == {}
    # expert 3 keeps 2.0, which no other is sure to have
    kept = replace(plain, bias=torch.tensor([0.0, 0.0, 0.0, 2.0]))
    assert list(limits(kept, added).down) == [3]
    assert list(limits(kept, added).up) == [0]
    # softmax: the one promoted expert has all of the mass, so that small correction biases cannot stop it
    softmax = SoftmaxTopK(n_experts=4, top_k=1, bias=torch.tensor([0.0, 0.9, 0.0, 0.0]))
    assert limits(softmax, added).up == {}
    assert list(limits(replace(softmax, bias=torch.tensor([0.0, 1.1, 0, 0])), added).up) == [0]
    # two groups of two, of which one is open: nothing is sure of an expert whose group may be shut
    grouped = SigmoidTopK(n_experts=4, top_k=1, n_groups=2, top_groups=1, group_score="top2")
    assert limits(grouped, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)).up == {0: "its group can be shut"}
    assert limits(replace(grouped, top_k=2), torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)).up == {}
    assert limits(replace(grouped, top_groups=2), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)).up == {}
    # promoting or suppressing more experts than a token can use or leave out says nothing about the family
    shared = SoftmaxTopK(n_experts=4, top_k=2, n_groups=2, top_groups=1, group_score="max", excluded_score=0.0)
    assert limits(shared, torch.tensor([1.0, 1, 1, -1], dtype=torch.float64)).up == {}
    assert list(limits(shared, torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)).up) == [0, 2]
    assert list(limits(biased, torch.tensor([-1.0, -1, -1, -1], dtype=torch.float64)).down) == [1]
