"""The geometry of routing against loops written from the definitions, at the edges, and on input that is no trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError, MoEInterpError
from tests.unit.experiments.planted_geometry import planted

QUICK: dict[str, Any] = {
    "max_pairs": 200, "n_permutations": 9, "n_random_routers": 2, "n_random_directions": 9, "progress": False,
}  # fmt: skip
SMALL: dict[str, Any] = {"n_sequences": 8, "n_tokens": 6}


def inputs_of(trace: mi.RoutingTrace) -> np.ndarray:
    assert trace.router_inputs is not None
    return trace.router_inputs


def holding(row: np.ndarray, p: float) -> set[int]:
    taken: set[int] = set()
    for expert in sorted(range(len(row)), key=lambda e: (-row[e], e)):
        if sum(row[e] for e in taken) >= p * row.sum() - 1e-9:
            break
        taken.add(expert)
    return taken


def pairs_of_tokens(trace: mi.RoutingTrace) -> list[tuple[int, int]]:
    n = trace.n_tokens
    return [(i, j) for i in range(n) for j in range(i + 1, n) if trace.sequence[i] != trace.sequence[j]]


def test_both_bounds_equal_a_loop_with_an_eigendecomposition() -> None:
    trace, weights = planted(n_sequences=4, n_tokens=5, n_layers=1, token_ids=None)
    found = mi.geometry.linear_bounds(trace, weights=weights, max_pairs=10_000).isel(layer=0)
    states, w = inputs_of(trace)[:, 0].astype(float), weights[0]
    values, vectors = np.linalg.eigh(np.cov(states.T))
    seen = vectors[:, values > 1e-9 * values.max()]
    gram = np.linalg.eigvalsh((w @ seen).T @ (w @ seen))
    upper, lower = np.sqrt(gram.max()), np.sqrt(gram[gram > 1e-9 * gram.max()].min())
    assert float(found["bound_upper"]) == pytest.approx(upper)
    assert float(found["bound_lower"]) == pytest.approx(lower)
    used = []
    for i, j in pairs_of_tokens(trace):
        used.append(np.linalg.norm(w @ (states[i] - states[j])) / upper / np.linalg.norm(states[i] - states[j]))
    assert found["tightness"].values == pytest.approx(np.quantile(used, (0.05, 0.25, 0.5, 0.75, 0.95)))


def test_the_shared_direction_and_its_controls_equal_a_loop() -> None:
    trace, weights = planted(n_sequences=4, n_tokens=5, n_layers=1, token_ids=None)
    moved = replace(trace, router_inputs=(inputs_of(trace) + 0.5).astype(np.float32))
    states, w = inputs_of(moved)[:, 0].astype(float), weights[0]
    found = mi.geometry.shared_direction(moved, weights=weights, n_components=3).isel(layer=0)
    centre = np.eye(12) - np.ones((12, 12)) / 12
    mean = states.mean(0)
    assert float(found["shared_gain"]) == pytest.approx(np.linalg.norm(centre @ w @ mean) / np.linalg.norm(mean))
    off = states - mean
    share = [sum(np.linalg.norm(m @ row) ** 2 for row in off) for m in (centre @ w, np.eye(16))]
    assert float(found["centred_gain"]) == pytest.approx(np.sqrt(share[0] / share[1]))
    values, vectors = np.linalg.eigh(np.cov(states.T))
    for number in range(3):
        axis = vectors[:, -1 - number]
        assert float(found["component_gain"][number]) == pytest.approx(np.linalg.norm(centre @ w @ axis))
        assert float(found["component_variance"][number]) == pytest.approx(values[-1 - number] / values.sum())
    every = np.random.default_rng(0).normal(size=(20_000, 16))
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    at_random = np.sqrt((np.linalg.norm(every @ w.T @ centre, axis=1) ** 2).mean())
    assert float(found["random_gain"]) == pytest.approx(at_random, rel=0.02)
    assert float(found["suppression"]) == pytest.approx(np.log(float(found["shared_gain"] / found["random_gain"])))


def test_mantels_test_equals_all_orders_of_a_loop() -> None:
    trace, _ = planted(n_sequences=5, n_tokens=3, n_layers=1, token_ids=None)
    found = mi.geometry.route_vs_hidden_similarity(trace).isel(layer=0).sel(level="token")
    states, routes = inputs_of(trace)[:, 0].astype(float), trace.expert_indices[:, 0]
    pairs = pairs_of_tokens(trace)
    cosine = [states[i] @ states[j] / np.linalg.norm(states[i]) / np.linalg.norm(states[j]) for i, j in pairs]
    drawn = []
    for order in permutations(range(5)):
        at = [3 * order[t // 3] + t % 3 for t in range(15)]
        overlap = [len(set(routes[at[i]]) & set(routes[at[j]])) / 3 for i, j in pairs]
        drawn.append(np.corrcoef(overlap, cosine)[0, 1])
    above, below = (np.mean([sign * r >= sign * drawn[0] - 1e-9 for r in drawn]) for sign in (1, -1))
    assert float(found["mantel_p"]) == pytest.approx(min(1, 2 * min(above, below)))
    assert float(found["correlation"]) == pytest.approx(drawn[0])


def test_layers_of_two_runs_overlap_as_in_a_loop_over_all_matchings() -> None:
    a, b = (planted(n_sequences=6, n_tokens=8, n_experts=4, k=2, n_layers=2, seed=seed)[0] for seed in (0, 1))
    found = mi.geometry.layer_overlap(a, b, matching="rank", p=0.7)
    counts = [t.counts(t.sequence, 6) for t in (a, b)]
    for i in range(2):
        for j in range(2):
            one, two = counts[0][:, i], counts[1][:, j]
            use = [side.sum(0) for side in (one, two)]  # all sequences are of one length
            ranks = [sorted(range(4), key=lambda e, u=u: (-u[e], e)) for u in use]  # type: ignore[misc]
            name = dict(zip(ranks[1], ranks[0]))
            sets = [[holding(row, 0.7) for row in side] for side in (one, two)]
            renamed = [{name[e] for e in chosen} for chosen in sets[1]]
            every = np.array([[len(x & y) / len(x | y) for y in renamed] for x in sets[0]])
            assert float(found["overlap"][i, j]) == pytest.approx(np.diag(every).mean())
            assert float(found["crossed"][i, j]) == pytest.approx(every[~np.eye(6, dtype=bool)].mean())


def test_a_layer_with_renamed_experts_is_recognised_and_an_unrelated_one_is_not() -> None:
    trace, _ = planted("nothing", n_tokens=40, n_layers=1)
    order = np.random.default_rng(1).permutation(12)
    other, _ = planted("nothing", n_tokens=40, n_layers=1, seed=5)
    three: list[Any] = [trace.expert_indices, order[trace.expert_indices], other.expert_indices]
    both = mi.RoutingTrace.from_arrays(np.concatenate(three, axis=1), sequence_lengths=[40] * 24, n_experts=12)
    found = mi.geometry.layer_overlap(both)
    overlap, crossed = found["overlap"].values, found["crossed"].values
    assert np.diag(overlap) == pytest.approx(1.0, abs=0.02)
    assert overlap[0, 1] == pytest.approx(1.0, abs=0.08)  # of experts in equal use, sets take the lower number
    assert overlap == pytest.approx(overlap.T)
    assert overlap[0, 2] == pytest.approx(crossed[0, 2], abs=0.05)
    assert overlap[0, 1] > crossed[0, 1] + 0.3


def test_tokens_that_a_trace_does_not_cover_are_no_disagreement() -> None:
    trace, _ = planted(**SMALL)
    holes = trace.expert_indices.copy()
    holes[::3, 1] = -2
    part = replace(trace, expert_indices=holes)
    found = mi.geometry.answer_overlap(part, trace, "identity", level="token")
    assert found["same"].values == pytest.approx(1.0)
    holes[:6, 1] = -2  # all of the first sequence
    for call in (
        lambda: mi.geometry.depth_overlap(part),
        lambda: mi.geometry.answer_overlap(trace, part, "usage"),
        lambda: mi.geometry.layer_overlap(part),
    ):
        with pytest.raises(DataError, match="sequence 0 without an expert at layer 1"):
            call()


def test_what_sequences_share_is_in_no_overlap_of_models_or_phases() -> None:
    trace, weights = planted(n_sequences=8, n_tokens=20)
    assert trace.token_ids is not None
    ids = np.arange(160) + 100
    common = np.tile(np.arange(20) < 8, 8)
    ids[common] = np.tile(np.arange(8), 8)
    routes = trace.expert_indices.copy()
    routes[common] = [0, 1, 2]
    phase = np.where(np.tile(np.arange(20) < 14, 8), "prefill", "generation")
    trace = replace(trace, token_ids=ids, expert_indices=routes, phase=phase)
    own = replace(trace.select(~common), router_inputs=None)
    result = mi.geometry.measure(trace, weights=weights, other=trace, matching="identity", **QUICK)
    alone = mi.geometry.answer_overlap(own, own, "identity")
    assert result.answers()["other"].to_numpy() == pytest.approx(alone["other"].values)
    halves = [own.select(own.phase == name) for name in ("prefill", "generation")]  # type: ignore[arg-type]
    expected = mi.geometry.answer_overlap(halves[0], halves[1], "identity")
    assert result.phases()["phase_same"].to_numpy() == pytest.approx(expected["same"].values)


def test_another_models_trace_is_cut_to_the_layers_that_are_measured() -> None:
    trace, weights = planted(**SMALL)
    result = mi.geometry.measure(trace, weights=weights, layers=[1], other=trace, matching="identity", **QUICK)
    assert result.answers()["layer"].tolist() == [1]
    assert result.answers()["same"].to_numpy() == pytest.approx(1.0)
    assert set(result.layer_overlap()["run"]) == {"itself", "other"}
    assert len(result.plot("layer_overlap").axes) == 3


Planted = tuple[mi.RoutingTrace, dict[int, np.ndarray]]


def changed(change: Callable[[mi.RoutingTrace], dict[str, Any]]) -> Callable[[], Planted]:
    def make() -> Planted:
        trace, weights = planted(**SMALL)
        return replace(trace, **change(trace)), weights

    return make


TOKEN = np.arange(48)[:, None, None]
ONE_AXIS = (np.random.default_rng(0).normal(size=(48, 1, 1)) * np.ones((1, 2, 16))).astype(np.float32)
ALIKE = np.tile(np.arange(3, dtype=np.int32), (48, 2, 1))
EDGES: dict[str, Callable[[], Planted]] = {
    "one expert a token": lambda: planted(**SMALL, k=1),
    "all experts a token": lambda: planted(**SMALL, k=12),
    "one layer": lambda: planted(**SMALL, n_layers=1),
    "states of rank 1": changed(lambda t: {"router_inputs": ONE_AXIS}),
    "sequences of one token": lambda: planted(n_sequences=8, n_tokens=1, token_ids=np.arange(8)),
    "float16 states": changed(lambda t: {"router_inputs": inputs_of(t).astype(np.float16)}),
    "one route for all": changed(lambda t: {"expert_indices": ALIKE}),
    "an input of 0": changed(lambda t: {"router_inputs": inputs_of(t) * (TOKEN != 3)}),
    "empty slots": changed(lambda t: {"expert_indices": np.where(np.arange(3) > TOKEN % 3, -1, t.expert_indices)}),
}


@pytest.mark.parametrize("edge", EDGES)
def test_the_edges_give_numbers_or_nothing_and_never_a_warning(edge: str) -> None:
    trace, weights = EDGES[edge]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = mi.geometry.measure(trace, weights=weights, **QUICK)
        assert "nan" not in result.summary()
        assert len(result.findings()) == 5
    own = result.data["explained"].sel(source="router").values
    if edge in ("all experts a token", "one route for all"):
        assert np.isnan(own).all()
    elif edge not in ("states of rank 1", "float16 states", "an input of 0"):  # their routes are of other states
        assert own == pytest.approx(1.0)
    assert not result.data["violations"].values.any()


T, W = planted(**SMALL)


def _measure(trace: Any = T, **options: Any) -> Any:
    return mi.geometry.measure(trace, **(QUICK | options))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: _measure("demo"), "'demo' of type str"),
    (lambda: _measure(T, weights={0: "a", 1: "b"}), "weights of layer 0 that are no array of real numbers"),
    (lambda: _measure(T, weights={k: v * 1j for k, v in W.items()}), "weights of layer 0 that are no array of real"),
    (lambda: _measure(T, weights={0: [[1], [1, 2]], 1: W[1]}), "weights of layer 0 that are no array of real"),
    (lambda: _measure(T, weights=W, biases=[1, 2]), "biases of type list"),
    (lambda: _measure(T, biases={0: np.zeros(12)}), "biases without weights"),
    (lambda: _measure(T, layers="01"), "layers='01'"),
    (lambda: _measure(T, layers=[0.5]), "layers=0.5"),
    (lambda: _measure(T, layers=[True]), "layers=True"),
    (lambda: _measure(T, p="a"), "p='a'"),
    (lambda: _measure(T, p=True), "p=True"),
    (lambda: _measure(T, other="x.npz"), "other of type str"),
    (lambda: _measure(T, generate=0), "generate=0"),
    (lambda: _measure(T, generate=4), "generate without a model"),
    (lambda: _measure(T, store="folder"), "a store beside a trace"),
    (
        lambda: _measure(replace(T, router_inputs=np.full_like(inputs_of(T), np.nan))),
        "router inputs that are not finite",
    ),
    (lambda: mi.geometry.linear_bounds(T, weights=W, max_pairs=0), "max_pairs is 0"),
    (lambda: mi.geometry.explained_by_geometry(T, max_pairs=-1), "max_pairs is -1"),
    (lambda: mi.geometry.depth_overlap("x.npz"), "trace of type str"),  # type: ignore[arg-type]
    (lambda: mi.geometry.depth_overlap(T, n_draws=0), "n_draws=0"),
    (lambda: mi.geometry.depth_overlap(T, p="a"), "p='a'"),  # type: ignore[arg-type]
    (lambda: mi.geometry.answer_overlap(T, T, "usage", level="word"), "level is 'word'"),  # type: ignore[arg-type]
    (lambda: mi.geometry.answer_overlap(T, "x", "usage"), "b of type str"),  # type: ignore[arg-type]
    (lambda: mi.geometry.layer_overlap(T, matching="name"), "matching='name'"),  # type: ignore[arg-type]
    (lambda: mi.geometry.layer_overlap(T, planted(n_sequences=3)[0]), "8 and 3 sequences"),
    (lambda: mi.geometry.shared_direction(planted(n_sequences=1)[0], weights=W), "1 sequence. Expected: at least 2"),
    (lambda: mi.stats.linear_bound([[1, 2]], [["a", "b"]]), "states that are no array of real numbers"),
    (lambda: mi.stats.linear_bound(W[0], inputs_of(T)[:, 0], variance="a"), "variance='a'"),  # type: ignore[arg-type]
    (lambda: mi.stats.mantel([["a"]], [[1]]), "x that are no array of real numbers"),
    (lambda: mi.stats.smallest_sets("abc"), "mass that are no array of real numbers"),
    (lambda: mi.stats.expected_jaccard(9, 2, 4), "sizes of sets of 4 experts"),
    (lambda: mi.stats.expected_jaccard([1.5], [2], 4), "sizes of sets of 4 experts"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_measured_is_refused_in_words(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(MoEInterpError, match=message) as caught:
        call()
    assert isinstance(caught.value, ConfigError | DataError)
