"""Hooks on models that ``torch.compile`` works on: they fire, whatever was compiled or called first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_interp.hooks.attach import attach
from tests.integration.surface.helpers import (
    attach_to,
    build,
    cache_of,
    largest_difference,
    logits_of,
    negate,
    run_hooked,
)

FAMILY = "olmoe"
# of TransformerLens' own blocks, which torch then runs without a graph
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo (does not know how to trace|detected):UserWarning")


def compile_part(bridge: Any, part: str) -> None:
    if part == "model":
        bridge.original_model.compile(backend="eager")
        return
    layers = bridge.original_model.model.layers
    if part == "layer":
        layers[1] = torch.compile(layers[1], backend="eager")
    else:
        layers[1]._original_component.mlp._original_component.compile(backend="eager")


@pytest.mark.parametrize(
    ("part", "attached_first", "called_first"),
    [("model", False, True), ("layer", True, False), ("block", False, True)],
)
def test_hooks_fire_in_compiled_models(part: str, attached_first: bool, called_first: bool) -> None:
    torch.compiler.reset()
    bridge, reference = build(FAMILY), attach_to(FAMILY)
    moe = attach(bridge) if attached_first else None
    compile_part(bridge, part)
    if called_first:
        _ = logits_of(bridge, FAMILY)
    moe = moe or attach(bridge)
    edit = [(moe.hook_name("router_logits", 1), negate)]
    assert largest_difference(run_hooked(moe, FAMILY, edit), run_hooked(reference, FAMILY, edit)) <= 1e-6
    seen, expected = cache_of(moe, FAMILY), cache_of(reference, FAMILY)
    assert seen.keys() == expected.keys()
    assert all(largest_difference(seen[name], expected[name]) <= 1e-6 for name in expected)
    plain = logits_of(bridge, FAMILY)
    assert largest_difference(plain, logits_of(reference.bridge, FAMILY)) <= 1e-6
    moe.detach()
    assert largest_difference(logits_of(bridge, FAMILY), plain) <= 1e-6
    torch.compiler.reset()
