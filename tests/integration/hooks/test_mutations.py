"""A broken implementation fails these tests: each trap is set on purpose, and the test that must notice it is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_interp.arch.rules import RoutingRule
from moe_interp.arch.spec import MoESpec
from moe_interp.hooks import blocks, experts, router
from moe_interp.hooks import layer as layer_module
from moe_interp.hooks.layer import LayerPass, OpenLayer
from tests.integration.hooks import (
    test_gradients,
    test_in_place,
    test_order,
    test_pass_through,
    test_router_edits,
    test_routes,
    test_sums,
)
from tests.integration.hooks.support import opened, patch_mix
from tests.unit.arch.test_rules_native import mutants

Patch = pytest.MonkeyPatch


# --- one mutation of each family's rule -----------------------------------------------------------------------


def without_its_part(name: str, rule: RoutingRule) -> RoutingRule:
    """The rule without the part that its family is known for; the group limits are left to the rules' own tests."""
    broken = mutants(rule)
    if name == "flex_olmo":  # a norm follows its block: of the weights only their ratios matter
        return broken["score"]
    return next(broken[part] for part in KNOWN_FOR if part in broken)


KNOWN_FOR = ("soft-cap", "expert_scale", "jitter", "scale", "bias", "normalisation", "score")


def test_a_rule_without_one_of_its_parts_fails(family: str, monkeypatch: Patch) -> None:
    """Edited logits are then re-routed otherwise than in an untouched model."""
    rule_for = MoESpec.rule_for
    monkeypatch.setattr(MoESpec, "rule_for", lambda self, dtype: without_its_part(family, rule_for(self, dtype)))
    with pytest.raises(AssertionError):
        test_router_edits.test_edited_logits_equal_a_router_that_computes_them(family)


# --- traps of the hooks ---------------------------------------------------------------------------------------


def patch_fire(
    monkeypatch: Patch, change: Callable[[OpenLayer, str, Tensor, Callable[[Tensor], Tensor]], Tensor]
) -> None:
    """Replace the firing of a hook by ``change(layer, name, value, native fire of a value)``."""
    native = OpenLayer._run_hooks

    def run_hooks(self: OpenLayer, name: str, value: Tensor, owned: bool) -> tuple[Tensor, bool]:
        return change(self, name, value, lambda v: native(self, name, v, owned)[0]), True

    monkeypatch.setattr(OpenLayer, "_run_hooks", run_hooks)


def patch_choose(monkeypatch: Patch, change: Callable[..., tuple[Tensor, Tensor, bool]]) -> None:
    native = router.fire_route
    for module in (router, experts):
        monkeypatch.setattr(module, "fire_route", partial(change, native))


def aliased(monkeypatch: Patch) -> None:
    """Hooks get the model's own tensor: an edit in place looks like no edit."""

    def change(layer: OpenLayer, name: str, value: Tensor, fire: Callable[[Tensor], Tensor]) -> Tensor:
        return layer.points[name](value) if name in layer.points and layer.is_hooked(name) else value

    patch_fire(monkeypatch, change)


def returned_only(monkeypatch: Patch) -> None:
    """Edits count only if a hook returns them."""

    def change(layer: OpenLayer, name: str, value: Tensor, fire: Callable[[Tensor], Tensor]) -> Tensor:
        given = value.clone()
        if name not in layer.points or not layer.is_hooked(name):
            return value
        result = layer.points[name](given)
        return value if result is given else result

    patch_fire(monkeypatch, change)


def detached(monkeypatch: Patch) -> None:
    patch_fire(monkeypatch, lambda layer, name, value, fire: fire(value).detach())


def logits_unread(monkeypatch: Patch) -> None:
    """TransformerLens' own way: an edit of the logits comes after selection."""
    patch_fire(monkeypatch, lambda layer, name, v, fire: (fire(v), v)[1] if name == "router_logits" else fire(v))


def edits_unseen(monkeypatch: Patch) -> None:
    monkeypatch.setattr(layer_module, "is_edited", lambda after, before: False)


def weights_of_the_old_route(monkeypatch: Patch) -> None:
    """The slots' weights stay though their experts change."""

    def change(native: Any, layer: OpenLayer, run: LayerPass, indices: Tensor, weights: Tensor) -> Any:
        new, _, changed = native(layer, run, indices, weights)
        if new.shape == weights.shape:
            run.weights = weights
        return new, run.weights, changed

    patch_choose(monkeypatch, change)


def weights_normalised(monkeypatch: Patch) -> None:
    def change(native: Any, layer: OpenLayer, run: LayerPass, indices: Tensor, weights: Tensor) -> Any:
        new, new_weights, _ = native(layer, run, indices, weights)
        run.weights = new_weights / new_weights.sum(-1, keepdim=True)
        return new, run.weights, True

    patch_choose(monkeypatch, change)


def written_route_weighed_by_native_logits(monkeypatch: Patch) -> None:
    native_logits: dict[int, Tensor] = {}

    def remember(layer: OpenLayer, name: str, value: Tensor, fire: Callable[[Tensor], Tensor]) -> Tensor:
        if name == "router_logits":
            native_logits[id(layer)] = value
        return fire(value)

    def change(native: Any, layer: OpenLayer, run: LayerPass, indices: Tensor, weights: Tensor) -> Any:
        run.logits = native_logits[id(layer)]
        return native(layer, run, indices, weights)

    patch_fire(monkeypatch, remember)
    patch_choose(monkeypatch, change)


def written_scores_forgotten(monkeypatch: Patch) -> None:
    def change(native: Any, layer: OpenLayer, run: LayerPass, indices: Tensor, weights: Tensor) -> Any:
        run.scores = None
        return native(layer, run, indices, weights)

    patch_choose(monkeypatch, change)


def empty_slots_run_expert_zero(monkeypatch: Patch) -> None:
    def before(run: LayerPass) -> None:
        assert run.indices is not None
        run.indices = run.indices.clamp(min=0)

    patch_mix(monkeypatch, before)


def last_slot_dropped(monkeypatch: Patch) -> None:
    def before(run: LayerPass) -> None:
        assert run.indices is not None
        run.indices = torch.cat([run.indices[..., :-1], torch.full_like(run.indices[..., -1:], -1)], -1)

    patch_mix(monkeypatch, before)


def block_scale_left_out(monkeypatch: Patch) -> None:
    monkeypatch.setattr(MoESpec, "block_scale", 1.0)


def weight_on_the_output(monkeypatch: Patch) -> None:
    monkeypatch.setattr(MoESpec, "weight_on_input", False)


def latent_not_projected(monkeypatch: Patch) -> None:
    monkeypatch.setattr(MoESpec, "project", None)


def shared_gate_left_out(monkeypatch: Patch) -> None:
    """The gate is the container's own too: only what the hooks compute is patched."""
    monkeypatch.setattr(MoESpec, "shared_gate", None)


def shared_before_routed(monkeypatch: Patch) -> None:
    monkeypatch.setattr(blocks, "LayerPass", partial(LayerPass, routed_is_done=True))


def flat_shapes(monkeypatch: Patch) -> None:
    """Hooks see ``[batch * pos, ...]``."""
    monkeypatch.setattr(LayerPass, "fold", lambda self, flat: flat.reshape(1, self.batch * self.pos, *flat.shape[-1:]))


TRAPS: list[tuple[Callable[[Patch], None], Callable[..., None], tuple[Any, ...]]] = [
    (aliased, test_in_place.test_an_edit_in_place_that_returns_none_counts, ("olmoe",)),
    (aliased, test_router_edits.test_only_the_router_reads_an_edited_router_in, ("olmoe",)),
    (returned_only, test_in_place.test_an_edit_in_place_that_returns_none_counts, ("gpt_oss",)),
    (detached, test_gradients.test_gradients_agree_with_central_differences, ("olmoe",)),
    (detached, test_gradients.test_backward_hooks_need_no_forward_hook, ("olmoe",)),
    (logits_unread, test_router_edits.test_edited_logits_equal_a_router_that_computes_them, ("mixtral",)),
    (edits_unseen, test_router_edits.test_edited_logits_equal_a_router_that_computes_them, ("mixtral",)),
    (edits_unseen, test_routes.test_written_routes_run_exactly_those_experts, ("olmoe", "as many")),
    (edits_unseen, test_in_place.test_an_edit_in_place_that_returns_none_counts, ("ernie4_5_moe",)),
    (weights_of_the_old_route, test_routes.test_written_routes_run_exactly_those_experts, ("olmoe", "as many")),
    (weights_normalised, test_routes.test_written_weights_are_used_as_they_are, ("mixtral",)),
    (written_route_weighed_by_native_logits, test_order.test_logits_indices_and_weights_at_once, ("olmoe",)),
    (written_scores_forgotten, test_order.test_scores_win_over_logits_and_weigh_written_routes, ("deepseek_v3",)),
    (
        empty_slots_run_expert_zero,
        test_routes.test_written_routes_run_exactly_those_experts,
        ("olmoe", "mixed and empty"),
    ),
    (last_slot_dropped, test_routes.test_the_model_s_own_route_by_hand, ("gpt_oss",)),
    (block_scale_left_out, test_sums.test_routed_and_shared_out_add_up_to_the_block, ("laguna",)),
    (weight_on_the_output, test_routes.test_the_model_s_own_route_by_hand, ("llama4",)),
    (latent_not_projected, test_routes.test_the_model_s_own_route_by_hand, ("nemotron_h",)),
    (shared_gate_left_out, test_sums.test_routed_and_shared_out_add_up_to_the_block, ("qwen2_moe",)),
    (shared_before_routed, test_order.test_hooks_fire_in_the_order_of_the_table, ("ernie4_5_moe",)),
    (flat_shapes, test_pass_through.test_shapes_and_number_formats, ("olmoe",)),
]


@pytest.mark.parametrize("trap, test, args", TRAPS, ids=lambda value: getattr(value, "__name__", None))
def test_a_trap_is_noticed(trap: Any, test: Callable[..., None], args: tuple[Any, ...], monkeypatch: Patch) -> None:
    model = opened(args[0])
    unhooked = model.run()
    with monkeypatch.context() as patched:
        trap(patched)
        with pytest.raises((AssertionError, RuntimeError)):
            test(*args)
    assert torch.equal(model.run(), unhooked)
