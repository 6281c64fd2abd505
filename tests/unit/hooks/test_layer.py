"""Firing one hook point: what counts as an edit, what may be written into, and which routes are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from transformer_lens.hook_points import HookPoint

from moe_interp.errors import HookError, RouteError
from moe_interp.hooks.edits import is_edited
from moe_interp.hooks.layer import LayerPass, OpenLayer, check_route


def layer_with(name: str, hook: Any = None, direction: str = "fwd") -> OpenLayer:
    point = HookPoint()
    point.name = f"blocks.0.hook_{name}"
    if hook is not None:
        point.add_hook(hook, dir=direction)  # type: ignore[arg-type]
    spec: Any = SimpleNamespace(n_experts=4)
    return OpenLayer(spec, {name: point})


VALUE = torch.arange(12.0).reshape(2, 3, 2)


def test_without_a_hook_the_very_tensor_passes() -> None:
    layer = layer_with("routed_out")
    assert layer.fire("routed_out", VALUE) is VALUE
    assert layer.fire("expert_out", VALUE) is VALUE  # a point that the layer does not have
    assert not layer.is_hooked()


def test_an_edit_in_place_counts_and_leaves_the_original_alone() -> None:
    value = VALUE.clone()
    untouched = layer_with("routed_out", lambda activation, hook: None).fire("routed_out", value)
    assert not is_edited(untouched, value)

    def double(activation: Tensor, hook: Any) -> None:
        activation *= 2

    layer = layer_with("routed_out", double)
    result = layer.fire("routed_out", value)
    assert torch.equal(result, 2 * VALUE)
    assert torch.equal(value, VALUE)
    assert is_edited(result, value)


def test_an_owned_tensor_is_not_copied_without_gradients() -> None:
    seen: list[int] = []
    layer = layer_with("expert_out", lambda activation, hook: seen.append(activation.data_ptr()))
    value = VALUE.clone()
    with torch.no_grad():
        layer.fire("expert_out", value, owned=True)
        layer.fire("expert_out", value)
    assert seen[0] == value.data_ptr()
    assert seen[1] != value.data_ptr()


def test_a_backward_hook_is_a_hook() -> None:
    layer = layer_with("routed_out", lambda gradient, hook: None, "bwd")
    assert layer.is_hooked("routed_out")
    assert not layer.is_hooked("expert_out")


def test_another_number_format_is_cast_back_and_another_shape_refused() -> None:
    result = layer_with("expert_post", lambda activation, hook: activation.double() + 1).fire("expert_post", VALUE)
    assert result.dtype == torch.float32
    assert torch.equal(result, VALUE + 1)
    with pytest.raises(HookError, match=r"returned shape \(2, 3\)\. Expected: shape \(2, 3, 2\)"):
        layer_with("expert_post", lambda activation, hook: activation[..., 0]).fire("expert_post", VALUE)


def test_minus_infinity_may_be_written_to_logits_and_nan_may_pass() -> None:
    shut = layer_with("router_logits", lambda activation, hook: activation.fill_(-torch.inf))
    assert torch.isinf(shut.fire("router_logits", VALUE)).all()
    already = torch.full_like(VALUE, torch.nan)
    assert torch.isnan(layer_with("router_logits", lambda a, hook: a).fire("router_logits", already)).all()
    with pytest.raises(RouteError, match=r"wrote nan to blocks\.0\.hook_router_logits at batch 0, pos 0, column 0"):
        layer_with("router_logits", lambda a, hook: a * torch.nan).fire("router_logits", VALUE)


def test_a_pass_folds_tokens_into_batch_and_position() -> None:
    run = LayerPass(batch=2, pos=3)
    flat = torch.arange(12).reshape(6, 2)
    assert torch.equal(run.fold(flat), flat.reshape(2, 3, 2))
    assert run.fold(run.fold(flat)).shape == (2, 3, 2)


def test_routes_by_hand() -> None:
    check_route(tensor([[[0, 3], [1, -1], [-1, -1]]]), 4, "here")
    with pytest.raises(RouteError, match=r"^expert id 4 at here, sequence 0, position 1\. Expected: ids from 0 to 3"):
        check_route(tensor([[[0, 3], [4, 1]]]), 4, "here")
    with pytest.raises(RouteError, match=r"^expert id -2 at here"):
        check_route(tensor([[[0, -2]]]), 4, "here")
    with pytest.raises(RouteError, match=r"^expert 2 twice in the route of sequence 1, position 0 at here"):
        check_route(tensor([[[2, 1, -1]], [[2, 0, 2]]]), 4, "here")


@pytest.mark.parametrize("after, before, edited", [(1.0, 1.0, False), (1.0, 2.0, True)])
def test_an_edit_is_told_by_value(after: float, before: float, edited: bool) -> None:
    assert is_edited(torch.full((2,), after), torch.full((2,), before)) is edited
    assert is_edited(torch.ones(2), torch.ones(3))
