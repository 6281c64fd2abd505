"""Domain and vocabulary specialization and ESFT scores, by hand, by loops and on the routing of a real model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from moe_interp.errors import ConfigError, DataError
from moe_interp.traces import (
    RoutingTrace,
    domain_specialization,
    esft_experts,
    esft_scores,
    vocabulary_specialization,
)
from tests.unit.traces.planted import planted_trace, routes

ROUTING = Path(__file__).parents[3] / "../shared/data/routing"


def test_domain_specialization_by_hand():
    trace = RoutingTrace.from_arrays([[[0, 1]], [[0, 2]], [[1, -1]], [[-1, -1]]], n_experts=3, domain=list("aabb"))
    data = domain_specialization(trace)
    assert data["share"].sel(domain="a").values.tolist() == [[1.0, 0.5, 0.5]]
    assert data["share"].sel(domain="b").values.tolist() == [[0.0, 0.5, 0.0]]
    assert data["baseline"].item() == pytest.approx(5 / 4 / 3)
    assert data["tokens"].values.tolist() == [2, 2]


def test_domain_specialization_agrees_with_a_loop():
    trace = planted_trace()
    data = domain_specialization(trace)
    for domain in trace.domains:
        of_domain = [route for route, label in zip(routes(trace, 1), trace.domain) if label == domain]
        expected = [np.mean([expert in route for route in of_domain]) for expert in range(6)]
        np.testing.assert_allclose(data["share"].sel(domain=domain, layer=3), expected)


def test_vocabulary_specialization_by_hand():
    # id 7 goes to 0, 0, 1; id 8 always to 2; id 9 is too rare
    indices = [[[0, 1]], [[0, 2]], [[1, 0]], [[2, 0]], [[2, 1]], [[0, 1]]]
    trace = RoutingTrace.from_arrays(indices, n_experts=3, token_ids=[7, 7, 7, 8, 8, 9])
    data = vocabulary_specialization(trace, min_count=2)
    assert data["token_id"].values.tolist() == [7, 8]
    assert data["share"].values.tolist() == [[2 / 3, 1.0]]
    assert data["expert"].values.tolist() == [[0, 2]]
    assert data["specialization"].item() == pytest.approx((2 / 3 + 1) / 2)
    # by weight, the second slot of the first two tokens is their top-1 expert
    weights = [[[0.1, 0.9]], [[0.1, 0.9]]] + [[[0.9, 0.1]]] * 4
    weighted = RoutingTrace.from_arrays(indices, weights, n_experts=3, token_ids=[7, 7, 7, 8, 8, 9])
    assert vocabulary_specialization(weighted, min_count=2)["expert"].values.tolist() == [[1, 2]]


@pytest.mark.parametrize("ids", ["input", "predicted"])
def test_vocabulary_specialization_agrees_with_a_loop(ids):
    trace = planted_trace()
    values = trace.token_ids if ids == "input" else trace.predicted_ids
    for number, layer in enumerate(trace.layers):
        shares = []
        for value in np.unique(values):
            experts = [
                row[np.argmax(np.where(row >= 0, weights, -1))]
                for row, weights in zip(
                    trace.expert_indices[values == value, number], trace.expert_weights[values == value, number]
                )
            ]
            used = [expert for expert in experts if expert >= 0]
            if len(used) >= 10:
                shares.append(max(used.count(expert) for expert in used) / len(used))
        found = vocabulary_specialization(trace, ids)["specialization"].sel(layer=layer)
        assert found.item() == pytest.approx(np.mean(shares))


def test_vocabulary_specialization_needs_frequent_ids():
    with pytest.raises(DataError, match="no such ids"):
        vocabulary_specialization(RoutingTrace.from_arrays([[[0]]], n_experts=1))
    with pytest.raises(DataError, match="at most 1 occurrences of an id"):
        vocabulary_specialization(RoutingTrace.from_arrays([[[0]]], n_experts=1, token_ids=[3]))
    with pytest.raises(ConfigError, match="ids='output'"):
        vocabulary_specialization(planted_trace(), "output")


def test_esft_scores_by_hand():
    indices = [[[0, 1]], [[0, -1]], [[-1, -1]], [[2, 0]]]
    weights = [[[0.5, 0.25]], [[0.5, 0]], [[0, 0]], [[0.25, 0.125]]]
    data = esft_scores(RoutingTrace.from_arrays(indices, weights, n_experts=4))
    np.testing.assert_allclose(data["token_score"], [[(0.5 + 1 + 0.5) / 3, 0.5 / 3, 0.5 / 3, 0]])
    np.testing.assert_allclose(data["gate_score"], [[1.125 / 3, 0.25 / 3, 0.25 / 3, 0]])
    assert "gate_score" not in esft_scores(RoutingTrace.from_arrays(indices, n_experts=4))


def test_esft_experts_are_the_fewest_that_reach_the_sum():
    scores = esft_scores(RoutingTrace.from_arrays([[[0, 1]], [[0, 2]], [[0, 1]], [[0, 3]]], n_experts=5))["token_score"]
    assert scores.values.tolist() == [[0.5, 0.25, 0.125, 0.125, 0]]
    assert esft_experts(scores, 0.5) == {0: [0]}
    assert esft_experts(scores, 0.51) == {0: [0, 1]}
    assert esft_experts(scores, 0.76) == {0: [0, 1, 2]}
    with pytest.raises(ConfigError, match="p=0"):
        esft_experts(scores, 0)


def released(task):
    if not ROUTING.exists():
        pytest.skip("the optional data folder is not beside the checkout")
    lines = (ROUTING / "esft_dsv2lite_stats.jsonl").read_text(encoding="utf-8").splitlines()
    return next(entry for entry in map(json.loads, lines) if entry["task"] == task)


def trace_with(counts, gate_sum, n_tokens, top_k):
    """A trace with these slot counts and sums of weights per layer and expert."""
    counts, mean_weight = np.array(counts), np.array(gate_sum) / np.maximum(counts, 1)
    flat = np.stack([np.repeat(np.arange(counts.shape[1]), row) for row in counts])
    # shape: (layer, slot token) -> (token, layer, slot); equal experts lie n_tokens apart at least
    indices = flat.reshape(len(counts), top_k, n_tokens).transpose(2, 0, 1)
    weights = mean_weight[np.arange(len(counts))[None, :, None], indices]
    return RoutingTrace.from_arrays(indices, weights, n_experts=counts.shape[1])


@pytest.mark.shared_data
@pytest.mark.parametrize("task", ["intent", "law"])
def test_esft_scores_and_experts_equal_the_released_ones(task):
    entry = released(task)
    data = esft_scores(trace_with(entry["counts"], entry["gate_sum"], entry["n_tokens"], entry["top_k"]))
    np.testing.assert_allclose(data["token_score"], entry["released_token_scores"], rtol=0, atol=5e-5)
    np.testing.assert_allclose(data["gate_score"], entry["released_gate_scores"], rtol=0, atol=5e-5)
    # the release selects on its rounded scores, where two experts of one layer come out equal
    found = esft_experts(data["token_score"].round(4), 0.2)
    assert list(found.values()) == entry["released_config_top_p_0_2_token"]


@pytest.mark.shared_data
@pytest.mark.parametrize("task", ["intent", "law"])
def test_scores_normalised_over_layers_are_not_the_released_ones(task):
    """ESFT's public script divides each expert's sums by their sum over layers. The release did not."""
    entry = released(task)
    for name, known in (("counts", "released_token_scores"), ("gate_sum", "released_gate_scores")):
        sums = np.array(entry[name], dtype=float)
        assert np.abs(sums / sums.sum(axis=0) - np.array(entry[known])).mean() > 0.02
    counts = np.array(entry["counts"], dtype=float)
    axes = {"layer": range(1, 27), "expert": range(64)}
    scores = xr.DataArray(counts / counts.sum(axis=0), axes, ("layer", "expert"))
    pairs = zip(esft_experts(scores, 0.2).values(), entry["released_config_top_p_0_2_token"], strict=True)
    assert sum(set(found) == set(expected) for found, expected in pairs) == 0


def write_esft_logs(folder, trace):
    """The logs that ESFT's model writes of the routes of a trace."""
    ends = np.cumsum(trace.sequence_lengths)[:-1]
    for column, layer in enumerate(trace.layers):
        parts = zip(
            np.split(trace.expert_indices[:, column], ends), np.split(trace.expert_weights[:, column].round(4), ends)
        )
        lines = ("\t\t".join("\t".join(map(str, part.ravel().tolist())) for part in both) for both in parts)
        (folder / f"expert_weights_{layer}.txt").write_text("".join(line + "\n" for line in lines))


@pytest.mark.shared_data
def test_real_logs_are_read_without_saying_k_or_the_layers(tmp_path):
    released("law")
    trace = RoutingTrace.read(ROUTING / "esft_dsv2lite_traces_law.npz", "esft", 64, range(1, 27))
    first = trace.select(trace.sequence < 4)
    write_esft_logs(tmp_path, RoutingTrace.from_arrays(**first.arrays()))
    again = RoutingTrace.read(tmp_path, "esft", 64)
    assert (again.layers, again.n_slots) == (tuple(range(1, 27)), 6)
    np.testing.assert_array_equal(again.expert_indices, first.expert_indices)
    np.testing.assert_allclose(again.expert_weights, first.expert_weights, atol=1e-7)
    np.testing.assert_array_equal(again.sequence_lengths, first.sequence_lengths)


@pytest.mark.shared_data
@pytest.mark.parametrize("task", ["intent", "law"])
def test_the_first_sequences_of_a_task_resemble_all_of_it(task, tmp_path):
    entry = released(task)
    stored = np.load(ROUTING / f"esft_dsv2lite_traces_{task}.npz")
    trace = RoutingTrace.from_arrays(
        stored["expert_ids"], stored["gate_weights"] / 1e4, stored["seq_lens"], n_experts=64, layers=range(1, 27)
    )
    data = esft_scores(trace)
    for name, known in (("token_score", "released_token_scores"), ("gate_score", "released_gate_scores")):
        rho = [np.corrcoef(ours, theirs)[0, 1] for ours, theirs in zip(data[name].values, np.array(entry[known]))]
        assert min(rho) > 0.9
    np.testing.assert_allclose(data["token_score"].sum("expert"), 1)
    again = RoutingTrace.read(trace.save(tmp_path / "trace.npz"))
    np.testing.assert_array_equal(again.expert_indices, trace.expert_indices)
    np.testing.assert_array_equal(again.expert_weights, trace.expert_weights)
