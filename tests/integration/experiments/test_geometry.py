"""The geometry of real models' routing: what each family's router really multiplies, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_interp as mi
from moe_interp.errors import ConfigError, ResultError
from moe_interp.experiments.geometry.model_pass import SkippedLayerWarning
from moe_interp.experiments.inputs.repeats import RepeatedContentWarning
from tests import tiny

# plain softmax, a bias in the router, sigmoid with correction bias and groups, normed and scaled input, soft-cap,
# sparse mixer, latent experts
SIX = ("olmoe", "gpt_oss", "deepseek_v3", "gemma4", "laguna", "phimoe", "nemotron_h")
QUICK: dict[str, Any] = {
    "max_pairs": 400, "n_permutations": 19, "n_random_routers": 2, "n_random_directions": 19, "progress": False,
}  # fmt: skip


def sequences(n: int = 5, pos: int = 9) -> list[list[int]]:
    """Of different lengths, so that batches are padded; all begin with the same two tokens."""
    tokens = tiny.random_tokens(n, pos).tolist()
    return [[7, 8, *row[: pos - i]] for i, row in enumerate(tokens)]


def recorded(hf: Any, name: str, rows: list[list[int]]) -> dict[Any, list[np.ndarray]]:
    """By layer, what the untouched model's linear map of the router reads, and its logits, one sequence at a time."""
    layers = tiny.native_layers(hf)
    found: dict[Any, list[tuple[np.ndarray, np.ndarray]]] = {label: [] for label in layers}
    for row in rows:
        with torch.no_grad(), tiny.recorded_router_inputs(hf) as inputs:
            tiny.native_logits(hf, name, torch.tensor([row]))
            for label, layer in layers.items():
                reads = tiny.linear_input(layer, inputs[label])
                logits = tiny.raw_logits(layer, reads)
                found[label].append((reads.reshape(len(row), -1).numpy(), logits.reshape(len(row), -1).numpy()))
    return {label: [np.concatenate(part) for part in zip(*parts)] for label, parts in found.items()}


@pytest.mark.parametrize("name", SIX)
def test_the_bound_holds_for_the_logits_that_the_model_itself_makes(name: str) -> None:
    rows = sequences()
    hf = tiny.build_hf(name, dtype=torch.float64)
    tiny.set_experts_implementation(hf, "eager")
    with tiny.float64_casts():
        moe = mi.attach(tiny.build_bridge(hf, name))
        routed = mi.geometry.routed_states(moe, rows, max_tokens=10_000, progress=False)
        native = recorded(hf, name, rows)
    own = np.concatenate([np.arange(len(row)) >= 2 for row in rows])
    assert (routed.is_own == own).all()  # both first tokens are the same in all sequences
    assert (routed.kept == np.flatnonzero(own)).all()
    found = mi.geometry.linear_bounds(routed, max_pairs=400)
    assert not found["violations"].values.any()
    assert not found["converse_violations"].values.any()
    unit = routed.sequence
    first, second = np.triu_indices(len(unit), 1)
    first, second = (side[unit[first] != unit[second]] for side in (first, second))
    for place, layer in enumerate(routed.trace.layers):
        reads, logits = (part[own] for part in native[layer])
        assert routed.states[:, place] == pytest.approx(reads, abs=1e-9)
        moved = np.linalg.norm(logits[first] - logits[second], axis=1)
        length = np.linalg.norm(reads[first] - reads[second], axis=1)
        upper, lower = float(found["bound_upper"][place]), float(found["bound_lower"][place])
        assert (moved <= upper * length * (1 + 1e-9)).all()
        bound = mi.stats.linear_bound(routed.weights[place], reads)  # type: ignore[index]
        assert (moved >= lower * bound.distances(reads[first] - reads[second])[2] - 1e-9 * upper * length).all()
        assert upper == pytest.approx(bound.upper)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gemma4"])
def test_the_routers_own_weights_explain_what_the_rule_leaves_to_them(name: str) -> None:
    moe = mi.attach(tiny.build_bridge(tiny.build_hf(name), name))
    found = mi.geometry.explained_by_geometry(moe, sequences(8, 14), n_random_routers=2, progress=False)
    own = found["explained"].sel(source="router").values
    if name == "deepseek_v3":  # correction biases and groups decide with them
        assert (own < 0.999).all()
    else:
        assert own == pytest.approx(1.0)


def test_a_model_and_its_trace_give_the_same_and_batches_do_not_matter(tmp_path: Path) -> None:
    rows = sequences(6, 8)
    hf = tiny.build_hf("gpt_oss", dtype=torch.float64)
    tiny.set_experts_implementation(hf, "eager")
    with tiny.float64_casts():
        moe = mi.attach(tiny.build_bridge(hf, "gpt_oss"))
        whole = mi.geometry.measure(moe, rows, **QUICK)
        budget = 300_000
        parts = mi.geometry.measure(moe, rows, memory_budget=budget, store=tmp_path, **QUICK)
        routed = mi.geometry.routed_states(moe, rows, max_tokens=10_000, progress=False)
        weights, biases = mi.geometry.router_weights(moe)
        native = recorded(hf, "gpt_oss", rows)
    assert len(list(tmp_path.glob("*.npz"))) > 1
    inputs = np.stack([native[layer][0] for layer in moe.layers], axis=1)
    trace = mi.RoutingTrace.from_arrays(
        routed.trace.expert_indices,
        sequence_lengths=[len(row) for row in rows],
        n_experts=routed.trace.n_experts,
        layers=routed.trace.layers,
        token_ids=np.concatenate(rows),
        router_inputs=inputs,
    )
    from_trace = mi.geometry.measure(trace, weights=weights, biases=biases, **QUICK)
    for name, value in whole.data.data_vars.items():
        assert parts.data[name].values == pytest.approx(value.values, abs=1e-9, nan_ok=True), name
        # a trace holds its inputs in float32
        assert from_trace.data[name].values == pytest.approx(value.values, rel=1e-3, abs=1e-3, nan_ok=True), name


def test_finished_batches_are_gone_on_from_and_those_of_another_run_are_refused(tmp_path: Path) -> None:
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    options = QUICK | {"store": tmp_path, "memory_budget": 120_000}
    calls: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mi.geometry.measure(moe, sequences(), **(options | {"progress": stop}))
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.npz")}
    assert kept
    resumed = mi.geometry.measure(moe, sequences(), **options)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    fresh = mi.geometry.measure(moe, sequences(), **(options | {"store": None}))
    assert resumed.summary() == fresh.summary()
    with pytest.raises(ResultError, match="seed"):
        mi.geometry.measure(moe, sequences(), **(options | {"seed": 1}))


def test_layers_that_choose_by_token_id_are_left_out_or_refused() -> None:
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("deepseek_v4"), "deepseek_v4"))
    hashed = [layer for layer in moe.layers if type(moe.spec(layer).rule).__name__ == "HashTable"]
    assert hashed
    assert len(hashed) < len(moe.layers)
    with pytest.warns(SkippedLayerWarning, match="choose experts by token id"):
        found = mi.geometry.measure(moe, sequences(), **QUICK)
    assert not set(found.data["layer"].values.tolist()) & set(hashed)
    with pytest.raises(ConfigError, match="a hash layer, which chooses experts by token id"):
        mi.geometry.measure(moe, sequences(), layers=hashed[:1], **QUICK)


def test_a_router_that_is_not_linear_is_refused() -> None:
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    capped = [(moe.hook_name("router_logits", 1), lambda logits, hook: 5 * logits.tanh())]
    with (
        moe.bridge.hooks(fwd_hooks=capped),
        pytest.raises(ConfigError, match="router of layer 1, whose logits are not"),
    ):
        mi.geometry.measure(moe, sequences(), **QUICK)


def test_encoder_decoders_are_refused_by_name() -> None:
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("switch_transformers"), "switch_transformers"))
    with pytest.raises(mi.MoEInterpError, match="encoder"):
        mi.geometry.measure(moe, sequences(), **QUICK)


def test_half_precision_gives_numbers_and_the_model_is_left_as_it_was() -> None:
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe", dtype=torch.bfloat16), "olmoe"))
    moe.bridge.train()
    before = {name: value.clone() for name, value in moe.bridge.original_model.state_dict().items()}
    found = mi.geometry.measure(moe, sequences(), **QUICK)
    assert np.isfinite(found.data["correlation"].values).all()
    assert not found.data["violations"].values.any()
    assert moe.bridge.training
    assert all(torch.equal(value, before[name]) for name, value in moe.bridge.original_model.state_dict().items())


def test_a_prompt_is_compared_with_what_the_model_generates_after_it() -> None:
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    rows = sequences(6, 8)
    before = mi.geometry.measure(moe, rows, **QUICK)
    result = mi.geometry.measure(moe, rows, generate=5, **QUICK)
    trace = mi.capture_routing(moe, rows, generate=5, inputs=True, progress=False)
    assert isinstance(trace, mi.RoutingTrace)
    for name in before.data.data_vars:  # the rest is of the sequences as they were given
        assert result.data[name].values == pytest.approx(before.data[name].values, nan_ok=True), name
    own = np.concatenate([np.arange(n) >= 2 for n in trace.sequence_lengths])  # both first tokens are the same in all
    expected = []
    for layer in range(len(moe.layers)):
        overlap = []
        for number in range(6):
            sets = []
            for phase in ("prefill", "generation"):
                here = (trace.sequence == number) & own & (trace.phase == phase)
                counts = np.bincount(trace.expert_indices[here, layer].ravel(), minlength=trace.n_experts)
                order = np.argsort(-counts, kind="stable")
                n = int(np.searchsorted(np.cumsum(counts[order]), 0.8 * counts.sum() - 1e-9)) + 1
                sets.append(set(order[:n].tolist()))
            overlap.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        expected.append(np.mean(overlap))
    assert result.phases()["phase_same"].to_numpy() == pytest.approx(expected)
    # a captured trace brings its phases, and its weights make the rest of it
    weights, biases = mi.geometry.router_weights(moe)
    of_trace = mi.geometry.measure(trace, weights=weights, biases=biases, **QUICK)
    assert of_trace.phases()["phase_same"].to_numpy() == pytest.approx(expected)


def test_prompts_that_are_repeated_are_generated_from_once() -> None:
    moe = mi.attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    rows = sequences(5, 8)
    with pytest.warns(RepeatedContentWarning):
        twice = mi.geometry.measure(moe, [*rows, rows[0]], generate=3, **QUICK)
    once = mi.geometry.measure(moe, rows, generate=3, **QUICK)
    assert twice.phases()["phase_other"].to_numpy() == pytest.approx(once.phases()["phase_other"].to_numpy())
    assert int(twice.data["n_phase_sequences"]) == 5
