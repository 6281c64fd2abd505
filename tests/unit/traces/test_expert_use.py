"""Load, co-activation, transitions, saturation and the standing committee."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import entropy, rankdata

from moe_interp.errors import ConfigError, DataError
from moe_interp.traces import RoutingTrace, co_activation, load, saturation, standing_committee, transitions
from tests.unit.traces.planted import planted_trace, routes


def test_load_by_hand():
    data = load(RoutingTrace.from_arrays([[[0, 1]], [[-1, -1]], [[2, -1]], [[0, 2]]], n_experts=4))
    assert data["share"].values.tolist() == [[0.4, 0.2, 0.4, 0.0]]
    assert data["max_violation"].item() == pytest.approx(0.4 / 0.25 - 1)
    assert data["dead_experts"].item() == 1
    assert data["dropped_tokens"].item() == 0.25
    assert data["dropped_slots"].item() == 3 / 8


def test_load_agrees_with_scipy_entropy():
    trace = planted_trace()
    np.testing.assert_allclose(load(trace)["entropy"], entropy(trace.counts()[0], axis=1), rtol=1e-12)
    np.testing.assert_allclose(load(trace)["effective_experts"], np.exp(load(trace)["entropy"]) / 6)


def test_co_activation_by_hand_counts_all_pairs_of_slots():
    # ranks 0 and 2 of the first token are not adjacent, and count
    data = co_activation(RoutingTrace.from_arrays([[[0, 1, 2]], [[0, 3, -1]]], n_experts=5))["co_activation"][0]
    assert data[0].values.tolist() == [1.0, 0.5, 0.5, 0.5, 0.0]
    assert data[2].values.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert np.isnan(data[4]).all()


def test_co_activation_and_transitions_agree_with_loops_over_sets():
    trace = planted_trace()
    first, second = routes(trace, 0), routes(trace, 1)
    together, following = np.zeros((6, 6)), np.zeros((6, 6))
    for one, two in zip(first, second):
        for i in one:
            for j in range(6):
                together[i, j] += j in one
                following[i, j] += j in two
    data = co_activation(trace)
    np.testing.assert_allclose(data["co_activation"][0], together / np.diag(together)[:, None])
    np.testing.assert_array_equal(data["tokens"][0], np.diag(together))
    probability = transitions(trace)["probability"]
    assert probability["layer"].values.tolist() == [2]
    np.testing.assert_allclose(probability[0], following / following.sum(1, keepdims=True))


def test_saturation_by_hand():
    final = RoutingTrace.from_arrays([[[0, 1]], [[2, 3]], [[-1, -1]]], n_experts=4)
    now = RoutingTrace.from_arrays([[[1, 2]], [[3, 2]], [[0, 1]]], n_experts=4)
    # the order of the slots does not matter
    assert saturation(now, final)["saturation"].item() == pytest.approx((0.5 + 1) / 2)
    assert saturation(now, final)["chance"].item() == pytest.approx(2 / 4)
    trace = planted_trace()
    np.testing.assert_allclose(saturation(trace, trace)["saturation"], 1, rtol=1e-12)
    nothing = RoutingTrace.from_arrays(np.full((3, 1, 2), -1), n_experts=4)
    assert np.isnan(saturation(now, nothing)["saturation"])


def test_independent_routes_saturate_at_chance():
    data = saturation(planted_trace(1, 8000, empty=0.3), uniform_trace(2, 8000))
    np.testing.assert_allclose(data["saturation"], data["chance"], atol=0.015)


def uniform_trace(seed, n_tokens):
    indices = np.random.default_rng(seed).random((n_tokens, 2, 6)).argsort(axis=-1)[..., :3]
    return RoutingTrace.from_arrays(indices, n_experts=6, layers=[2, 3])


def test_saturation_needs_the_same_tokens():
    trace = planted_trace()
    for other in (planted_trace(n_tokens=80), planted_trace(n_experts=7), planted_trace(seed=1)):
        with pytest.raises(DataError, match="the same tokens, layers and experts"):
            saturation(trace, other)


def test_the_committee_by_hand():
    # expert 0 serves both domains, 1 only a, 2 only b; 3 and 4 nobody
    trace = RoutingTrace.from_arrays([[[0, 1]], [[0, 1]], [[0, 2]], [[0, 2]]], n_experts=5, domain=list("aabb"))
    data = standing_committee(trace)
    assert data["rank"].sel(domain="a").values.tolist() == [[1.5, 1.5, 4, 4, 4]]
    assert data["presence"].values.tolist() == [[1.0, 0.5, 0.5, 0, 0]]
    assert data["member"].values.tolist() == [[True, False, False, False, False]]
    assert data["mean_rank"].values.tolist() == [[1.5, 2.75, 2.75, 4, 4]]
    assert data["rank_variance"].values.tolist() == [[0, 1.5625, 1.5625, 0, 0]]
    assert data["committee_share"].item() == 0.5
    assert standing_committee(trace, presence=0.5)["committee_share"].item() == 1.0
    for changes in ({"top": 0}, {"top": 6}, {"presence": 0}):
        with pytest.raises(ConfigError, match="top from 1 to 5"):
            standing_committee(trace, **changes)


def test_committee_ranks_agree_with_scipy():
    trace = planted_trace()
    counts = trace.counts(trace.domain_codes, 3)
    np.testing.assert_array_equal(standing_committee(trace)["rank"], rankdata(-counts, axis=-1))


def test_transitions_need_two_layers():
    with pytest.raises(DataError, match="A trace of 1 layer"):
        transitions(planted_trace(n_layers=1))


@pytest.mark.parametrize("measure", [load, co_activation, transitions, standing_committee])
def test_wider_empty_slots_and_renamed_experts_change_nothing(measure):
    trace = planted_trace()
    wide = np.pad(trace.expert_indices, ((0, 0), (0, 0), (0, 2)), constant_values=-1)
    options = {"top": 3} if measure is standing_committee else {}
    same = ["dropped_slots"] if measure is load else []
    expected = measure(trace, **options).drop_vars(same)
    widened = RoutingTrace.from_arrays(wide, None, [30] * 4, 6, layers=trace.layers, domain=trace.domain)
    xr.testing.assert_allclose(measure(widened, **options).drop_vars(same), expected)
    order = np.append(np.random.default_rng(0).permutation(6), -1)
    renamed = RoutingTrace.from_arrays(order[wide], None, [30] * 4, 6, layers=trace.layers, domain=trace.domain)
    found = measure(renamed, **options).drop_vars(same)
    for axis in set(found.dims) & {"expert", "other", "next_expert"}:
        found = found.isel({axis: order[:6]}).assign_coords({axis: np.arange(6)})
    xr.testing.assert_allclose(found, expected)
