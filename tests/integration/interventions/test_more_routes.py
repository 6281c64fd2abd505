"""Temperature, swapped experts, and routes of chosen positions from another run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.errors import ConfigError, HookError, RouteError
from moe_interp.interventions import (
    ablate_neurons,
    change_top_k,
    promote_experts,
    replay_routes,
    router_temperature,
    routes_from,
    set_routes,
    suppress_experts,
    swap_experts,
)
from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import assert_moved, assert_near
from tests.integration.interventions.support import LEFT, TOKENS, Opened, opened, plain, run, same, see
from tests.integration.interventions.test_replay import record, trace_of

SOME = ("olmoe", "gpt_oss", "deepseek_v3", "llama4", "phimoe", "jetmoe")


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "llama4", "laguna", "gemma4_text"])
def test_a_temperature_is_the_familys_rule_on_divided_logits(name: str) -> None:
    model = opened(name)
    layer = model.native[model.last]
    sharp, seen = see(model, router_temperature(model.moe, model.last, 0.5), model.last)
    chosen = by_hand.chosen_matrix(seen["expert_indices"]).flatten(0, 1)
    reference = by_hand.run(model.hf, name, TOKENS, model.last, lambda z: by_hand.weights(name, layer, z / 0.5, chosen))
    assert_near(sharp, reference.logits)
    assert_moved(sharp, plain(model))
    assert torch.equal(run(model, router_temperature(model.moe, None, 1.0)), plain(model))
    native = see(model, [], model.last)[1]
    if name != "deepseek_v3" and name != "laguna":  # they have a correction bias, which is not divided
        assert torch.equal(seen["expert_indices"].sort(-1).values, native["expert_indices"].sort(-1).values)


def test_a_temperature_moves_the_choice_where_a_correction_bias_is_added_to_the_scores() -> None:
    model = opened("deepseek_v3")
    tokens = tiny.random_tokens(8, 12, seed=5)
    hot, native = (
        see(model, hooks, model.last, tokens=tokens)[1]
        for hooks in (router_temperature(model.moe, model.last, 20.0), [])
    )
    assert not torch.equal(hot["expert_indices"].sort(-1).values, native["expert_indices"].sort(-1).values)
    for wrong in (0.0, -1.0, float("inf"), float("nan"), "hot", None, True):
        with pytest.raises(ConfigError, match=r"temperature=.*a finite number above 0"):
            router_temperature(model.moe, model.last, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SOME)
def test_swapped_experts_stand_in_each_others_slots(name: str) -> None:
    model = opened(name)
    native = see(model, [], model.last)[1]
    a, b = native["expert_indices"][0, 0, 0].item(), (native["expert_indices"][0, 0, 0].item() + 3) % 8
    places = {a: b, b: a}
    expected = [[[places.get(e, e) for e in route] for route in row] for row in native["expert_indices"].tolist()]
    for weights in ("family", "kept"):
        logits, seen = see(model, swap_experts(model.moe, model.last, a, b, weights), model.last)  # type: ignore[arg-type]
        assert seen["expert_indices"].tolist() == expected
        if weights == "kept":
            assert_near(seen["expert_weights"], native["expert_weights"])
        matrix = by_hand.weight_matrix(seen["expert_indices"], seen["expert_weights"]).flatten(0, 1)
        chosen, layer = by_hand.chosen_matrix(seen["expert_indices"]).flatten(0, 1), model.native[model.last]
        reference = by_hand.run(
            model.hf,
            name,
            TOKENS,
            model.last,
            lambda z: matrix if weights == "kept" else by_hand.weights(name, layer, z, chosen),  # noqa: B023
        )
        assert_near(logits, reference.logits)
    twice = [*swap_experts(model.moe, model.last, a, b), *swap_experts(model.moe, model.last, a, b)]
    assert_near(run(model, twice), plain(model))
    for bad in ((a, a), (a, 8), (a, -1)):
        with pytest.raises(RouteError, match=r"swap_experts"):
            swap_experts(model.moe, model.last, *bad)


# --- routes of another run ------------------------------------------------------------------------------------


def at(model: Opened, hooks: Any, **inputs: Any) -> dict[str, Tensor]:
    return see(model, hooks, model.last, **inputs)[1]


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_positions_take_the_routes_of_other_positions_and_rows(name: str) -> None:
    model = opened(name)
    other = tiny.random_tokens(3, 9, seed=11)
    cache = record(model, tokens=other)
    recorded = (
        model.moe.cached(cache, "expert_indices", model.last),
        model.moe.cached(cache, "expert_weights", model.last),
    )
    native = at(model, [])
    for source in (cache, trace_of(model, cache, torch.ones_like(other))):
        hooks = routes_from(
            model.moe, source, [model.last], positions=[1, -1], source_positions=[7, -9], source_rows=[2, 0]
        )
        seen = at(model, hooks)
        for name_, values in zip(("expert_indices", "expert_weights"), recorded):
            for row, source_row in enumerate((2, 0)):
                assert torch.equal(seen[name_][row, 1], values[source_row, 7])
                assert torch.equal(seen[name_][row, 5], values[source_row, 0])
            assert torch.equal(seen[name_][:, [0, 2, 3, 4]], native[name_][:, [0, 2, 3, 4]])
    own = at(model, routes_from(model.moe, cache, [model.last], positions=[2], source_positions=[0], weights="family"))
    given = at(model, set_routes(model.moe, model.last, recorded[0][:2, [0] * 6], positions=[2]))
    assert same(own, given, torch.ones_like(TOKENS, dtype=torch.bool))


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_without_padding_in_both_runs(side: str) -> None:
    model = opened("olmoe")
    mask = LEFT if side == "left" else LEFT.flip(-1)
    real = mask[0].bool()
    alone = record(model, tokens=TOKENS[:1, real])
    padded = record(model, attention_mask=mask)
    target = tiny.random_tokens(2, 6, seed=12)
    hooks = routes_from(model.moe, alone, [model.last], positions=[0, 2], source_positions=[1, 3])
    expected = at(model, hooks, tokens=target)
    for source, source_mask in ((alone, None), (alone, torch.ones(1, 4)), (padded, mask)):
        hooks = routes_from(model.moe, source, [model.last], [0, 2], [1, 3], 0, source_mask=source_mask)
        assert torch.equal(at(model, hooks, tokens=target)["expert_indices"], expected["expert_indices"])
    # into a padded batch: the positions are those of each row's real tokens
    trace = trace_of(model, alone, torch.ones(1, 4, dtype=torch.int64))
    hooks = routes_from(model.moe, trace, [model.last], [0, 2], [1, 3], attention_mask=mask)
    seen = at(model, hooks, tokens=target, attention_mask=mask)["expert_indices"]
    recorded = model.moe.cached(alone, "expert_indices", model.last)[0]
    for row in range(2):
        columns = mask[row].nonzero().flatten()
        assert torch.equal(seen[row, columns[0]], recorded[1])
        assert torch.equal(seen[row, columns[2]], recorded[3])


def test_routes_that_cannot_be_placed_are_refused() -> None:
    model = opened("olmoe")
    moe, cache = model.moe, record(opened("olmoe"))
    for build, error, text in (
        (
            lambda: routes_from(moe, cache, positions=[0], source_positions=[0, 1]),
            ConfigError,
            r"for 1 listed positions",
        ),
        (lambda: routes_from(moe, cache, source_positions=[0]), ConfigError, r"one integer for each of `positions`"),
        (
            lambda: routes_from(moe, cache, positions=[0], source_positions=["a"]),
            ConfigError,
            r"source_positions=\['a'\]",
        ),
        (lambda: routes_from(moe, cache, weights="own"), ConfigError, r"weights='own'"),  # type: ignore[arg-type]
        (lambda: routes_from(moe, cache, source_rows=2), ConfigError, r"source_rows=2.*rows from 0 to 1"),
        (lambda: routes_from(moe, cache, source_mask=torch.ones(2, 5)), RouteError, r"source_mask of shape \(2, 5\)"),
        (lambda: routes_from(moe, {}), RouteError, r"no recorded routes for layer 0"),
        (lambda: routes_from(moe, cache, [7]), HookError, r"layer 7"),
    ):
        with pytest.raises(error, match=text):
            build()
    before = plain(model)
    for hooks, text, inputs in (
        (routes_from(moe, cache, positions=[0], source_positions=[6]), r"the trace does not hold", {}),
        (routes_from(moe, cache, attention_mask=LEFT), r"a cache without its mask", {"attention_mask": LEFT}),
        (routes_from(moe, cache, source_rows=[0, 1]), r"2 source_rows for a pass of 3", {"tokens": TOKENS[[0, 1, 0]]}),
    ):
        with pytest.raises((RouteError, ConfigError), match=text):
            run(model, hooks, **inputs)
        assert torch.equal(plain(model), before)


# --- what is named wrongly ------------------------------------------------------------------------------------


def test_layers_and_experts_that_are_not_there_are_refused_before_any_pass() -> None:
    moe = opened("olmoe").moe
    for build, error, text in (
        (lambda: promote_experts(moe, 1, 8), RouteError, r"expert id 8 at promote_experts"),
        (lambda: promote_experts(moe, 1, [0, 1, 2]), ConfigError, r"3 experts to promote at layer 1.*at most the 2"),
        (lambda: promote_experts(moe, 1, []), ConfigError, r"no experts for promote_experts"),
        (lambda: promote_experts(moe, 9, 0), HookError, r"layer 9, which does not exist"),
        (lambda: promote_experts(moe, [0, 0], 0), ConfigError, r"each once"),
        (lambda: promote_experts(moe, [], 0), ConfigError, r"each once"),
        (lambda: promote_experts(moe, [0, 1], {0: 1}), ConfigError, r"experts for each of the layers, and no others"),
        (lambda: promote_experts(moe, 0, {0: 1, 1: 1}), ConfigError, r"experts for each of the layers"),
        (lambda: promote_experts(moe, None, {}), ConfigError, r"experts of layers \[\]"),
        (lambda: promote_experts(moe, None, {5: 1}), HookError, r"layer 5"),
        (lambda: promote_experts(moe, 1, 0, margin=-1.0), ConfigError, r"margin=-1.0.*nats from 0 to 500, or None"),
        (lambda: promote_experts(moe, 1, 0, margin=float("nan")), ConfigError, r"margin=nan"),
        (lambda: suppress_experts(moe, 1, range(7)), ConfigError, r"1 experts left of 8 at layer 1.*at least the 2"),
        (lambda: suppress_experts(moe, 1, [1, 1]), RouteError, r"expert 1 twice"),
        (lambda: suppress_experts(moe, None, {0: 1, "0": 2}), ConfigError, r"no others"),
        (lambda: change_top_k(moe, 9, 1), HookError, r"layer 9"),
        (lambda: swap_experts(moe, 1, 0, 1, "same"), ConfigError, r"weights='same'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=text):
            build()
    assert len(promote_experts(moe, -1, {-1: {3}})) == 1
    assert len(suppress_experts(moe, (0, 1), torch.tensor([2, 3]))) == 2


def test_what_is_no_number_at_all_is_refused_in_words() -> None:
    model = opened("olmoe")
    moe, routes = model.moe, model.bridge.run_with_cache(TOKENS)[1]
    for build, error, text in (
        (lambda: promote_experts(moe, 1, 2**70), RouteError, r"expert id \d+ at promote_experts"),
        (lambda: ablate_neurons(moe, 1, 0, {1, "a"}), ConfigError, r"different integers"),  # type: ignore[arg-type]
        (lambda: set_routes(moe, 1, [True, False]), RouteError, r"dtype torch.bool"),
        (lambda: promote_experts(moe, 1, 0, attention_mask="x"), ConfigError, r"attention mask 'x'"),  # type: ignore[arg-type]
        (lambda: routes_from(moe, routes, source_rows=[True, False]), ConfigError, r"source_rows=\[True"),
        (lambda: routes_from(moe, routes, source_rows="x"), ConfigError, r"source_rows='x'"),  # type: ignore[arg-type]
        (lambda: routes_from(moe, routes, source_mask="x"), ConfigError, r"source_mask 'x'"),  # type: ignore[arg-type]
        (lambda: routes_from(moe, None), RouteError, r"routes from 'None' of type NoneType"),
        (lambda: routes_from(moe, TOKENS), RouteError, r"of type Tensor"),
    ):
        with pytest.raises(error, match=text):
            build()
    assert len(promote_experts(moe, 1, torch.tensor(3, dtype=torch.uint8))) == 1
    with pytest.raises(RouteError, match=r"row 2, position 0 .*does not hold"):
        run(model, routes_from(moe, routes), TOKENS.repeat(2, 1))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_prompts_routes_serve_its_beams_and_samples(options: dict[str, Any]) -> None:
    model = opened("olmoe")
    source = model.bridge.run_with_cache(TOKENS.flip(-1))[1]
    theirs = source["expert_indices", 1]
    for hooks, expected in (
        (routes_from(model.moe, source, [1]), theirs),
        (routes_from(model.moe, source, [1], source_rows=[1, 0]), theirs.flip(0)),
        (replay_routes(model.moe, source, [1], positions=None), theirs),
    ):
        found: list[Tensor] = []
        keep = (model.moe.hook_name("expert_indices", 1), lambda value, hook, found=found: found.append(value.clone()))
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=[*hooks, keep]):
            model.bridge.original_model.generate(
                TOKENS, max_new_tokens=2, **{"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
            )
        assert torch.equal(found[0], expected.repeat_interleave(2, dim=0))


def test_encoder_decoder_layers_are_one_label_or_several() -> None:
    model = opened("switch_transformers")
    for layer in (("decoder", 1), [("encoder", 1), ("decoder", 1)], "decoder.1"):
        hooks = promote_experts(model.moe, layer, 5)  # type: ignore[arg-type]
        assert (see(model, hooks, ("decoder", 1))[1]["expert_indices"] == 5).all()
        assert len(hooks) == (2 if isinstance(layer, list) else 1)
