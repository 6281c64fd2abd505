"""The geometry of routing on planted traces: what is explained, overlaps and their matching, findings, bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError, MoEInterpError
from moe_interp.experiments.geometry.states import distinct, own_tokens
from moe_interp.experiments.inputs.repeats import RepeatedContentWarning
from tests.unit.experiments.planted_geometry import planted

QUICK: dict[str, Any] = {
    "max_pairs": 600, "n_permutations": 99, "n_random_routers": 4, "n_random_directions": 49, "progress": False,
}  # fmt: skip


def inputs_of(trace: mi.RoutingTrace) -> np.ndarray:
    assert trace.router_inputs is not None
    return trace.router_inputs


@pytest.fixture(scope="module")
def linear() -> mi.GeometryResult:
    trace, weights = planted(domain=np.repeat(["a", "b"], 12))
    return mi.geometry.measure(trace, weights=weights, **QUICK)


def test_a_known_linear_router_explains_all_of_it(linear: mi.GeometryResult) -> None:
    table = linear.explained()
    own = table[table["source"] == "router"]
    assert len(own) == 4
    assert own[["explained", "low", "high"]].to_numpy() == pytest.approx(1.0)


def test_routes_that_do_not_depend_on_states_are_explained_by_nothing() -> None:
    """Zero is inside the 95% intervals of nearly all draws, by every source and at both levels."""
    inside, estimates = [], []
    for seed in range(12):
        trace, weights = planted("nothing", seed=seed)
        found = mi.geometry.explained_by_geometry(
            trace, weights=weights, max_pairs=500, n_random_routers=3, seed=seed
        ).isel(layer=0)
        inside.append(((found["explained_low"] <= 0) & (found["explained_high"] >= 0)).values)
        estimates.append(found["explained"].values)
    assert np.mean(inside, axis=0).min() >= 0.75  # 9 of 12: below it with probability .003 at a coverage of .95
    assert np.mean(inside) >= 0.9
    mean, sd = np.mean(estimates, axis=0), np.std(estimates, axis=0)
    assert (np.abs(mean) <= 4 * sd / np.sqrt(12)).all()


def test_a_random_router_is_explained_by_random_routers_as_they_are_by_one_another() -> None:
    shares = []
    for seed in range(6):
        trace, weights = planted(n_layers=1, n_experts=24, seed=seed)
        found = mi.geometry.explained_by_geometry(trace, weights=weights, max_pairs=500, n_random_routers=4, seed=seed)
        at = found.sel(layer=0, level="sequence")
        shares.append([float(at["explained"].sel(source="random router")), float(at["explained_of_random"])])
    one, other = np.mean(shares, axis=0)
    assert one == pytest.approx(other, abs=0.08)
    assert other > 0.3


def test_similarity_is_found_where_it_is_planted_and_only_there(linear: mi.GeometryResult) -> None:
    table = linear.similarity()
    assert (table["correlation"] > 0.3).all()
    assert (table["p"] <= 0.05).all()
    assert linear.findings()["verdict"][0] == "confirmed"
    rejected = []
    for seed in range(20):
        trace, _ = planted("nothing", n_layers=1, n_tokens=6, seed=seed)
        found = mi.geometry.route_vs_hidden_similarity(trace, max_pairs=300, n_permutations=99, seed=seed)
        rejected.append(found["mantel_p"].values.ravel() <= 0.05)
    assert np.sum(rejected, axis=0).max() <= 5  # of 20: more with probability .0003


def test_the_correlation_equals_a_loop_over_pairs() -> None:
    trace = planted(n_layers=1, n_sequences=6, n_tokens=4, token_ids=None)[0]
    found = mi.geometry.route_vs_hidden_similarity(trace, n_permutations=9, seed=0).isel(layer=0)
    states, routes = inputs_of(trace)[:, 0].astype(float), trace.expert_indices[:, 0]
    overlap, cosine = [], []
    for i in range(24):
        for j in range(i):
            if trace.sequence[i] != trace.sequence[j]:
                overlap.append(len(set(routes[i]) & set(routes[j])) / 3)
                cosine.append(states[i] @ states[j] / np.linalg.norm(states[i]) / np.linalg.norm(states[j]))
    assert float(found["correlation"].sel(level="token")) == pytest.approx(np.corrcoef(overlap, cosine)[0, 1])
    counts = np.array([np.bincount(routes[trace.sequence == s].ravel(), minlength=12) for s in range(6)])
    pooled = np.array([states[trace.sequence == s].mean(0) for s in range(6)])
    alike, near = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (counts, pooled))
    pairs = np.triu_indices(6, 1)
    expected = np.corrcoef((alike @ alike.T)[pairs], (near @ near.T)[pairs])[0, 1]
    assert float(found["correlation"].sel(level="sequence")) == pytest.approx(expected)


def test_experts_names_do_not_matter() -> None:
    trace, weights = planted(seed=3)
    order = np.random.default_rng(0).permutation(12)
    renamed = replace(trace, expert_indices=np.argsort(order)[trace.expert_indices].astype(np.int32))
    moved = {layer: weight[order] for layer, weight in weights.items()}
    a, b = (mi.geometry.measure(t, weights=w, **QUICK).data for t, w in ((trace, weights), (renamed, moved)))
    same = ["correlation", "mantel_p", "bound_upper", "bound_lower", "tightness", "shared_gain", "same_token"]
    for name in same:
        assert b[name].values == pytest.approx(a[name].values), name
    for name in ("explained", "explained_low"):  # random routers are drawn by the number of the expert
        assert b[name].sel(source="router").values == pytest.approx(a[name].sel(source="router").values)


def test_the_bound_is_never_broken(linear: mi.GeometryResult) -> None:
    table = linear.bound()
    assert not table[["violations", "converse_violations"]].to_numpy().any()
    assert (table["tightness_high"] <= 1).all()
    assert (table["converse_tightness_high"] <= 1).all()
    assert (table["bound_rank"] == 16).all()
    assert (table["seen_rank"] == 12).all()


def test_a_router_that_ignores_the_shared_direction_suppresses_it() -> None:
    trace, weights = planted(n_layers=2)
    shared = np.random.default_rng(5).normal(size=16) * 3
    unit = shared / np.linalg.norm(shared)
    blind = {layer: w - 0.97 * np.outer(w @ unit, unit) for layer, w in weights.items()}
    inputs = (inputs_of(trace) + shared).astype(np.float32)
    found = mi.geometry.shared_direction(replace(trace, router_inputs=inputs), weights=blind, n_random_directions=99)
    assert (found["suppression_high"].values < 0).all()
    assert (found["shared_p"].values <= 0.05).all()
    result = mi.geometry.measure(replace(trace, router_inputs=inputs), weights=blind, **QUICK)
    assert result.findings()["verdict"][1] == "confirmed"
    assert "2. The router suppresses the shared direction: confirmed" in result.summary()


def test_the_same_token_overlaps_where_the_token_decides() -> None:
    trace, weights = planted("token", n_layers=3, n_sequences=30)
    result = mi.geometry.measure(trace, weights=weights, **QUICK)
    table = result.contexts()
    assert table["same_token"][0] == pytest.approx(1.0)
    assert table["same_token_excess_low"][0] > 0.5
    assert (table["same_token_excess"][1:].abs() < 0.1).all()
    assert result.findings()["verdict"][4] == "confirmed"


def test_overlap_by_depth_equals_a_loop_and_its_chance_levels() -> None:
    trace, _ = planted("nothing", n_sequences=8, domain=np.repeat(["a", "b"], 4))
    found = mi.geometry.depth_overlap(trace, p=0.6)
    counts = trace.counts(trace.sequence, 8)
    for layer in range(2):
        sets = []
        for row in counts[:, layer]:
            order = np.argsort(-row, kind="stable")
            taken: set[int] = set()
            while sum(row[e] for e in taken) < 0.6 * row.sum() - 1e-9:
                taken.add(int(order[len(taken)]))
            sets.append(taken)
        loop = [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i in range(4) for j in range(4, 8)]
        assert float(found["overlap"][layer]) == pytest.approx(np.mean(loop))
    assert found.attrs["pairs"] == "pairs of sequences of different domains"
    alone = mi.geometry.depth_overlap(trace, unrelated=False)
    assert alone.attrs["pairs"] == "all pairs of sequences"


def test_independent_routes_overlap_as_the_usage_matched_null() -> None:
    rng = np.random.default_rng(0)
    use = np.array([8.0, 4, 2, 1, 1, 1, 1, 1])
    experts = np.array([[rng.choice(8, 1, p=use / use.sum())] for _ in range(40 * 30)])
    trace = mi.RoutingTrace.from_arrays(experts, sequence_lengths=[30] * 40, n_experts=8)
    found = mi.geometry.depth_overlap(trace).isel(layer=0)
    assert float(found["overlap"]) == pytest.approx(float(found["usage_matched"]), abs=0.03)
    assert float(found["overlap"]) > float(found["size_matched"]) + 0.1


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_renamed_model_is_recognised_by_its_use(level: Any) -> None:
    trace, _ = planted(n_tokens=40)
    order = np.random.default_rng(1).permutation(12)
    renamed = replace(trace, expert_indices=order[trace.expert_indices].astype(np.int32))
    by_use = mi.geometry.answer_overlap(trace, renamed, matching="usage", level=level)
    # of experts in equal use, sets take those of the lower number
    assert float(by_use["mean_same"]) == pytest.approx(1.0, abs=0.04 if level == "sequence" else 1e-9)
    assert float(by_use["same_beyond_other_low"]) > 0.3
    by_number = mi.geometry.answer_overlap(trace, renamed, matching="identity", level=level)
    assert float(by_number["mean_same"]) < 0.6
    itself = mi.geometry.answer_overlap(trace, trace, matching="identity", level=level)
    assert itself["same"].values == pytest.approx(1.0)
    # one model on two questions is the overlap by depth of all pairs
    depth = mi.geometry.depth_overlap(trace, unrelated=False)
    assert itself["other"].values == pytest.approx(depth["overlap"].values)


def test_rank_matches_experts_of_one_rank() -> None:
    a = mi.RoutingTrace.from_arrays([[[0]], [[0]], [[1]], [[0]]], sequence_lengths=[2, 2], n_experts=3)
    b = mi.RoutingTrace.from_arrays([[[2]], [[2]], [[0]], [[2]]], sequence_lengths=[2, 2], n_experts=3)
    found = mi.geometry.answer_overlap(a, b, matching="rank", p=1.0)
    assert float(found["mean_same"]) == pytest.approx(1.0)
    assert float(mi.geometry.answer_overlap(a, b, matching="identity", p=1.0)["mean_same"]) < 0.5


def test_unrelated_models_overlap_as_by_chance_for_all_the_matching_does() -> None:
    """Matched on one half and measured on the other, so the fit itself brings nothing."""
    found = []
    for seed in range(8):
        (a, _), (b, _) = planted("nothing", n_layers=1, seed=seed), planted("nothing", n_layers=1, seed=100 + seed)
        overlap = mi.geometry.answer_overlap(a, b, matching="usage")
        found.append(float(overlap["mean_same"] - overlap["mean_crossed"]))
    assert abs(np.mean(found)) < 0.03


def test_models_of_different_numbers_of_experts_compare() -> None:
    (a, _), (b, _) = planted(n_experts=12), planted(n_experts=8)
    for matching in ("usage", "rank"):
        found = mi.geometry.answer_overlap(a, b, matching=matching)  # type: ignore[arg-type]
        assert 0 <= float(found["mean_same"]) <= 1
    with pytest.raises(DataError, match="12 and 8 experts"):
        mi.geometry.answer_overlap(a, b, matching="identity")


def test_a_second_model_makes_the_third_finding_testable(linear: mi.GeometryResult) -> None:
    trace, weights = planted(n_tokens=40)
    other, _ = planted(n_tokens=40, seed=9)
    result = mi.geometry.measure(trace, weights=weights, other=other, matching="usage", **QUICK)
    row = result.findings().iloc[2]
    assert row["verdict"] in ("confirmed", "not confirmed", "not shown")
    assert "usage matching" in row["measure"]
    assert len(result.answers()) == 2
    assert linear.findings()["verdict"][2].startswith("not testable: needs the trace of a second model")


def test_prompt_and_generation_are_compared_where_they_are_recorded() -> None:
    trace, weights = planted(n_tokens=40, token_ids=None)
    phase = np.tile(np.repeat(["prefill", "generation"], 20), 24)
    result = mi.geometry.measure(replace(trace, phase=phase), weights=weights, **QUICK)
    table = result.phases()
    assert (table["phase_same"] > table["phase_other_high"]).all()
    first, second = (replace(trace, phase=phase).select(phase == name) for name in ("prefill", "generation"))
    expected = mi.geometry.answer_overlap(first, second, matching="identity")
    assert table["phase_same"].to_numpy() == pytest.approx(expected["same"].values)


def test_what_sequences_share_from_their_beginning_counts_for_none() -> None:
    ids = [1, 5, 6, 1, 5, 7, 1, 8, 6]
    trace = mi.RoutingTrace.from_arrays([[[0]]] * 9, sequence_lengths=[3, 3, 3], n_experts=2, token_ids=ids)
    assert own_tokens(trace).tolist() == [False, False, True, False, False, True, False, True, True]
    same = replace(trace, token_ids=np.array([1, 5, 6, 1, 5, 6, 1, 8, 6]))
    with pytest.raises(DataError, match="sequence 0 without a token of its own"):
        own_tokens(same)
    with pytest.warns(RepeatedContentWarning, match="'1' \\(as '0'\\)"):
        once, numbers = distinct(same)
    assert numbers == [0, 2]
    assert once.token_ids is not None
    assert once.token_ids.tolist() == [1, 5, 6, 1, 8, 6]


def test_without_weights_the_rest_is_measured() -> None:
    trace, _ = planted()
    result = mi.geometry.measure(trace, **QUICK)
    assert set(result.explained()["source"]) == {"random router", "whitened states"}
    assert result.findings()["verdict"][1] == "not testable: the routers' weights are not known"
    assert "linear bound" not in result.summary()
    with pytest.raises(DataError, match="without the routers' weights"):
        result.bound()
    with pytest.raises(DataError, match="without the routers' weights"):
        mi.geometry.linear_bounds(trace)


def test_it_is_saved_and_loaded_whole(linear: mi.GeometryResult, tmp_path: Path) -> None:
    loaded = mi.load_result(linear.save(tmp_path / "geometry.nc"))
    assert isinstance(loaded, mi.GeometryResult)
    assert loaded.summary() == linear.summary()
    pd.testing.assert_frame_equal(loaded.explained(), linear.explained())
    assert {"level", "layer", "correlation"} <= set(loaded.to_dataframe().columns)
    page = loaded.report(tmp_path / "page.html").read_text()
    assert page.count("<svg") == 6
    for words in ("The five findings", "Do similar states route alike?", "Is the shared direction suppressed?"):
        assert words in page


def test_figures_draw_the_numbers_of_the_tables(linear: mi.GeometryResult) -> None:
    depth = linear.plot("depth_overlap").axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in depth.lines}
    assert lines["measured"] == pytest.approx(linear.depth()["overlap"].to_numpy())
    assert lines["random sets of the sizes"] == pytest.approx(linear.depth()["size_matched"].to_numpy())
    bars = linear.plot("shared_direction").axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(linear.shared_direction()["shared_gain"].to_list())
    scatter = linear.plot("bound").axes
    for layer, axis in enumerate(scatter):
        drawn = np.asarray(axis.collections[0].get_offsets())
        assert drawn[:, 1] == pytest.approx(linear.data["pair_logit_distance"].values[layer])
        x, y = (np.asarray(side) for side in axis.lines[0].get_data())
        assert y[1] / x[1] == pytest.approx(linear.bound()["bound_upper"][layer])
        assert (drawn[:, 1] <= drawn[:, 0] * y[1] / x[1] * (1 + 1e-9)).all()
    points = np.asarray(linear.plot("similarity").axes[1].collections[0].get_offsets())
    assert points[:, 0] == pytest.approx(linear.data["pair_cosine"].values[1])
    shown = np.asarray(linear.plot("layer_agreement").axes[0].images[0].get_array())
    assert shown == pytest.approx(linear.data["route_agreement"].values)
    assert np.diag(shown) == pytest.approx(1)
    matched = np.asarray(linear.plot("layer_overlap").axes[0].images[0].get_array())
    assert matched.ravel() == pytest.approx(linear.layer_overlap()["overlap"].to_numpy())


def _one_sequence() -> Any:
    return mi.geometry.measure(planted(n_sequences=1)[0], **QUICK)


def _no_inputs() -> Any:
    return mi.geometry.measure(replace(planted()[0], router_inputs=None), **QUICK)


def _flat() -> Any:
    trace, weights = planted()
    inputs = inputs_of(trace).copy()
    inputs[:, 1] = 0.1
    return mi.geometry.measure(replace(trace, router_inputs=inputs), weights=weights, **QUICK)


def _other_layers() -> Any:
    a, b = planted()[0], planted()[0]
    return mi.geometry.answer_overlap(a, replace(b, layers=(0, 2)), matching="usage")


def _other_tokens() -> Any:
    a, b = planted()[0], planted(seed=1)[0]
    return mi.geometry.answer_overlap(a, b, matching="usage", level="token")


def _lacking_weights() -> Any:
    trace, weights = planted()
    return mi.geometry.measure(trace, weights={0: weights[0]}, **QUICK)


def _odd_weights() -> Any:
    trace, weights = planted()
    return mi.geometry.measure(trace, weights={**weights, 1: weights[1].T}, **QUICK)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_one_sequence, "1 sequence. Expected: at least 3 different sequences: the permutation test is over sequences"),
        (_no_inputs, "a trace without router inputs"),
        (_flat, "router inputs of layer 1 without variance"),
        (_other_layers, r"layers \[1, 2\], which one of the traces lacks"),
        (_other_tokens, "different tokens, as of two tokenizers, compared token by token"),
        (_lacking_weights, "weights without layer 1"),
        (_odd_weights, r"weights of layer 1 of shape \(16, 12\)"),
        (lambda: mi.geometry.depth_overlap(planted(n_sequences=1)[0]), "1 sequence. Expected: at least 2"),
        (lambda: mi.geometry.depth_overlap(planted(domain="a")[0]), "the domain a alone"),
        (lambda: mi.geometry.depth_overlap(planted()[0], p=0), "p=0"),
        (lambda: mi.geometry.answer_overlap(planted()[0], planted(n_sequences=3)[0], "rank"), "24 and 3 sequences"),
        (lambda: mi.geometry.answer_overlap(planted()[0], planted()[0], "name"), "matching='name'"),  # type: ignore[arg-type]
        (lambda: mi.geometry.measure(planted()[0], ["text"], **QUICK), "at least 3"),
        (lambda: mi.geometry.measure(planted()[0], ["a", "b", "c"], **QUICK), "sequences beside a trace"),
        (lambda: mi.geometry.measure(planted()[0], layers=[7], **QUICK), r"layers \[7\] of a trace of layers \[0, 1\]"),
        (lambda: mi.geometry.measure(planted()[0], **(QUICK | {"n_random_routers": 1})), "n_random_routers=1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(call: Any, message: str) -> None:
    with pytest.raises(MoEInterpError, match=message) as caught:
        call()
    assert isinstance(caught.value, ConfigError | DataError)
