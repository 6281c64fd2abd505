"""Every rule on numbers small enough to compute by hand, with its invariants and its errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.arch.rules import (
    HashTable,
    RoutingRule,
    SigmoidTopK,
    SoftmaxTopK,
    SparseMixer,
    SwitchTop1,
    TopKSigmoid,
    TopKSoftmax,
)
from moe_interp.errors import RouteError

LN2 = math.log(2.0)
# softmax probabilities 8, 4, 2, 2 sixteenths; sigmoids 8/9, 4/5, 2/3, 2/3
LOGITS = torch.tensor([[3 * LN2, 2 * LN2, LN2, LN2]])


def route(rule: RoutingRule, logits: Tensor = LOGITS) -> tuple[list[Any], list[Any]]:
    indices, weights = rule.route(logits)
    return indices[0].tolist(), weights[0].tolist()


def expect(found: tuple[list[Any], list[Any]], indices: list[int], weights: list[float]) -> None:
    assert found[0] == indices
    assert found[1] == pytest.approx(weights, abs=1e-6)


def weigh(rule: RoutingRule, indices: list[int], logits: Tensor = LOGITS) -> list[float]:
    return rule.weights(logits, torch.tensor([indices]))[0].tolist()


# --- SoftmaxTopK ----------------------------------------------------------------------------------------------


def test_softmax_top_k() -> None:
    expect(route(SoftmaxTopK(n_experts=4, top_k=2)), [0, 1], [0.5, 0.25])
    expect(route(SoftmaxTopK(n_experts=4, top_k=2, normalize=True)), [0, 1], [2 / 3, 1 / 3])
    expect(route(SoftmaxTopK(n_experts=4, top_k=2, scale=1.5)), [0, 1], [0.75, 0.375])


def test_softmax_weights_of_any_set() -> None:
    plain, normalised = SoftmaxTopK(n_experts=4, top_k=2), SoftmaxTopK(n_experts=4, top_k=2, normalize=True)
    assert weigh(plain, [2, 0, 3]) == pytest.approx([0.125, 0.5, 0.125])
    assert weigh(normalised, [2, 0, 3]) == pytest.approx([1 / 6, 2 / 3, 1 / 6])
    assert weigh(normalised, [3]) == [1.0]


def test_a_correction_bias_chooses_but_does_not_weigh() -> None:
    rule = SoftmaxTopK(n_experts=4, top_k=2, normalize=True, bias=torch.tensor([0.0, 0.0, 0.0, 0.5]))
    expect(route(rule), [3, 0], [0.2, 0.8])  # choice 0.625 and 0.5; weights 1/8 and 1/2 of 5/8
    assert rule.choice_logits(LOGITS)[0].exp().tolist() == pytest.approx([0.5, 0.25, 0.125, 0.625])


def test_groups_by_their_maximum() -> None:
    # groups {0, 1} and {2, 3}: experts 2 and 3 are together better, expert 0 is the single best
    logits = torch.tensor([[0.40, 0.01, 0.30, 0.29]]).log()
    groups: dict[str, Any] = {"n_experts": 4, "top_k": 2, "n_groups": 2, "top_groups": 1}
    expect(route(SoftmaxTopK(**groups, group_score="max", excluded_score=0.0), logits), [0, 1], [0.40, 0.01])
    expect(route(SoftmaxTopK(**groups, group_score="top2"), logits), [2, 3], [0.30, 0.29])
    expect(route(SoftmaxTopK(n_experts=4, top_k=2), logits), [0, 2], [0.40, 0.30])
    excluded_score = SoftmaxTopK(**groups, group_score="max", excluded_score=0.0).choice_logits(logits)
    assert excluded_score[0, 2:].tolist() == [-math.inf, -math.inf]


def test_the_weight_of_an_expert_in_a_shut_group_is_its_own_score() -> None:
    groups: dict[str, Any] = {"n_experts": 4, "top_k": 2, "n_groups": 2, "top_groups": 1, "group_score": "max"}
    assert weigh(SoftmaxTopK(**groups, excluded_score=0.0), [2, 0]) == pytest.approx([0.125, 0.5])


def test_normalisation_is_clamped_by_a_floor() -> None:
    rule = SoftmaxTopK(n_experts=4, top_k=1, normalize=True, floor=0.4)
    assert weigh(rule, [1]) == pytest.approx([0.25 / 0.4])
    assert weigh(rule, [0]) == [1.0]


def test_expert_scales_come_after_normalisation() -> None:
    rule = SoftmaxTopK(n_experts=4, top_k=2, normalize=True, expert_scale=torch.tensor([2.0, 5.0, 7.0, 9.0]))
    expect(route(rule), [0, 1], [4 / 3, 5 / 3])


# --- SigmoidTopK and HashTable --------------------------------------------------------------------------------


def test_sigmoid_top_k() -> None:
    expect(route(SigmoidTopK(n_experts=4, top_k=2)), [0, 1], [8 / 9, 4 / 5])
    expect(route(SigmoidTopK(n_experts=4, top_k=2, normalize=True, scale=2.5)), [0, 1], [2.5 * 10 / 19, 2.5 * 9 / 19])
    biased = SigmoidTopK(n_experts=4, top_k=1, bias=torch.tensor([0.0, 0.0, 1.0, 0.0]))
    expect(route(biased), [2], [2 / 3])


def test_the_sum_gets_its_epsilon() -> None:
    assert weigh(SigmoidTopK(n_experts=4, top_k=1, normalize=True, eps=1 / 9), [0]) == pytest.approx([8 / 9])


def test_a_soft_cap_comes_before_the_score() -> None:
    rule = SigmoidTopK(n_experts=2, top_k=1, softcap=2.0)
    logits = torch.tensor([[2 * math.atanh(0.5), -1e9]])  # capped to 1 and -2
    assert rule.capped(logits)[0].tolist() == pytest.approx([1.0, -2.0])
    expect(route(rule, logits), [0], [1 / (1 + math.exp(-1))])
    assert weigh(rule, [1], logits) == pytest.approx([1 / (1 + math.exp(2))])


def test_the_block_s_scale_comes_after_the_cast() -> None:
    rule = SigmoidTopK(n_experts=4, top_k=1, dtype=torch.bfloat16, scale_after_cast=1.5)
    weights = rule.route(LOGITS)[1]
    assert weights.dtype == torch.bfloat16
    assert weights.item() == (torch.tensor(8 / 9, dtype=torch.bfloat16) * 1.5).item()


def test_an_own_score_function() -> None:
    rule = SigmoidTopK(n_experts=4, top_k=2, score=lambda z: z**2, normalize=True)
    expect(route(rule), [0, 1], [9 / 13, 4 / 13])
    policy = rule.log_policy(LOGITS).exp()[0].tolist()
    assert policy == pytest.approx([9 / 15, 4 / 15, 1 / 15, 1 / 15])


def test_hash_table_ignores_the_logits_for_the_choice() -> None:
    rule = HashTable(n_experts=4, top_k=2, table=torch.tensor([[0, 1], [3, 2]]), normalize=True)
    indices, weights = rule.route(LOGITS, torch.tensor([1]))
    assert indices.tolist() == [[3, 2]]
    assert weights[0].tolist() == [0.5, 0.5]
    with pytest.raises(RouteError, match=r"no token ids.*Expected: token_ids.*Pass the token ids"):
        rule.route(LOGITS)


# --- TopKSoftmax and TopKSigmoid ------------------------------------------------------------------------------


def test_top_k_softmax() -> None:
    rule = TopKSoftmax(n_experts=4, top_k=2)
    expect(route(rule), [0, 1], [2 / 3, 1 / 3])
    assert weigh(rule, [3, 1, 0]) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert weigh(rule, [2]) == [1.0]
    assert rule.scores(LOGITS) is None


def test_top_k_sigmoid() -> None:
    rule = TopKSigmoid(n_experts=4, top_k=1)
    expect(route(rule), [0], [8 / 9])
    assert weigh(rule, [1, 3]) == pytest.approx([4 / 5, 2 / 3])
    policy = rule.log_policy(LOGITS).exp()[0]
    sigmoids = torch.tensor([8 / 9, 4 / 5, 2 / 3, 2 / 3])
    torch.testing.assert_close(policy, sigmoids / sigmoids.sum())


# --- SparseMixer ----------------------------------------------------------------------------------------------


def test_sparse_mixer_by_hand() -> None:
    rule = SparseMixer(n_experts=4, top_k=2, jitter=0.1)
    logits = torch.tensor([[10.0, 9.0, 5.0, 4.5]])
    # slot 0: (10 - 9) / 10 = 0.1 <= 0.2 stays, 5 and 4.5 are masked: 1 / (1 + e^-1)
    # slot 1, without expert 0: (9 - 5) / 9 > 0.2 is masked, expert 1 stands alone
    expect(route(rule, logits), [0, 1], [1 / (1 + math.exp(-1)), 1.0])


def test_sparse_mixer_s_third_slot_leaves_out_the_first_two() -> None:
    rule = SparseMixer(n_experts=4, top_k=2, jitter=0.1)
    logits = torch.tensor([[10.0, 9.0, 5.0, 4.5]])
    third = 1 / (1 + math.exp(-0.5))  # (5 - 4.5) / 5 = 0.1 stays
    assert weigh(rule, [0, 1, 2], logits) == pytest.approx([1 / (1 + math.exp(-1)), 1.0, third])


def test_sparse_mixer_puts_a_forced_expert_in_the_place_of_the_maximum() -> None:
    rule = SparseMixer(n_experts=4, top_k=2, jitter=0.1)
    logits = torch.tensor([[10.0, 9.0, 5.0, 4.5]])
    # expert 3 alone: factors are max(|z|, 4.5), so (4.5 - z) / ... is negative for the larger ones: all stay
    stay = [math.exp(z) for z in (10.0, 9.0, 5.0, 4.5)]
    assert weigh(rule, [3], logits) == pytest.approx([stay[3] / sum(stay)])


def test_sparse_mixer_s_mask_divides_by_the_size_of_the_logit() -> None:
    rule = SparseMixer(n_experts=2, top_k=1, jitter=0.1)
    # factor max(|-4|, 1) = 4: (1 + 4) / 4 = 1.25 > 0.2 is masked
    expect(route(rule, torch.tensor([[1.0, -4.0]])), [0], [1.0])
    # factor max(|-10|, -9) = 10: (-9 + 10) / 10 = 0.1 stays, against (1 / 9 > 0.1 were it divided by the maximum)
    expect(route(rule, torch.tensor([[-9.0, -10.0]])), [0], [1 / (1 + math.exp(-1))])


# --- SwitchTop1 -----------------------------------------------------------------------------------------------


def test_switch_counts_capacity_along_the_sequence() -> None:
    rule = SwitchTop1(n_experts=2, top_k=1, capacity=2)
    first, second = [LN2, 0.0], [0.0, LN2]
    logits = torch.tensor([[first, second, first, first, second], [first] * 5])
    indices, weights = rule.route(logits)
    assert indices.squeeze(-1).tolist() == [[0, 1, 0, -1, 1], [0, 0, -1, -1, -1]]
    expected = torch.where(indices < 0, 0.0, 2 / 3)
    torch.testing.assert_close(weights, expected)
    given = rule.weights(logits[:1, :1], torch.tensor([[[1, 0]]]))
    assert given.flatten().tolist() == pytest.approx([1 / 3, 2 / 3])  # given experts bypass capacity


def test_switch_needs_whole_sequences() -> None:
    with pytest.raises(RouteError, match=r"shape \(2,\).*capacity is counted along the sequence.*whole sequences"):
        SwitchTop1(n_experts=2, top_k=1, capacity=2).route(torch.zeros(2))


# --- invariants, for every rule -------------------------------------------------------------------------------

RULES: dict[str, RoutingRule] = {
    "softmax": SoftmaxTopK(n_experts=8, top_k=3),
    "softmax normalised": SoftmaxTopK(n_experts=8, top_k=3, normalize=True, floor=1e-12, scale=1.5),
    "softmax grouped": SoftmaxTopK(
        n_experts=8, top_k=3, n_groups=4, top_groups=2, group_score="max", excluded_score=0.0, sorted_slots=False
    ),
    "softmax scaled": SoftmaxTopK(n_experts=8, top_k=3, normalize=True, expert_scale=torch.linspace(0.5, 2, 8)),
    "sigmoid": SigmoidTopK(n_experts=8, top_k=3, bias=torch.linspace(-1, 1, 8), normalize=True, eps=1e-20, scale=2.5),
    "sigmoid grouped": SigmoidTopK(n_experts=8, top_k=3, n_groups=4, top_groups=2, group_score="top2", normalize=True),
    "capped": SigmoidTopK(n_experts=8, top_k=3, softcap=5.0, normalize=True, scale_after_cast=1.5),
    "top-k softmax": TopKSoftmax(n_experts=8, top_k=3),
    "top-k sigmoid": TopKSigmoid(n_experts=8, top_k=3),
    "sparse mixer": SparseMixer(n_experts=8, top_k=3, jitter=0.2),
    "switch": SwitchTop1(n_experts=8, top_k=1, capacity=2),
    "hash": HashTable(n_experts=8, top_k=3, table=torch.rand(5, 8).argsort(-1)[:, :3], normalize=True),
}


@pytest.fixture(params=RULES, ids=lambda name: name.replace(" ", "_"))
def rule(request: pytest.FixtureRequest) -> RoutingRule:
    return RULES[request.param]


def many_logits(seed: int = 0) -> Tensor:
    return 2 * torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed))


def many_routes(slots: int = 4, seed: int = 1) -> Tensor:
    return torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :slots]


def test_weights_follow_a_permutation_of_the_slots(rule: RoutingRule) -> None:
    logits, indices = many_logits(), many_routes()
    weights = rule.weights(logits, indices)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(rule.weights(logits, indices[..., order]), weights[..., order], rtol=1e-6, atol=1e-7)


def test_weights_follow_a_renaming_of_the_experts(rule: RoutingRule) -> None:
    logits, indices, names = many_logits(), many_routes(), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    weights, renamed = rule.weights(logits, indices), logits.clone()
    renamed[..., names] = logits
    if isinstance(rule, SoftmaxTopK) and rule.expert_scale is not None:
        scales = torch.empty(8)
        scales[names] = rule.expert_scale
        rule = dataclasses.replace(rule, expert_scale=scales)
    torch.testing.assert_close(rule.weights(renamed, names[indices]), weights, rtol=1e-6, atol=1e-7)


def test_an_empty_slot_weighs_nothing_and_is_as_if_it_were_not_there(rule: RoutingRule) -> None:
    logits, indices = many_logits(), many_routes()
    holed = indices.clone()
    holed[:, :, 1] = -1
    weights = rule.weights(logits, holed)
    assert (weights[..., 1] == 0).all()
    without = rule.weights(logits, indices[..., [0, 2, 3]])
    torch.testing.assert_close(weights[..., [0, 2, 3]], without, rtol=1e-6, atol=1e-7)


def test_a_token_without_experts_has_weights_zero_not_nan(rule: RoutingRule) -> None:
    indices = many_routes()
    indices[0] = -1
    weights = rule.weights(many_logits(), indices)
    assert (weights[0] == 0).all()
    assert (weights[1:] > 0).all()
    torch.testing.assert_close(weights[1:], rule.weights(many_logits()[1:], indices[1:]), rtol=0, atol=0)


def test_a_route_is_weighed_as_if_it_were_given(rule: RoutingRule) -> None:
    logits, token_ids = many_logits(), torch.arange(24).reshape(4, 6) % 5
    indices, weights = rule.route(logits, token_ids)
    assert torch.equal(rule.weights(logits, indices), weights)
    if rule.has_scores and not isinstance(rule, HashTable):
        again = rule.route_scores(rule.scores(logits))
        assert torch.equal(again[0], indices)
        assert torch.equal(again[1], weights)
        assert torch.equal(rule.weights_from_scores(rule.scores(logits), indices), weights)


def test_log_policy_is_a_distribution(rule: RoutingRule) -> None:
    policy = rule.log_policy(many_logits())
    torch.testing.assert_close(policy.exp().sum(-1), torch.ones(4, 6))
    assert torch.isfinite(rule.log_policy(torch.tensor([[1e4, -1e4] + [0.0] * 6]))).all()


def test_inputs_are_left_as_they_were(rule: RoutingRule) -> None:
    logits, indices = many_logits(), many_routes()
    indices[0, 0, 1] = -1
    before = logits.clone(), indices.clone()
    rule.weights(logits, indices)
    rule.route(logits, torch.zeros(4, 6, dtype=torch.long))
    rule.choice_logits(logits)
    rule.log_policy(logits)
    assert torch.equal(logits, before[0])
    assert torch.equal(indices, before[1])


def test_errors_say_what_was_given_expected_and_to_do(rule: RoutingRule) -> None:
    with pytest.raises(RouteError, match=r"shape \(4, 6, 7\)\. Expected: 8 experts on the last axis\. Pass the full"):
        rule.weights(many_logits()[..., :7], many_routes())
    with pytest.raises(RouteError, match=r"shape \(4, 6, 7\)\. Expected: 8 experts"):
        rule.route(many_logits()[..., :7], torch.zeros(4, 6, dtype=torch.long))
    for bad in (8, -2):
        indices = many_routes()
        indices[1, 2, 0] = bad
        with pytest.raises(RouteError, match=rf"expert id {bad} in a route\. Expected: ids from 0 to 7, or -1"):
            rule.weights(many_logits(), indices)
    if not rule.has_scores:
        for call in (lambda: rule.route_scores(many_logits()), lambda: rule.weights_from_scores(many_logits(), None)):
            with pytest.raises(RouteError, match=r"scores for \w+, which computes none.*Edit router_logits instead"):
                call()
