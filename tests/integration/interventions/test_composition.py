"""Several interventions in one run: lists are joined, later ones see what earlier ones wrote, the last one wins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_interp.interventions import (
    ablate_experts,
    bias_router,
    force_experts,
    random_routing,
    replay_routes,
    set_routes,
    uniform_routing,
)
from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import assert_near
from tests.integration.interventions.support import TOKENS, Opened, opened, plain, run, same, see

SOME = ("olmoe", "llama4", "deepseek_v3", "jetmoe")
COLUMN = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
EVERY = torch.ones_like(TOKENS, dtype=torch.bool)


def routed(model: Opened, hooks: list) -> dict[str, Tensor]:
    return see(model, hooks, model.last, "expert_indices", "expert_weights", "routed_out")[1]


@pytest.mark.parametrize("name", [*SOME, "qwen3_next", "switch_transformers"])
def test_interventions_at_different_layers_act_each_at_its_own(name: str) -> None:
    model = opened(name)
    first, last = model.labels[0], model.labels[-1]
    hooks = [*force_experts(model.moe, first, 2), *uniform_routing(model.moe, [last])]
    assert (see(model, hooks, first)[1]["expert_indices"] == 2).all()
    assert (see(model, hooks, last)[1]["expert_indices"] == torch.arange(8)).all()
    assert torch.equal(run(model, hooks), run(model, hooks[::-1]))
    with model.bridge.hooks(fwd_hooks=hooks[:2]):
        assert torch.equal(run(model, hooks[2:]), run(model, hooks))
    assert torch.equal(plain(model), run(model, []))


@pytest.mark.parametrize("name", SOME)
def test_interventions_at_different_positions_stay_apart(name: str) -> None:
    model = opened(name)
    moe, last = model.moe, model.last
    parts = [
        (force_experts(moe, last, 3, mass="natural", positions=[0]), COLUMN == 0),
        (uniform_routing(moe, [last], mass="natural", positions=[1]), COLUMN == 1),
        (random_routing(moe, [last], seed=3, positions=[2]), COLUMN == 2),
        (set_routes(moe, last, [6, 1, 4], [0.1, 0.2, 0.3], positions=[3]), COLUMN == 3),
        (ablate_experts(moe, last, range(8), positions=[4]), COLUMN == 4),
    ]
    for order in (parts, parts[::-1]):
        together = routed(model, [hook for hooks, _ in order for hook in hooks])
        for hooks, there in parts:
            alone = routed(model, hooks)
            assert same(together, alone, there)
            assert_near(together["routed_out"][there], alone["routed_out"][there])
        native = routed(model, [])
        assert same(together, native, COLUMN == 5)


@pytest.mark.parametrize("name", ["olmoe", "llama4"])
def test_of_two_routes_for_a_token_the_later_one_runs_with_its_own_weights(name: str) -> None:
    model = opened(name)
    moe, last = model.moe, model.last
    names = moe.filter("expert_indices", layers=[last])
    with torch.no_grad():
        cache = moe.bridge.run_with_cache(tiny.random_tokens(2, 6, seed=9), names_filter=names)[1]
    writers = {
        "one": force_experts(moe, last, 3),
        "several": force_experts(moe, last, [5, 0]),
        "weighted": force_experts(moe, last, [2, 6], weights=[0.5, -2.0]),
        "uniform": uniform_routing(moe, [last]),
        "set": set_routes(moe, last, [1, 7, 4]),
        "replayed": replay_routes(moe, cache, [last]),
    }
    alone = {kind: routed(model, hooks) for kind, hooks in writers.items()}
    for earlier, first in writers.items():
        for later, second in writers.items():
            if earlier != later:
                both = routed(model, [*first, *second])
                assert same(both, alone[later], EVERY), (earlier, later)
                assert_near(both["routed_out"], alone[later]["routed_out"], where=(earlier, later))


@pytest.mark.parametrize("name", SOME)
def test_a_background_for_all_tokens_and_an_exception_for_one(name: str) -> None:
    model = opened(name)
    moe, last = model.moe, model.last
    one = COLUMN == 2
    backgrounds = [force_experts(moe, last, 3), uniform_routing(moe, [last]), random_routing(moe, [last])]
    for background in backgrounds:
        for exception in (
            set_routes(moe, last, [1, 7], positions=[2]),
            force_experts(moe, last, 5, positions=[2]),
            uniform_routing(moe, [last], positions=[2]),
        ):
            both = routed(model, [*background, *exception])
            assert same(both, routed(model, exception), one)
            assert same(both, routed(model, background), ~one)
            assert_near(both["routed_out"][one], routed(model, exception)["routed_out"][one])
            assert_near(both["routed_out"][~one], routed(model, background)["routed_out"][~one])


def test_random_routes_after_other_routes_keep_the_familys_weights() -> None:
    for name in SOME:
        model = opened(name)
        hooks = [*set_routes(model.moe, model.last, [0, 1], [5.0, 5.0]), *random_routing(model.moe, [model.last])]
        seen = see(model, hooks, model.last)[1]
        assert same(seen, see(model, random_routing(model.moe, [model.last]), model.last)[1], EVERY)


def test_writing_the_same_route_again_takes_the_later_weights() -> None:
    for name in SOME:
        model = opened(name)
        later = set_routes(model.moe, model.last, [3])
        both = see(model, [*force_experts(model.moe, model.last, 3), *later], model.last)[1]
        assert same(both, see(model, later, model.last)[1], EVERY)


def test_ablation_acts_on_the_route_that_runs() -> None:
    """Before or after the intervention that sends all tokens to other experts."""
    for name in ("olmoe", "llama4", "gpt_oss"):
        model = opened(name)
        forced, two = force_experts(model.moe, model.last, 3), set_routes(model.moe, model.last, [4, 6])
        for mode in ("zero", "mean", "resample"):
            other = ablate_experts(model.moe, model.last, [0, 1, 2, 5, 7], mode=mode)
            for route in (forced, two):
                for hooks in ([*other, *route], [*route, *other]):
                    assert_near(run(model, hooks), run(model, route), where=(name, mode))
        half = routed(model, [*two, *ablate_experts(model.moe, model.last, 4)])["expert_weights"]
        assert torch.equal(half[..., 0], torch.zeros(2, 6))
        assert torch.equal(half[..., 1], routed(model, two)["expert_weights"][..., 1])
        rerouted = see(model, [*two, *ablate_experts(model.moe, model.last, 4, mode="reroute")], model.last)[1]
        assert (rerouted["expert_indices"][..., 0] == 6).all()
        assert not torch.isin(rerouted["expert_indices"], torch.tensor([4, -1])).any()


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v2", "llama4"])
def test_a_biased_router_is_what_the_others_start_from_wherever_it_stands(name: str) -> None:
    bias = torch.tensor([2.0, -1, 0, 1, 3, 0, -2, 1])
    model = opened(name)
    biased = bias_router(model.moe, model.last, bias)
    layer = model.native[model.last]
    chosen = by_hand.chosen_matrix(see(model, biased, model.last)[1]["expert_indices"]).flatten(0, 1)
    reference = by_hand.run(
        model.hf, name, TOKENS, model.last, lambda z: by_hand.weights(name, layer, z + bias, chosen)
    )
    mass = reference.weights.sum(-1).view(2, 6, 1)
    natural = force_experts(model.moe, model.last, 5, mass="natural")
    for hooks in ([*biased, *natural], [*natural, *biased]):
        assert_near(see(model, hooks, model.last)[1]["expert_weights"], mass)
    rerouted = ablate_experts(model.moe, model.last, [4], mode="reroute")
    before, after = (see(model, h, model.last)[1] for h in ([*biased, *rerouted], [*rerouted, *biased]))
    assert same(before, after, EVERY)


def test_natural_mass_follows_written_scores() -> None:
    model = opened("olmoe")
    halved = (model.moe.hook_name("router_probs", 1), lambda value, hook: value / 2)
    natural = force_experts(model.moe, 1, 5, mass="natural")
    plain_mass, mass = (see(model, hooks, 1)[1]["expert_weights"] for hooks in (natural, [*natural, halved]))
    assert_near(mass, plain_mass / 2)


def test_an_interventions_own_list_can_be_used_again_and_again() -> None:
    model = opened("olmoe")
    hooks = [
        *uniform_routing(model.moe, [0], mass="natural"),
        *ablate_experts(model.moe, 1, 3, mode="mean"),
        *force_experts(model.moe, 2, 1, mass="natural", positions=[0, -1]),
    ]
    first = run(model, hooks)
    run(model, hooks, tiny.random_tokens(1, 3))
    assert torch.equal(run(model, hooks), first)
    with pytest.raises(ZeroDivisionError):  # a run that breaks off leaves nothing behind
        run(model, [*hooks, (model.moe.hook_name("expert_weights", 0), lambda value, hook: 1 / 0)])
    assert torch.equal(run(model, hooks), first)
