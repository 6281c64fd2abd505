"""The figures of attribution, splits, paths and traces: what they draw is what the results hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_interp.patching import decompose, expert_tokens, logit_attribution, path_patching, trace_experts
from moe_interp.plots.figure import to_svg
from tests import tiny
from tests.integration.patching.test_decomposition import CORRUPTED, clean_cache, metric
from tests.integration.routes.helpers import attached

TOKENS = tiny.random_tokens(3, 5)


def meshes(axis: Any) -> np.ndarray:
    return np.ma.filled(axis.collections[0].get_array().astype(float), np.nan)


def test_attribution_draws_contributions_by_kind_and_by_expert() -> None:
    result = logit_attribution(attached("deepseek_v2"), TOKENS, 5, 9)
    bars, map_ = result.plot().axes[:2]
    assert sum(bar.get_height() for bar in bars.patches) == pytest.approx(
        float(result.data["before_cap"].mean()), abs=1e-4
    )
    grid = meshes(map_)
    assert grid.shape == (2, 8)
    assert grid[1, 3] == pytest.approx(float(result.data["effect"].sel(component="2 expert 3").mean()))
    assert "<svg" in to_svg(result.plot(), "x")


def test_splits_draw_four_bars_a_layer_whose_sum_is_the_diamond() -> None:
    moe = attached("olmoe")
    (axis,) = decompose(moe, CORRUPTED, clean_cache(moe), metric).plot().axes
    heights = np.array([bar.get_height() for bar in axis.patches]).reshape(4, 3)
    together = axis.lines[0].get_ydata()
    assert np.allclose(heights.sum(axis=0), together, atol=1e-5)


def test_paths_draw_each_source_at_its_direct_and_total_effect() -> None:
    result = path_patching(attached("olmoe"), TOKENS)
    figure = result.plot()
    table = result.table_of_sources()
    for axis, layer in zip(figure.axes, (1, 2)):
        points = np.asarray(axis.collections[0].get_offsets())
        assert np.allclose(points, table[table["layer"] == layer][["direct", "total"]].to_numpy())


def test_traces_draw_shares_of_the_gap() -> None:
    result = trace_experts(attached("olmoe"), TOKENS, [1], metric, draws=2)
    map_, bars = result.plot().axes[:2]
    recovered = result.recovered()
    used = recovered.sel(cell=recovered["kind"].values == "expert")
    first = used.isel(cell=0)
    assert meshes(map_)[int(first["layer"]), int(first["expert"])] == pytest.approx(float(first))
    assert np.isfinite(meshes(map_)).sum() == used.sizes["cell"]
    assert bars.patches[2].get_height() == pytest.approx(float(recovered.sel(cell="layer 2")))


def test_what_experts_write_is_shown_as_text() -> None:
    with torch.no_grad():
        text = expert_tokens(attached("olmoe"), TOKENS).summary()
    assert text.count("expert") >= 5
