"""Replayed routes: a run's own change nothing, another run's are taken over, and no step outside them is guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_interp.errors import ConfigError, RouteError
from moe_interp.hooks.attach import attach
from moe_interp.interventions import force_experts, random_routing, replay_routes, routes_from
from moe_interp.traces import RoutingTrace
from tests import tiny
from tests.integration.interventions.support import (
    LEFT,
    RIGHT,
    TOKENS,
    Opened,
    opened,
    plain,
    routes_in_generation,
    run,
    same,
    see,
)

PADDED = ("olmoe", "llama4", "gpt_oss", "deepseek_v3")
ROUTE = ("expert_indices", "expert_weights")
EVERYWHERE = torch.ones_like(LEFT, dtype=torch.bool)


def record(model: Opened, hooks: Any = (), tokens: Tensor = TOKENS, names: Any = ROUTE, **options: Any) -> Any:
    """The cache of a run, with its routes only."""
    inputs, keep = tiny.model_inputs(model.name, tokens), model.moe.filter(*names)
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=list(hooks)):
        return model.bridge.run_with_cache(tokens, names_filter=keep, **inputs, **options)[1]


def trace_of(model: Opened, cache: Any, mask: Tensor, with_weights: bool = True) -> RoutingTrace:
    """The real tokens of a recorded batch as a trace, sequence after sequence."""
    real = mask.bool()

    def stack(name: str) -> Tensor:
        return torch.stack([model.moe.cached(cache, name, layer)[real] for layer in model.labels], dim=1)

    return RoutingTrace.from_arrays(
        stack("expert_indices"),
        stack("expert_weights") if with_weights else None,
        sequence_lengths=mask.sum(-1).tolist(),
        n_experts=8,
        layers=model.labels,  # type: ignore[arg-type]
    )


def test_a_runs_own_routes_change_nothing(family: str) -> None:
    model = opened(family)
    expected = plain(model)
    assert torch.equal(run(model, replay_routes(model.moe, record(model))), expected)
    assert torch.equal(run(model, replay_routes(model.moe, record(model, names=ROUTE[:1]))), expected)


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_a_trace_of_ragged_sequences_changes_nothing_in_its_own_padded_batch(mask: Tensor) -> None:
    for name in PADDED:
        model = opened(name)
        trace = trace_of(model, record(model, attention_mask=mask), mask)
        assert trace.sequence_lengths.tolist() == [4, 6]
        expected = plain(model, attention_mask=mask)
        hooks = replay_routes(model.moe, trace, attention_mask=mask)
        assert torch.equal(run(model, hooks, attention_mask=mask), expected)


def test_a_trace_recorded_with_one_padding_is_replayed_in_another() -> None:
    for name in PADDED:
        model = opened(name)
        routes = random_routing(model.moe, seed=1, attention_mask=LEFT)
        trace = trace_of(model, record(model, routes, attention_mask=LEFT), LEFT)
        hooks = replay_routes(model.moe, trace, attention_mask=RIGHT)
        replayed = see(model, hooks, model.last, attention_mask=RIGHT)[1]
        column = list(trace.layers).index(model.last)
        assert np.array_equal(replayed["expert_indices"][RIGHT.bool()], trace.expert_indices[:, column])
        assert trace.expert_weights is not None
        assert np.array_equal(replayed["expert_weights"][RIGHT.bool()], trace.expert_weights[:, column])


def test_routes_of_another_run_are_taken_over_with_or_without_its_weights(family: str) -> None:
    model = opened(family)
    other = tiny.random_tokens(2, 6, seed=9)
    for names in (ROUTE, ROUTE[:1]):
        cache = record(model, tokens=other, names=names)
        seen = see(model, replay_routes(model.moe, cache, [model.last]), model.last)[1]
        assert torch.equal(seen["expert_indices"], model.moe.cached(cache, "expert_indices", model.last))
        if len(names) == 2:
            assert torch.equal(seen["expert_weights"], model.moe.cached(cache, "expert_weights", model.last))
    logits = see(model, [], model.last, "router_logits")[1]["router_logits"]
    assert torch.equal(seen["expert_weights"], model.moe.spec(model.last).rule.weights(logits, seen["expert_indices"]))


def test_routes_of_different_width_and_with_gaps_are_replayed() -> None:
    model = opened("olmoe")
    forced = [*force_experts(model.moe, 1, [5, 0, 3], positions=[1]), *force_experts(model.moe, 1, 4, positions=[2])]
    once = see(model, forced, 1)[1]
    cache = record(model, forced)
    assert torch.equal(run(model, replay_routes(model.moe, cache)), run(model, forced))
    assert same(see(model, replay_routes(model.moe, cache), 1)[1], once, EVERYWHERE)
    gaps = RoutingTrace.from_arrays(
        np.array([[[-1, 3]], [[2, -1]]]), np.array([[[0.0, 0.5]], [[0.25, 0.0]]]), n_experts=8, layers=[1]
    )
    seen = see(model, replay_routes(model.moe, gaps), 1, tokens=TOKENS[:1, :2])[1]
    assert seen["expert_indices"].tolist() == [[[3], [2]]]
    assert seen["expert_weights"].tolist() == [[[0.5], [0.25]]]


def test_replay_reaches_chosen_layers_and_positions_only() -> None:
    model = opened("olmoe")
    native, cache = see(model, [], 0)[1], record(model, tokens=tiny.random_tokens(2, 6, seed=9))
    hooks = replay_routes(model.moe, cache, layers=[0], positions=[1, -1])
    assert {name for name, _ in hooks} == {model.moe.hook_name(name, 0) for name in ROUTE}
    seen = see(model, hooks, 0)[1]
    there = torch.zeros_like(EVERYWHERE)
    there[:, [1, 5]] = True
    recorded = {name: model.moe.cached(cache, name, 0) for name in ROUTE}
    assert same(seen, recorded, there)
    assert same(seen, native, ~there)


def test_a_cache_without_its_batch_axis_is_replayed() -> None:
    model = opened("olmoe")
    cache = record(model, tokens=TOKENS[:1], remove_batch_dim=True)
    assert not cache.has_batch_dim
    other = tiny.random_tokens(1, 6, seed=9)
    found = see(model, replay_routes(model.moe, cache), 2, tokens=other)[1]["expert_indices"]
    assert torch.equal(found[0], cache["expert_indices", 2])


def test_a_recorded_prompt_is_replayed_under_generate_up_to_its_end() -> None:
    model = opened("olmoe")
    long = tiny.random_tokens(2, 8, seed=9)
    cache = record(model, tokens=long)
    for source in (cache, trace_of(model, cache, torch.ones_like(long))):
        steps = routes_in_generation(model, replay_routes(model.moe, source), 1, 3)
        assert torch.equal(torch.cat(steps, dim=1), cache["expert_indices", 1])
        with pytest.raises(RouteError, match=r"row 0, position 8 at blocks.0.hook_expert_indices, which the trace"):
            routes_in_generation(model, replay_routes(model.moe, source), 1, 4)
        steps = routes_in_generation(model, replay_routes(model.moe, source, positions=None), 1, 4)
        assert torch.equal(steps[0], cache["expert_indices", 1][:, :6])


def test_tokens_outside_the_trace_are_refused() -> None:
    model = opened("olmoe")
    cache = record(model)
    trace = trace_of(model, record(model, attention_mask=RIGHT), RIGHT)
    advice = r"Expected: at most 2 sequences with recorded positions. Replay on the recorded tokens, or limit"
    for source in (cache, trace):
        with pytest.raises(RouteError, match=rf"row 2, position 0 at blocks.0.*{advice}"):
            run(model, replay_routes(model.moe, source), tiny.random_tokens(3, 4))
        with pytest.raises(RouteError, match=r"row 0, position 6 at blocks.0"):
            run(model, replay_routes(model.moe, source, positions=[1, 6]), tiny.random_tokens(2, 7))
    with pytest.raises(RouteError, match=r"row 0, position 4 at blocks.0"):  # the first sequence has four tokens
        run(model, replay_routes(model.moe, trace))
    assert torch.equal(plain(model), run(model, replay_routes(model.moe, cache)))


def test_traces_that_cannot_be_replayed_are_refused() -> None:
    model = opened("qwen2_moe")  # layer 0 is dense
    advice = r"Expected: a RoutingTrace, or a cache with expert_indices. Record them with run_with_cache"
    for empty in ({}, record(model, names=["router_logits"])):
        with pytest.raises(RouteError, match=rf"no recorded routes for layer 1. {advice}"):
            replay_routes(model.moe, empty)
    only_second = RoutingTrace.from_arrays(np.zeros((4, 1, 1), dtype=int), n_experts=8, layers=[2])
    with pytest.raises(RouteError, match=f"no recorded routes for layer 1. {advice}"):
        replay_routes(model.moe, only_second, layers=[1])
    foreign = RoutingTrace.from_arrays(np.zeros((4, 1, 1), dtype=int), n_experts=8, layers=[0])
    with pytest.raises(RouteError, match="no recorded routes for layer 1"):
        replay_routes(model.moe, foreign)
    other = RoutingTrace.from_arrays(np.zeros((4, 1, 1), dtype=int), n_experts=16, layers=[2])
    with pytest.raises(
        RouteError, match=r"a trace of 16 experts for layer 2 with 8.*routes of this model.*recorded on"
    ):
        replay_routes(model.moe, other)
    flat = {model.moe.hook_name("expert_indices", 1): torch.zeros(12, 2, dtype=torch.int64)}
    with pytest.raises(RouteError, match=r"hook_expert_indices of shape \(12, 2\) in the cache.*without pos_slice"):
        replay_routes(model.moe, flat)
    sliced = replay_routes(model.moe, record(model, pos_slice=-1))
    with pytest.raises(RouteError, match=r"row 0, position 1 at blocks.1"):
        run(model, sliced)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "phimoe", "gpt_oss"])
def test_tokens_that_a_trace_does_not_cover_keep_the_models_own_routes(name: str) -> None:
    model = opened(name)
    first, native = model.labels[0], see(model, [], model.labels[0])[1]
    other = trace_of(model, record(model, tokens=tiny.random_tokens(2, 6, seed=9)), EVERYWHERE)
    covered = np.ones((12, len(other.layers)), bool)
    covered[[0, 5, 7]] = False
    trace = RoutingTrace.from_arrays(**other.arrays(), covered=covered)
    seen = see(model, replay_routes(model.moe, trace), first)[1]
    there = torch.tensor(covered[:, 0]).reshape(2, 6)
    taken = {name: getattr(other, name)[:, 0].reshape(2, 6, -1) for name in ROUTE}
    assert same(seen, {name: torch.tensor(values) for name, values in taken.items()}, there)
    assert same(seen, native, ~there)
    bare = RoutingTrace.from_arrays(**other.arrays(), covered=np.zeros(12, bool))
    assert torch.equal(run(model, replay_routes(model.moe, bare)), plain(model))
    # an earlier intervention's route stays where the trace says nothing
    forced = force_experts(model.moe, first, 3)
    both = see(model, [*forced, *replay_routes(model.moe, trace)], first)[1]
    assert (both["expert_indices"][~there] == 3).any(dim=-1).all()
    with pytest.raises(RouteError, match=r"for row 1 at .* from a token that the trace does not cover.*other source"):
        run(model, routes_from(model.moe, trace, positions=[2], source_positions=[1]))
    run(model, routes_from(model.moe, trace, positions=[2], source_positions=[2]))


# --- columns that are MoE layers in order ---------------------------------------------------------------------

DENSE_FIRST = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "llama4", "nemotron_h", "jamba")


def test_columns_in_the_order_of_the_moe_layers_are_replayed_when_said_and_refused_else() -> None:
    for name in DENSE_FIRST:
        model = opened(name)
        cache = record(model)
        named = trace_of(model, cache, EVERYWHERE)
        assert named.layers == model.labels != tuple(range(len(model.labels)))
        arrays = named.arrays()
        by_place = RoutingTrace.from_arrays(**{**arrays, "layers": None})
        expected = plain(model)
        assert torch.equal(run(model, replay_routes(model.moe, by_place, layers="moe")), expected)
        assert torch.equal(run(model, replay_routes(model.moe, named, layers="moe")), expected)
        for layers in (None, [model.last]):
            with pytest.raises(
                RouteError, match=r'a trace of layers \[0, .*in order, as inference engines.*layers="moe"'
            ):
                replay_routes(model.moe, by_place, layers=layers)
        # with a column for every layer, dense ones included, the labels are right but for the dense ones
        n_layers = model.last + 2
        padded = np.full((named.n_tokens, n_layers, named.n_slots), -1)
        padded[:, list(model.labels)] = named.expert_indices
        all_layers = RoutingTrace.from_arrays(
            padded, n_experts=8, sequence_lengths=named.sequence_lengths, layers=range(n_layers)
        )
        with pytest.raises(RouteError, match=r"is no MoE layer of this model.*Name those to replay: layers="):
            replay_routes(model.moe, all_layers)
        assert torch.equal(run(model, replay_routes(model.moe, all_layers, layers=list(model.labels))), expected)


def test_layers_that_the_model_lacks_are_refused_and_not_dropped() -> None:
    model = opened("olmoe")
    cache = record(model)
    named = trace_of(model, cache, EVERYWHERE)
    arrays = named.arrays()
    more = RoutingTrace.from_arrays(**{**arrays, "layers": [0, 1, 5]})
    with pytest.raises(
        RouteError, match=r"a trace of layers \[0, 1, 5\], of which layer 5 is no MoE layer of this model"
    ):
        replay_routes(model.moe, more)
    assert len(replay_routes(model.moe, more, layers=[0, 1])) == 4
    few = RoutingTrace.from_arrays(named.expert_indices[:, :2], n_experts=8, layers=[0, 1])
    with pytest.raises(RouteError, match=r'layers="moe" for a trace of 2 columns and a model with 3 MoE layers'):
        replay_routes(model.moe, few, layers="moe")
    for layers in ("all", [], 3):
        with pytest.raises(ConfigError, match=r'layers=.*layers among \[0, 1, 2\], or "moe"'):
            replay_routes(model.moe, named, layers=layers)  # type: ignore[arg-type]
    foreign = {name: cache[name] for name in cache} | {"blocks.7.hook_expert_indices": cache["expert_indices", 0]}
    with pytest.raises(RouteError, match=r"routes of blocks.7.hook_expert_indices, which is no attached MoE layer"):
        replay_routes(model.moe, foreign)
    assert len(replay_routes(model.moe, foreign, layers=[0])) == 2


def test_hooks_on_some_layers_do_not_silently_drop_the_rest_of_a_trace() -> None:
    model = opened("olmoe")
    named = trace_of(model, record(model), EVERYWHERE)
    with attach(tiny.build_bridge(model.hf, "olmoe"), layers=[2]) as moe:
        with pytest.raises(RouteError, match=r"a trace of layers \[0, 1, 2\], of which layer 0 is not attached.*Name"):
            replay_routes(moe, named)
        with pytest.raises(RouteError, match=r'layers="moe" with hooks on \[2\] only.*Attach to all'):
            replay_routes(moe, named, layers="moe")
        with torch.no_grad():
            logits = moe.bridge.run_with_hooks(TOKENS, fwd_hooks=replay_routes(moe, named, layers=[2]))
    assert torch.equal(logits, plain(model))
