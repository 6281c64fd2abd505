"""Branches as a grid: the scores of compact rows and of full passes, on every family that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from moe_interp.engine import branch_attention, policy
from moe_interp.engine.branch_attention import NAME
from moe_interp.engine.branches import BranchRunner
from moe_interp.engine.grid.rows import GridRows
from moe_interp.engine.grid.trial import can_run_grid
from moe_interp.engine.policy import GridFrom
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.hooks.attach import MoEHooks
from moe_interp.routes import score_joint_routes, score_routes
from tests import tiny
from tests.integration.routes.helpers import (
    DECODERS,
    attached,
    largest_difference,
    padded_batch,
    precision,
    random_routes,
    served_layers,
)

WITHOUT_GRID = {"jetmoe", "nemotron_h"}  # keys repeated behind the cache; attention that is a mixer among others
SERVED = [name for name in DECODERS if served_layers(name, attached(name))]
POSITIONS = [4, -2]


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GridRows]]:
    """A processor runs grids; gives the rows of those that score routes."""
    ran: list[GridRows] = []
    through = BranchRunner.through

    def watched(self: BranchRunner, rows: Any, hooks: Any = None) -> Tensor:
        if isinstance(rows, GridRows) and self.base.runs_grid is not None:
            ran.append(rows)
        return through(self, rows, hooks)

    monkeypatch.setattr(BranchRunner, "through", watched)
    monkeypatch.setitem(policy.GRID_FROM, "cpu", GridFrom(0.0, 0.0))
    return ran


def scored(moe: MoEHooks, routes: dict[int, Tensor], **options: Any) -> Any:
    tokens, mask = padded_batch()
    return score_joint_routes(moe, tokens, routes, **{"attention_mask": mask, "method": "branch", **options})


def in_compact_rows(moe: MoEHooks, routes: dict[int, Tensor], **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "GRID_FROM", {})
        return scored(moe, routes, **options)


@pytest.mark.parametrize("name", SERVED)
def test_both_ways_agree(name: str, grid: list[GridRows]) -> None:
    moe = attached(name, torch.float64)
    layer = served_layers(name, moe)[0]
    routes = {layer: random_routes(moe, layer, padded_batch()[0])}
    with precision(torch.float64):
        found = scored(moe, routes)
        assert bool(grid) == (name not in WITHOUT_GRID)
        compact = in_compact_rows(moe, routes)
    assert largest_difference(found.logp, compact.logp) <= 1e-10
    assert largest_difference(found.logp_null, compact.logp_null) <= 1e-10
    assert found.null_distance <= 1e-10


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3", "granite_moe", "mixtral", "gemma4_text"])
def test_full_passes_in_float32(name: str, grid: list[GridRows]) -> None:
    """Padding on both sides, sinks, groups of heads, values narrower than keys, a scale after the unembedding."""
    moe = attached(name)
    for layer in moe.layers:
        assert isinstance(layer, int)
        routes = {layer: random_routes(moe, layer, padded_batch()[0])}
        found = scored(moe, routes, positions=POSITIONS)
        naive = scored(moe, routes, positions=POSITIONS, method="naive")
        assert largest_difference(found.logp, naive.logp) <= 2e-5
        assert found.null_distance <= 2e-5
    assert grid


@pytest.mark.parametrize("fault", ["scale", "own", "shape", "first", "attribute"])
def test_an_attention_that_comes_out_otherwise_is_not_used(
    fault: str, grid: list[GridRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if fault == "scale":
            options["scaling"] = 2 * options["scaling"]
        if fault == "own":
            value = value * 0.5
        if fault == "shape":
            key = key[..., :-1]
        if fault == "attribute":  # as an attention that reads a mask which is not there
            return mask.of_no_such_name
        out, pattern = branch_attention.branch_attention(module, query, key, value, mask, **options)
        if fault == "first":
            out[:, 0] *= 1.5
        return out, pattern

    moe, (tokens, mask) = attached("olmoe"), padded_batch()
    routes = {0: random_routes(moe, 0, tokens)}
    expected = in_compact_rows(moe, routes).logp
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, faulty)
    assert not can_run_grid(record_pass(moe, tokens, [0], mask))
    assert largest_difference(scored(moe, routes).logp, expected) <= 2e-5
    assert not grid


def test_every_position_of_one_sequence_without_padding(grid: list[GridRows]) -> None:
    moe, tokens = attached("olmoe"), tiny.random_tokens(1, 10)
    routes = random_routes(moe, 0, tokens, n_routes=3)
    found = score_routes(moe, tokens, 0, routes, method="branch")
    assert grid
    assert largest_difference(found, score_routes(moe, tokens, 0, routes, method="naive")) <= 2e-5
