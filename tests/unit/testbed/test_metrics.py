"""Metrics of specialization and use, against cases worked out by hand and independent implementations."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import mutual_info_score

from moe_interp.errors import DataError
from moe_interp.testbed.metrics import (
    agreement,
    domain_losses,
    halves_by_sequence,
    mean_pairwise_jsd,
    metrics_over_training,
    normalized_mutual_information,
    routing_metrics,
    use_metrics,
)
from moe_interp.traces import RoutingTrace


def routed(tokens_per_domain, route, n_experts, n_sequences=4):
    """Each domain's sequences of one length; ``route(domain, token)`` gives the experts of the token."""
    routes, lengths, labels = [], [], []
    for domain, n_tokens in tokens_per_domain.items():
        for _ in range(n_sequences):
            lengths.append(n_tokens)
            labels.append(domain)
            routes += [route(domain, token) for token in range(n_tokens)]
    return RoutingTrace.from_arrays(
        np.array(routes)[:, None], sequence_lengths=lengths, n_experts=n_experts, domain=labels, layers=[3]
    )


SHARES = [{"a": 12, "b": 12}, {"a": 24, "b": 12}, {"a": 60, "b": 12, "c": 24}]
BLOCKS = {"a": [0, 1, 2], "b": [3, 4, 5], "c": [6, 7, 8]}


def reference(domain, token):
    first = token % 3
    return [BLOCKS[domain][first], BLOCKS[domain][(first + 1) % 3]]


def one(frame, name):
    assert len(frame) == 1
    return frame[name].item()


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("cross_fit", [True, False])
def test_the_reference_router_has_specialization_one(shares, cross_fit):
    frame = routing_metrics(routed(shares, reference, n_experts=3 * len(shares)), cross_fit=cross_fit)
    assert one(frame, "layer") == 3
    assert one(frame, "agreement") == pytest.approx(1, abs=1e-12)
    assert one(frame, "specialization") == pytest.approx(1, abs=1e-12)
    assert one(frame, "mutual_information") == pytest.approx(1, abs=1e-12)
    assert one(frame, "jsd") == pytest.approx(1, abs=1e-12)
    assert one(frame, "dead_experts") == 0
    if len(set(shares.values())) == 1:
        assert one(frame, "effective_experts") == pytest.approx(1)
        assert one(frame, "max_violation") == pytest.approx(0)
    # whatever the experts are called
    order = np.random.default_rng(0).permutation(3 * len(shares))
    renamed = routed(shares, lambda d, t: order[reference(d, t)].tolist(), n_experts=3 * len(shares))
    np.testing.assert_allclose(routing_metrics(renamed, cross_fit=cross_fit), frame, atol=1e-12)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("cross_fit", [True, False])
def test_uniform_routing_has_specialization_zero(shares, cross_fit):
    trace = routed(shares, lambda d, t: [t % 6, (t + 1) % 6], n_experts=6)
    frame = routing_metrics(trace, cross_fit=cross_fit)
    assert one(frame, "agreement") == pytest.approx(1 / len(shares))  # blocks of equal size hold an equal share
    assert one(frame, "specialization") == pytest.approx(0, abs=1e-12)
    assert one(frame, "mutual_information") == pytest.approx(0, abs=1e-12)
    assert one(frame, "jsd") == pytest.approx(0, abs=1e-12)
    assert one(frame, "effective_experts") == pytest.approx(1)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("cross_fit", [True, False])
def test_collapsed_routing_has_specialization_zero(shares, cross_fit):
    frame = routing_metrics(routed(shares, lambda d, t: [4], n_experts=6), cross_fit=cross_fit)
    assert one(frame, "agreement") == pytest.approx(max(shares.values()) / sum(shares.values()))
    assert one(frame, "specialization") == pytest.approx(0, abs=1e-12)
    assert one(frame, "mutual_information") == pytest.approx(0, abs=1e-12)
    assert one(frame, "effective_experts") == pytest.approx(1 / 6)
    assert one(frame, "max_violation") == pytest.approx(5)
    assert one(frame, "dead_experts") == 5


def test_half_specialised_routing_by_hand():
    # a: 3 of 4 slots at expert 0; b: 3 of 4 at expert 1. A = 3/4, A_ind = 1/2.
    found = agreement([[3, 1], [1, 3]], [[3, 1], [1, 3]], [1, 1])
    assert (found.agreement, found.independent, found.specialization) == pytest.approx((0.75, 0.5, 0.5))
    # a has 3/4 of the slots and uses both experts evenly, b only expert 1: q = (3/8, 5/8), pi = (3/4, 1/4).
    # A = 3/8 + 1/4 = 5/8; A_ind = max(9/32 + 5/32, 15/32 + 3/32) = 9/16; (1/16) / (7/16) = 1/7.
    found = agreement([[3, 3], [0, 2]], [[3, 3], [0, 2]], [1, 1])
    assert (found.agreement, found.independent, found.specialization) == pytest.approx((5 / 8, 9 / 16, 1 / 7))
    # matched on a half that says the opposite
    assert agreement([[0, 1], [1, 0]], [[3, 1], [1, 3]], [1, 1]).specialization == pytest.approx(-0.5)


@pytest.mark.parametrize("shares", [{"a": 12, "b": 12}, {"a": 36, "b": 12}])
def test_blocks_of_unequal_size(shares):
    blocks = {"a": 4, "b": 2}
    experts = {"a": [0, 2, 4, 5], "b": [1, 3]}
    trace = routed(shares, lambda d, t: [experts[d][t % blocks[d]]], n_experts=6)
    assert one(routing_metrics(trace, blocks), "specialization") == pytest.approx(1, abs=1e-12)
    # blocks of 3 and 3 cannot hold four experts of a: one of them, 1/4 of a's slots, falls outside
    share_a = shares["a"] / sum(shares.values())
    assert one(routing_metrics(trace), "agreement") == pytest.approx(1 - share_a / 4)
    uniform = routed(shares, lambda d, t: [t % 6], n_experts=6)
    assert one(routing_metrics(uniform, blocks), "specialization") == pytest.approx(0, abs=1e-12)
    collapsed = routed(shares, lambda d, t: [5], n_experts=6)
    assert one(routing_metrics(collapsed, blocks), "specialization") == pytest.approx(0, abs=1e-12)


def test_the_matching_is_the_best_of_all_matchings():
    rng = np.random.default_rng(1)
    slots = rng.integers(0, 30, (3, 6))
    found = agreement(slots, slots, [1, 2, 3])
    joint, q, pi = slots / slots.sum(), slots.sum(0) / slots.sum(), slots.sum(1) / slots.sum()
    seats = [0, 1, 1, 2, 2, 2]
    orders = [list(zip(seats, order)) for order in permutations(range(6))]
    assert found.agreement == pytest.approx(max(sum(joint[d, e] for d, e in order) for order in orders))
    assert found.independent == pytest.approx(max(sum(pi[d] * q[e] for d, e in order) for order in orders))


def test_matching_and_measuring_apart_removes_the_optimism_of_a_chosen_matching():
    rng = np.random.default_rng(2)
    fitted, crossed = [], []
    for _ in range(40):
        indices = rng.integers(0, 8, (64, 1, 1))  # independent of the domain
        trace = RoutingTrace.from_arrays(indices, None, [8] * 8, n_experts=8, domain=["a", "b"] * 4)
        fitted.append(one(routing_metrics(trace, cross_fit=False), "specialization"))
        crossed.append(one(routing_metrics(trace), "specialization"))
    assert np.mean(fitted) > 0.15
    assert abs(np.mean(crossed)) < 3 * np.std(crossed) / np.sqrt(40)


def random_trace(seed=0, n_tokens=300, empty=0.2):
    rng = np.random.default_rng(seed)
    indices = rng.random((n_tokens, 2, 5)).argsort(axis=-1)[..., :2]
    domain = rng.choice(["a", "b", "c"], n_tokens, p=[0.6, 0.3, 0.1])
    indices[domain == "a", 0] = np.minimum(indices[domain == "a", 0], [[2, 4]])
    indices[..., 1][indices[..., 0] == indices[..., 1]] = -1
    indices[rng.random(indices.shape) < empty] = -1
    return RoutingTrace.from_arrays(indices, n_experts=5, domain=domain, sequence_lengths=[10] * (n_tokens // 10))


def test_mutual_information_agrees_with_scikit_learn():
    trace = random_trace()
    frame = routing_metrics(trace)
    for number in range(2):
        experts = trace.expert_indices[:, number]
        domains = np.broadcast_to(trace.domain_codes[:, None], experts.shape)[experts >= 0]
        experts = experts[experts >= 0]
        expected = mutual_info_score(domains, experts) / mutual_info_score(domains, domains)
        assert frame["mutual_information"][number] == pytest.approx(expected, rel=1e-10)
        assert 0 < expected < 1


def test_jensen_shannon_divergence_agrees_with_scipy():
    slots = random_trace().counts(random_trace().domain_codes, 3)[:, 0]
    pairs = [jensenshannon(slots[i], slots[j], base=2) ** 2 for i, j in [(0, 1), (0, 2), (1, 2)]]
    assert mean_pairwise_jsd(slots) == pytest.approx(np.mean(pairs), rel=1e-10)
    # by hand: (1, 0) and (1/2, 1/2) have H(3/4, 1/4) - 1/2 = .311278 bits between them
    assert mean_pairwise_jsd([[7, 0], [2, 2]]) == pytest.approx(0.3112781244591328)


def test_empty_slots_are_skipped_and_counted_as_dropped():
    indices = [[[0, 1]], [[-1, -1]], [[2, -1]], [[0, 2]]]
    frame = use_metrics(RoutingTrace.from_arrays(indices, n_experts=4))
    assert one(frame, "dropped_tokens") == 0.25
    assert one(frame, "dropped_slots") == 3 / 8
    assert one(frame, "dead_experts") == 1
    assert one(frame, "max_violation") == pytest.approx(2 / 1.25 - 1)
    q = np.array([2, 1, 2]) / 5
    assert one(frame, "effective_experts") == pytest.approx(np.exp(-(q * np.log(q)).sum()) / 4)
    trace = random_trace(empty=0.2)
    wider = np.pad(trace.expert_indices, ((0, 0), (0, 0), (0, 3)), constant_values=-1)
    widened = RoutingTrace.from_arrays(wider, None, trace.sequence_lengths, 5, domain=trace.domain)
    columns = ["specialization", "mutual_information", "jsd", "effective_experts", "max_violation", "dropped_tokens"]
    np.testing.assert_array_equal(routing_metrics(widened)[columns], routing_metrics(trace)[columns])


def test_a_domain_or_a_layer_without_any_slot_gives_no_number():
    assert np.isnan(normalized_mutual_information([[3, 1], [0, 0]]))
    assert np.isnan(mean_pairwise_jsd([[3, 1], [0, 0]]))
    assert mean_pairwise_jsd([[3, 1], [0, 0], [3, 1]]) == 0
    assert np.isnan(agreement([[3, 0], [0, 0]], [[3, 0], [0, 0]], [1, 1]).specialization)
    trace = RoutingTrace.from_arrays(np.full((4, 1, 1), -1), n_experts=2, domain=list("aabb"))
    frame = routing_metrics(trace)
    assert (
        frame[["specialization", "mutual_information", "jsd", "effective_experts", "max_violation"]]
        .isna()
        .to_numpy()
        .all()
    )
    assert one(frame, "dropped_tokens") == 1


def test_permuting_experts_or_sequences_changes_nothing():
    trace = random_trace()
    expected = routing_metrics(trace, cross_fit=False)
    order = np.append(np.random.default_rng(5).permutation(5), -1)
    renamed = RoutingTrace.from_arrays(
        order[trace.expert_indices], None, trace.sequence_lengths, n_experts=5, domain=trace.domain
    )
    np.testing.assert_allclose(routing_metrics(renamed, cross_fit=False), expected, atol=1e-12)
    parts = [trace.select(trace.sequence == number) for number in reversed(range(30))]
    np.testing.assert_allclose(routing_metrics(RoutingTrace.concatenate(parts), cross_fit=False), expected, atol=1e-12)


def test_halves_keep_sequences_whole_and_hold_every_domain():
    trace = RoutingTrace.from_arrays(np.zeros((10, 1, 1), int), None, [2, 3, 1, 4], n_experts=2, domain=list("aaba"))
    # a is in sequences 0, 1 and 3: the second of them makes the second half; b is in one only and is cut
    with pytest.raises(DataError, match="Domain 'b' with 1 token"):
        halves_by_sequence(trace)
    trace = trace.with_domain(list("aabb"))
    assert halves_by_sequence(trace).astype(int).tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    trace = trace.with_domain(["a"] * 5 + ["b"] * 4 + ["a"])
    second = halves_by_sequence(trace)
    assert second[5:9].astype(int).tolist() == [0, 1, 1, 1]
    single = RoutingTrace.from_arrays(np.zeros((5, 1, 1), int), n_experts=2, domain=list("aabbb"))
    assert halves_by_sequence(single).astype(int).tolist() == [0, 1, 0, 1, 1]


def test_metrics_over_training_stack_the_steps_in_order():
    late, early = random_trace(1), random_trace(2)
    frame = metrics_over_training({200: late, 100: early})
    assert frame["step"].tolist() == [100, 100, 200, 200]
    np.testing.assert_array_equal(frame[frame["step"] == 200].drop(columns="step"), routing_metrics(late))


def test_domain_losses_by_hand():
    frame = domain_losses([1.0, 3.0, np.nan, 5.0], ["a", "a", "a", "b"]).set_index("domain")
    assert frame.loc["a"].tolist() == [2, 2.0, 1.0]  # sd sqrt(2) over sqrt(2)
    assert frame.loc["b", "loss"] == 5
    with pytest.raises(DataError, match="one loss and one label per token"):
        domain_losses([1.0], ["a", "b"])


@pytest.mark.parametrize(
    ("domain", "n_experts", "blocks", "message"),
    [
        (None, 4, None, "A trace without domain labels"),
        ("a", 4, None, "in one domain, 'a'"),
        (list("abcd"), 3, None, "3 experts for 4 domains"),
        (list("aabb"), 4, {"a": 2, "c": 2}, "for domains a, b and 4 experts"),
        (list("aabb"), 4, {"a": 3, "b": 2}, "together at most 4"),
        (list("aabb"), 4, {"a": 4, "b": 0}, "a size of at least 1"),
        (list("abbb"), 4, None, "Domain 'a' with 1 token"),
    ],
)
def test_what_cannot_be_measured_is_refused(domain, n_experts, blocks, message):
    trace = RoutingTrace.from_arrays(np.zeros((4, 1, 1), int), n_experts=n_experts, domain=domain)
    with pytest.raises(DataError) as caught:
        routing_metrics(trace, blocks)
    assert message in str(caught.value)
