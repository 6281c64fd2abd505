"""Vocabulary, domains, paths, norms, margins and comparisons: by hand, by loops, and under renamed experts."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import xarray as xr
from scipy import stats as scipy_stats

from moe_interp.errors import ConfigError, DataError
from moe_interp.traces import (
    RoutingCounts,
    RoutingTrace,
    co_activation,
    domain_differences,
    domain_specialization,
    expert_norms,
    expert_paths,
    load,
    risk_difference,
    router_margin,
    saturation,
    transitions,
    usage_correlation,
    vocabulary_specialization,
)
from moe_interp.traces.measures.load_intervals import load_intervals
from moe_interp.traces.measures.paths import path_clusters
from tests.unit.traces.planted import planted_trace, routes

LABELS = ["law", "code"] * 6


def rich_trace(seed=0, n_sequences=12, length=20, n_layers=4, n_experts=6, k=3, labels=LABELS):
    """Routes of several sequences with everything recorded; domain ``code`` prefers expert 0 at the first layer."""
    rng = np.random.default_rng(seed)
    n = n_sequences * length
    logits = rng.normal(size=(n, n_layers, n_experts)).astype(np.float32)
    sequence = np.repeat(np.arange(n_sequences), length)
    logits += rng.normal(size=(n_sequences, n_layers, n_experts))[sequence].astype(np.float32)
    logits[np.isin(sequence, [i for i, x in enumerate(labels) if x == "code"]), 0, 0] += 3
    indices = (-logits).argsort(axis=-1)[..., :k]
    return RoutingTrace.from_arrays(
        indices,
        np.take_along_axis(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), indices, -1),
        [length] * n_sequences,
        n_experts,
        layers=range(3, 3 + n_layers),
        domain=labels,
        token_ids=rng.integers(0, 9, n),
        predicted_ids=rng.integers(0, 5, n),
        expert_norms=rng.random(indices.shape).astype(np.float32),
        router_logits=logits,
    )


def renamed(trace, order):
    """The same routes with expert e called order[e]."""
    arrays = trace.arrays()
    arrays["expert_indices"] = np.append(order, -1)[trace.expert_indices]
    arrays["router_logits"] = trace.router_logits[..., np.argsort(order)]
    return RoutingTrace.from_arrays(**arrays)


MEASURES = {
    "load": load,
    "load intervals": load_intervals,
    "domains": domain_specialization,
    "differences": lambda source: domain_differences(source, 99),
    "input": vocabulary_specialization,
    "next": lambda source: vocabulary_specialization(source, "next", 5),
    "predicted": lambda source: vocabulary_specialization(source, "predicted"),
    "pairs": co_activation,
    "adjacent": lambda source: co_activation(source, "adjacent"),
    "transitions": transitions,
    "norms": expert_norms,
    "margin": router_margin,
    "paths": lambda source: expert_paths(source, top=4).drop_vars(["path", "cluster", "expected"]),
}


@pytest.mark.parametrize("name", MEASURES)
def test_renamed_experts_rename_the_measure(name):
    trace, order = rich_trace(), np.random.default_rng(5).permutation(6)
    expected, found = MEASURES[name](trace), MEASURES[name](renamed(trace, order))
    for axis in set(found.dims) & {"expert", "other", "next_expert"}:
        found = found.isel({axis: order}).assign_coords({axis: np.arange(6)})
    if "expert" in found.data_vars:  # ties of an id's modal expert are broken by the smallest id
        found, expected = found.drop_vars("expert"), expected.drop_vars("expert")
    xr.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", MEASURES)
def test_counts_in_parts_give_what_the_whole_trace_gives_exactly(name):
    trace = rich_trace()
    counts = RoutingCounts(trace.layers, 6)
    for low, high in ((0, 5), (5, 6), (6, 12)):
        counts.update(trace.select((trace.sequence >= low) & (trace.sequence < high)))
    xr.testing.assert_identical(MEASURES[name](counts), MEASURES[name](trace))


def test_next_ids_by_hand_do_not_cross_sequences():
    indices = [[[0]], [[1]], [[0]], [[2]]]
    trace = RoutingTrace.from_arrays(indices, None, [3, 1], 3, token_ids=[5, 6, 6, 7])
    data = vocabulary_specialization(trace, "next", min_count=1)
    # expert 0 reads 5 before 6, expert 1 reads 6 before 6; the last token of a sequence has no next
    assert data["token_id"].values.tolist() == [6]
    assert data["occurrences"].values.tolist() == [[2]]
    assert data["specialization"].item() == 0.5
    with pytest.raises(DataError, match="no such ids"):
        vocabulary_specialization(RoutingTrace.from_arrays([[[0]]], n_experts=1, token_ids=[3]), "next", 1)


def test_vocabulary_of_random_routes_is_at_chance():
    rng = np.random.default_rng(0)
    indices = rng.choice(8, p=[0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05], size=(6000, 2, 1))
    trace = RoutingTrace.from_arrays(indices, n_experts=8, token_ids=rng.zipf(1.5, 6000) % 200)
    data = vocabulary_specialization(trace)
    np.testing.assert_allclose(data["specialization"], data["chance"], atol=0.03)


def test_rank_adjacent_pairs_by_hand():
    data = co_activation(RoutingTrace.from_arrays([[[0, 1, 2]], [[0, 3, -1]]], n_experts=5), "adjacent")
    # as the published script: both orders of neighbours in rank, over the tokens of the first
    assert data["co_activation"][0, 0].values.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]
    assert data["co_activation"][0, 1].values.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="pairs='neighbours'"):
        co_activation(planted_trace(), "neighbours")


def test_pairs_of_independent_places_are_at_chance():
    rng = np.random.default_rng(0)
    keys = rng.gumbel(size=(20000, 1, 6)) + np.array([1.0, 0.5, 0, 0, -0.5, -1.0])
    data = co_activation(RoutingTrace.from_arrays((-keys).argsort(-1)[..., :2], n_experts=6))
    assert float(np.abs(data["co_activation"] - data["chance"]).max()) < 0.04  # the k largest: near the law of chance
    np.testing.assert_allclose(data["chance"].sum("other"), 2, rtol=1e-12)  # itself, and k - 1 others


def test_transitions_tell_nothing_between_independent_layers_and_all_between_equal_ones():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, (8000, 1))
    same = RoutingTrace.from_arrays(np.stack([first, first], 1), n_experts=4)
    assert transitions(same)["information"].item() == pytest.approx(load(same)["entropy"][0].item())
    apart = RoutingTrace.from_arrays(np.stack([first, rng.integers(0, 4, (8000, 1))], 1), n_experts=4)
    assert transitions(apart)["information"].item() == pytest.approx(9 / 16000, abs=1e-3)


def test_domain_differences_by_hand_and_by_all_arrangements():
    # four sequences of unequal length; expert 0 serves domain a alone
    trace = RoutingTrace.from_arrays([[[0]]] * 3 + [[[1]]] * 3, None, [1, 2, 1, 2], 3, domain=["a", "a", "b", "b"])
    data = domain_differences(trace, n_permutations=1999)
    assert data["difference"].sel(domain="a").values.tolist() == [[1.0, -1.0, 0.0]]
    # of 6 arrangements, two are as extreme
    np.testing.assert_allclose(data["p"].sel(domain="a", expert=[0, 1]), 1 / 3, atol=0.04)
    assert np.isnan(data["p"].sel(expert=2)).all()
    assert data["information"].item() == pytest.approx(np.log(2))
    assert data.attrs["smallest_p"] == pytest.approx(1 / 6)
    shares = []
    lengths, served = np.array([1, 2, 1, 2]), np.array([1, 2, 0, 0])
    for chosen in combinations(range(4), 2):
        inside = np.isin(np.arange(4), chosen)
        shares.append(served[inside].sum() / lengths[inside].sum() - served[~inside].sum() / lengths[~inside].sum())
    exact = np.mean(np.abs(shares) >= 1 - 1e-9)
    assert data["p"].sel(domain="a", expert=0).item() == pytest.approx(exact, abs=0.04)


def test_a_planted_difference_is_found_at_its_layer_alone():
    data = domain_differences(rich_trace(n_sequences=24, labels=LABELS * 2), n_permutations=1999)
    found = np.argwhere(data["q"].values <= 0.05)
    assert [0, 0, 0] in found.tolist()
    assert set(found[:, 1].tolist()) == {0}
    assert data["information_p"].values.argmin() == 0


def test_labels_permuted_over_sequences_keep_the_level_where_tokens_would_not():
    """Sequences that differ among themselves, labels that say nothing: at most about 5% of data sets reject."""
    rejected = by_tokens = 0
    for seed in range(60):
        labels = np.random.default_rng(100 + seed).permutation(["a", "b"] * 5).tolist()
        trace = rich_trace(seed, 10, 20, 1, 4, 1, labels)
        rejected += float(domain_differences(trace, 199, seed)["information_p"][0]) <= 0.05
        table = trace.counts(trace.domain_codes, 2)[:, 0]
        by_tokens += scipy_stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue <= 0.05
    assert rejected <= 8  # 60 draws at .05: more with probability .006
    assert by_tokens >= 30  # tokens taken as independent: wrong more often than not


@pytest.mark.parametrize(
    ("trace", "text"),
    [
        (RoutingTrace.from_arrays([[[0]]] * 4, None, [2, 2], 2), "without domain labels"),
        (RoutingTrace.from_arrays([[[0]]] * 4, None, [2, 2], 2, domain="x"), "single domain 'x'"),
        (RoutingTrace.from_arrays([[[0]]] * 4, None, [4], 2, domain=list("aabb")), "tokens of several domains"),
        (RoutingTrace.from_arrays([[[0]]] * 4, None, [2, 2], 2, domain=["a", "b"]), "permuted over sequences"),
    ],
)
def test_a_null_over_sequences_needs_sequences_and_domains(trace, text):
    with pytest.raises(DataError, match=text):
        domain_differences(trace)


def test_paths_agree_with_a_loop():
    trace = rich_trace()
    data = expert_paths(trace, 3, top=5)
    first = trace.expert_indices[..., 0]
    for window in range(2):
        steps = first[:, window : window + 3]
        counts = Counter(map(tuple, steps.tolist()))
        most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
        assert [tuple(path) for path in data["path"][window].values.tolist()] == [path for path, _ in most]
        assert data["count"][window].values.tolist() == [n for _, n in most]
        use = [np.bincount(step, minlength=6) / 240 for step in steps.T]
        expected = [np.prod([u[e] for u, e in zip(use, path)]) for path, _ in most]
        np.testing.assert_allclose(data["expected"][window], expected)
        everything = np.sort(np.einsum("i,j,k->ijk", *use).ravel())[::-1]
        assert data["covered_expected"][window].item() == pytest.approx(everything[:5].sum())
        assert data["covered"][window].item() == pytest.approx(sum(n for _, n in most) / 240)
        assert data["distinct"][window].item() == len(counts)
        joint = scipy_stats.entropy(list(counts.values()))
        assert data["information"][window].item() == pytest.approx(sum(map(scipy_stats.entropy, use)) - joint)
    with pytest.raises(DataError, match="4 layers"):
        expert_paths(trace, 5)
    with pytest.raises(DataError, match="counts of paths of 3 layers"):
        expert_paths(RoutingCounts.of(trace), 2)


def test_clusters_of_paths_by_hand():
    paths = np.array([[0, 1, 2], [5, 5, 5], [0, 1, 3], [5, 4, 5], [0, 2, 3]])
    # 0 1 2 and 0 1 3 differ at one layer; 0 2 3 differs from 0 1 2 at two
    assert path_clusters(paths).tolist() == [0, 1, 0, 1, 2]
    assert path_clusters(paths[:1]).tolist() == [0]


def test_norms_and_saliency_by_hand():
    trace = RoutingTrace.from_arrays(
        [[[0, 1]], [[0, -1]]],
        [[[0.5, 0.25]], [[1.0, 0]]],
        [1, 1],
        3,
        expert_norms=[[[2.0, 8.0]], [[4.0, 0]]],
    )
    data = expert_norms(trace)
    np.testing.assert_array_equal(data["norm"], [[3.0, 8.0, np.nan]])
    np.testing.assert_array_equal(data["saliency"], [[(0.5 * 2 + 4) / 2, 2.0, np.nan]])
    assert data["saliency_low"][0, 0] < 2.5 < data["saliency_high"][0, 0]
    with pytest.raises(DataError, match="without expert_norms"):
        expert_norms(planted_trace())


def test_margins_by_hand():
    logits = [[[3.0, 1.0, 2.0]], [[0.0, 5.0, 1.0]]]
    trace = RoutingTrace.from_arrays(
        [[[0, 2]], [[0, 1]]], [[[0.7, 0.2]], [[0.1, 0.9]]], [1, 1], 3, router_logits=logits
    )
    data = router_margin(trace)
    # 2 - 1 in the first token; in the second the route leaves out a larger logit: 0 - 1
    assert data["margin"].item() == 0.0
    assert data["negative"].item() == 0.5
    assert data["smallest_weight"].item() == pytest.approx(0.15)
    assert "margin" not in router_margin(planted_trace())
    with pytest.raises(DataError, match="neither logits nor weights"):
        router_margin(RoutingTrace.from_arrays([[[0]]], n_experts=2))


def test_use_of_two_models_agrees_with_scipy():
    one, other = rich_trace(0), rich_trace(1)
    data = usage_correlation(one, other)
    assert data["domain"].values.tolist() == ["code", "law"]
    codes = one.domain_codes
    for layer in range(4):
        expected = scipy_stats.spearmanr(
            one.counts(codes, 2)[1, layer], other.counts(other.domain_codes, 2)[1, layer]
        ).statistic
        assert data["correlation"][1, layer].item() == pytest.approx(expected)
    with pytest.raises(DataError, match=r"layers \[3, 4, 7, 8\] of only one"):
        usage_correlation(planted_like(range(3, 7)), planted_like(range(5, 9)))
    with pytest.raises(DataError, match="6 and 5 experts"):
        usage_correlation(one, planted_trace(n_experts=5))


def planted_like(layers):
    return RoutingTrace.from_arrays(np.zeros((3, 4, 1), int), n_experts=2, layers=layers)


def test_risk_differences_of_pairs_and_sets_by_hand():
    def of(*tokens):
        return RoutingTrace.from_arrays([[[e]] for row in tokens for e in row], None, [len(row) for row in tokens], 2)

    a, b = of([0, 0], [0, 1, 1, 1], [0]), of([1], [1, 1], [0, 1])
    data = risk_difference(a, b, paired=True)
    # shares of expert 0 within sequences: 1, 1/4, 1 against 0, 0, 1/2
    assert data["difference"].values.tolist() == [[pytest.approx(7 / 12), pytest.approx(-7 / 12)]]
    assert data["p"][0, 0].item() == pytest.approx(2 / 8)
    assert data.attrs["smallest_p"] == 2 / 8
    sets = risk_difference(a, b)
    assert sets["p"][0, 0].item() == pytest.approx(
        scipy_stats.permutation_test(
            ([1, 0.25, 1], [0, 0, 0.5]), lambda x, y: np.mean(x) - np.mean(y), permutation_type="independent"
        ).pvalue
    )
    with pytest.raises(DataError, match="3 and 2 units that are paired"):
        risk_difference(a, of([0], [1]), paired=True)
    with pytest.raises(DataError, match="1 and 3 units"):
        risk_difference(of([0, 1]), b)


def test_token_by_token_needs_one_tokenizer_and_the_same_layers():
    one = rich_trace()
    arrays = one.arrays()
    other = RoutingTrace.from_arrays(**arrays | {"token_ids": one.token_ids + 1})
    with pytest.raises(DataError, match="token ids differ at 240 tokens, first at token 0: other texts, or another"):
        saturation(one, other)
    shifted = RoutingTrace.from_arrays(**arrays | {"layers": [4, 5, 6, 7]})
    with pytest.raises(DataError, match=r"layers \[3, 7\] of only one"):
        saturation(one, shifted)
    longer = RoutingTrace.from_arrays(**arrays | {"sequence_lengths": [10, 30, *[20] * 10], "domain": None})
    with pytest.raises(DataError, match="another tokenizer gives other tokens"):
        saturation(one, longer)


def test_saturation_bounds_hold_the_value_and_need_several_sequences():
    trace, final = rich_trace(0), rich_trace(1)
    final = RoutingTrace.from_arrays(**final.arrays() | {"token_ids": trace.token_ids})
    data = saturation(trace, final)
    assert (data["saturation_low"] < data["saturation"]).all()
    assert (data["saturation"] < data["saturation_high"]).all()
    expected = [
        np.mean([len(a & b) / 3 for a, b in zip(routes(trace, place), routes(final, place))]) for place in range(4)
    ]
    np.testing.assert_allclose(data["saturation"], expected)
    single = trace.select(trace.sequence == 0)
    assert np.isnan(saturation(single, single)["saturation_low"]).all()
