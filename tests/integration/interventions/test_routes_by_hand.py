"""Forced, given, uniform and biased routes against layers computed by hand from the transformers weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.interventions import bias_router, force_experts, set_routes, uniform_routing
from tests import tiny
from tests.integration.hooks import by_hand
from tests.integration.hooks.support import assert_moved, assert_near, is_hash_routed
from tests.integration.interventions.support import TOKENS, Opened, opened, plain, see

# biases are given to families that rank by more than logits; test_bias_limits.py is about what they cannot do there
pytestmark = pytest.mark.filterwarnings("ignore::moe_interp.interventions.router.BiasLimitWarning")

BATCH, POS = TOKENS.shape
SCALES_INPUT = ("llama4", "llama4_vl")


def own_weights(model: Opened) -> Tensor:
    """The last layer's weights ``[token, expert]`` of its own routes, by hand."""
    chosen = by_hand.chosen_matrix(see(model, [], model.last)[1]["expert_indices"]).flatten(0, 1)
    layer = model.native[model.last]
    native = by_matrix(model, lambda z: by_hand.weights(model.name, layer, z, chosen))
    assert_near(native.logits, plain(model))
    return native.weights


def by_matrix(model: Opened, matrix: Any) -> by_hand.Reference:
    return by_hand.run(model.hf, model.name, TOKENS, model.last, matrix)


def one_hot(expert: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(expert), 8).float().expand(BATCH * POS, 8)


def test_a_forced_expert_is_the_only_one_and_has_weight_one(family: str) -> None:
    model = opened(family)
    for layer in model.labels:
        logits, seen = see(model, force_experts(model.moe, layer, 3), layer)
        assert torch.equal(seen["expert_indices"], torch.full((BATCH, POS, 1), 3))
        assert torch.equal(seen["expert_weights"], torch.ones(BATCH, POS, 1))
        assert_moved(logits, plain(model))
    assert_near(logits, by_matrix(model, lambda z: one_hot(3)).logits)


def test_a_forced_expert_of_natural_mass_has_the_sum_of_the_tokens_own_weights(family: str) -> None:
    model = opened(family)
    mass = own_weights(model).sum(-1, keepdim=True)
    logits, seen = see(model, force_experts(model.moe, model.last, 5, mass="natural"), model.last)
    assert torch.equal(seen["expert_indices"], torch.full((BATCH, POS, 1), 5))
    assert_near(seen["expert_weights"].reshape(-1, 1), mass)
    assert_near(logits, by_matrix(model, lambda z: one_hot(5) * mass).logits)


def test_natural_masses_differ_between_families_and_tokens() -> None:
    """Otherwise the test above could not tell a token's own mass from another's."""
    masses = {name: own_weights(opened(name)).sum(-1) for name in ("olmoe", "deepseek_v2", "deepseek_v3")}
    assert masses["olmoe"].std() > 0.02
    assert masses["deepseek_v2"].std() > 0.02
    assert_near(masses["deepseek_v3"], torch.full((BATCH * POS,), 2.5))


def test_several_forced_experts_have_the_familys_weights(family: str) -> None:
    model = opened(family)
    forced = torch.tensor([6, 1, 4])
    layer = model.native[model.last]
    chosen = by_hand.chosen_matrix(forced.expand(BATCH * POS, 3))
    expected = by_matrix(model, lambda z: by_hand.weights(family, layer, z, chosen))
    logits, seen = see(model, force_experts(model.moe, model.last, [6, 1, 4]), model.last)
    assert torch.equal(seen["expert_indices"], forced.expand(BATCH, POS, 3))
    assert_near(seen["expert_weights"].reshape(-1, 3), expected.weights[:, forced])
    assert_near(logits, expected.logits)


def test_several_forced_experts_have_given_weights(family: str) -> None:
    model = opened(family)
    matrix = torch.zeros(BATCH * POS, 8)
    matrix[:, 6], matrix[:, 1] = 0.75, -0.5
    logits, seen = see(model, force_experts(model.moe, model.last, [6, 1], weights=[0.75, -0.5]), model.last)
    assert seen["expert_weights"].unique(dim=1).tolist() == [[[0.75, -0.5]]] * BATCH
    assert_near(logits, by_matrix(model, lambda z: matrix).logits)


def test_uniform_routing_is_the_average_of_all_experts(family: str) -> None:
    model = opened(family)
    on_input = family in SCALES_INPUT
    reference = by_matrix(model, lambda z: torch.full((BATCH * POS, 8), 1.0 if on_input else 1 / 8))
    hooks = uniform_routing(model.moe, [model.last])
    logits, seen = see(model, hooks, model.last, "expert_indices", "expert_weights", "routed_out")
    assert torch.equal(seen["expert_indices"], torch.arange(8).expand(BATCH, POS, 8))
    assert torch.equal(seen["expert_weights"], torch.full((BATCH, POS, 8), 1.0 if on_input else 1 / 8))
    assert_near(seen["routed_out"].flatten(0, 1), reference.outputs.mean(1))
    if not on_input:  # there the reference adds the experts up
        assert_near(logits, reference.logits)
    assert_moved(logits, plain(model))


def test_uniform_routing_of_natural_mass_scales_the_average(family: str) -> None:
    model = opened(family)
    mass = own_weights(model).sum(-1, keepdim=True)
    matrix = torch.ones(BATCH * POS, 8) if family in SCALES_INPUT else mass.expand(-1, 8) / 8
    reference = by_matrix(model, lambda z: matrix)
    _, seen = see(model, uniform_routing(model.moe, [model.last], mass="natural"), model.last, "routed_out")
    assert_near(seen["routed_out"].flatten(0, 1), reference.outputs.mean(1) * mass)


def test_uniform_routing_takes_all_layers_by_default() -> None:
    for name in ("qwen2_moe", "switch_transformers"):
        model = opened(name)
        for layer in model.labels:
            _, seen = see(model, uniform_routing(model.moe), layer)
            assert torch.equal(seen["expert_indices"], torch.arange(8).expand(BATCH, POS, 8))
        labelled = uniform_routing(model.moe, [f"{layer[0]}.{layer[1]}" if isinstance(layer, tuple) else str(layer)])  # type: ignore[list-item]
        assert [hook for hook, _ in labelled] == [hook for hook, _ in uniform_routing(model.moe, [layer])]


# --- given routes ---------------------------------------------------------------------------------------------

BY_POSITION = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [1, 6], [3, 0]])
BY_TOKEN = torch.stack([BY_POSITION, BY_POSITION.flip(0)])


@pytest.mark.parametrize("routes", [torch.tensor([4, 2]), BY_POSITION, BY_TOKEN, BY_TOKEN[:1], [7, 0, 3], [[5]]])
def test_given_routes_broadcast_to_every_token(routes: Any) -> None:
    for name in ("olmoe", "llama4", "gpt_oss"):
        model = opened(name)
        _, seen = see(model, set_routes(model.moe, model.last, routes), model.last)
        expected = torch.as_tensor(routes).expand(BATCH, POS, -1)
        assert torch.equal(seen["expert_indices"], expected)
        rule, logits = model.moe.spec(model.last).rule, see(model, [], model.last, "router_logits")[1]["router_logits"]
        assert torch.equal(seen["expert_weights"], rule.weights(logits, expected))


def test_routes_with_gaps_keep_each_weight_with_its_expert(family: str) -> None:
    """Tokens with no, one and two experts side by side; an empty slot before a full one."""
    model = opened(family)
    routes = torch.tensor([[-1, 3], [-1, -1], [2, 6], [7, -1], [-1, 0], [1, 4]])
    given = torch.tensor([[9.0, 0.5], [9.0, 9.0], [0.25, 1.5], [2.0, 9.0], [9.0, 1.0], [-0.5, 0.75]])
    matrix = by_hand.weight_matrix(routes, given).repeat(BATCH, 1)
    logits, seen = see(model, set_routes(model.moe, model.last, routes, given), model.last)
    assert seen["expert_indices"][0].tolist() == [[3, -1], [-1, -1], [2, 6], [7, -1], [0, -1], [1, 4]]
    assert_near(logits, by_matrix(model, lambda z: matrix).logits)
    without, _ = see(model, set_routes(model.moe, model.last, routes), model.last)
    layer, chosen = model.native[model.last], by_hand.chosen_matrix(routes).repeat(BATCH, 1)
    assert_near(without, by_matrix(model, lambda z: by_hand.weights(family, layer, z, chosen)).logits)


# --- biases ---------------------------------------------------------------------------------------------------


def test_a_bias_acts_as_the_same_bias_of_an_untouched_router(family: str) -> None:
    """The native router's linear map, with the bias added to its output by a hook of torch's own."""
    model = opened(family)
    bias = 2.0 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    logits = see(model, bias_router(model.moe, model.last, bias), model.last)[0]
    before, after = (see(model, hooks, model.last)[1] for hooks in ([], bias_router(model.moe, model.last, bias)))
    assert is_hash_routed(model, model.last) or not torch.equal(before["expert_indices"], after["expert_indices"])
    layer, found = model.native[model.last], by_hand.chosen_matrix(after["expert_indices"]).flatten(0, 1)
    expected = by_matrix(model, lambda z: by_hand.weights(family, layer, z + bias, found))
    assert_near(logits, expected.logits)
    rule, clean = model.moe.spec(model.last).rule, see(model, [], model.last, "router_logits")[1]["router_logits"]
    assert torch.equal(after["expert_indices"], rule.route(clean + bias)[0])


def test_no_bias_changes_nothing_and_minus_infinity_shuts_an_expert_out() -> None:
    for name in ("olmoe", "gpt_oss", "llama4", "phimoe", "switch_transformers"):
        model = opened(name)
        for layer in model.labels:
            assert torch.equal(see(model, bias_router(model.moe, layer, [0.0] * 8), layer)[0], plain(model))
        shut = [0.0, float("-inf"), 0, 0, float("-inf"), 0, 0, 0]
        used = see(model, bias_router(model.moe, model.last, shut), model.last)[1]["expert_indices"]
        assert not torch.isin(used, torch.tensor([1, 4])).any()
        assert torch.isin(see(model, [], model.last)[1]["expert_indices"], torch.tensor([1, 4])).any()


def test_a_bias_carries_its_gradient() -> None:
    model = opened("olmoe")
    bias = torch.zeros(8, requires_grad=True)
    with model.bridge.hooks(fwd_hooks=bias_router(model.moe, 1, bias)):
        model.bridge(TOKENS, return_type="loss").backward()
    assert bias.grad is not None
    assert (bias.grad.abs() > 0).all()
    model.bridge.zero_grad()


def test_tiny_models_are_what_these_tests_take_them_for(family: str) -> None:
    assert all(spec.n_experts == 8 for spec in opened(family).moe)
    assert tiny.native_layers(opened(family).hf).keys() == set(opened(family).labels)
