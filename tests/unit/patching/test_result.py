"""Results of patching: tables, normalisation, conversion and saving, on planted numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError
from moe_interp.patching.attribution_result import AttributionResult
from moe_interp.patching.metric import Metrics
from moe_interp.patching.result import EXAMPLE, METRIC, PatchingSweep, effect_dataset

ATTRS: dict[str, Any] = {
    "what": "router_logits", "metrics": ["metric"], "n_examples": 4, "n_skipped": 0, "method": "rerun",
    "null_difference": 0.0,
}  # fmt: skip


def sweep(clean: float | None = 3.0, per_example: bool = True) -> PatchingSweep:
    """Two layers by three positions; one example is too short for the last."""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(1, 2, 3, 4 if per_example else 1))
    effect[0, 0, 1] += 5.0
    effect[0, 1, 0] -= 3.0
    if per_example:
        effect[0, :, 2, 3] = np.nan
    metrics = Metrics(lambda logits: logits.sum(dim=(1, 2)) if per_example else logits.sum(), 4)
    metrics.first(torch.zeros(4, 2, 2), "zeros")
    baseline = np.arange(effect.shape[-1], dtype=float).reshape(1, -1)
    more: dict[str, Any] = {
        "value": ((METRIC, "layer", "pos", EXAMPLE), effect + baseline),
        "baseline": ((METRIC, EXAMPLE), baseline),
        "n_patched": (("layer", "pos", EXAMPLE), np.ones((2, 3, 4), dtype=int)),
        "n_unmatched": (("layer", "pos", EXAMPLE), np.zeros((2, 3, 4), dtype=int)),
    }
    if clean is not None:
        more["clean"] = ((METRIC, EXAMPLE), baseline + clean)
    data = effect_dataset(metrics, {"layer": [1, 3], "pos": [0, 1, 2]}, effect, 4, **more)
    data.attrs = dict(ATTRS)
    return PatchingSweep(data)


def test_a_row_of_the_table_by_hand() -> None:
    result = sweep()
    table = result.table().set_index(["layer", "pos"])
    values = result.data["effect"].sel(layer=1, pos=1).values
    row = table.loc[(1, 1)]
    assert row["n"] == 4
    assert row["mean"] == pytest.approx(values.mean())
    assert row["p"] == pytest.approx(stats.permutation_test((values,), np.mean, permutation_type="samples").pvalue)
    interval = mi.stats.mean_interval(values)
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(float(interval.low)), pytest.approx(float(interval.high)))
    assert table.loc[(3, 2), "n"] == 3  # one example is too short
    three = result.data["effect"].sel(layer=3, pos=2).values[:3]
    assert table.loc[(3, 2), "mean"] == pytest.approx(three.mean())


def test_top_by_size_and_sign() -> None:
    result = sweep()
    assert result.top(2)[["layer", "pos"]].to_numpy().tolist() == [[1, 1], [3, 0]]
    assert result.top(1, by="negative")[["layer", "pos"]].to_numpy().tolist() == [[3, 0]]
    assert len(result.top(100)) == 6
    everything = result.table().set_index(["layer", "pos"])
    assert result.top(1).iloc[0]["p"] == everything.loc[(1, 1), "p"]
    with pytest.raises(ConfigError, match="by='size'"):
        result.top(2, by="size")
    with pytest.raises(ConfigError, match="k=0"):
        result.top(0)


def test_normalised_by_the_mean_gap_of_the_examples_that_have_the_cell() -> None:
    result = sweep()
    normal = result.normalized()
    assert float(normal.sel(layer=1, pos=1)) == pytest.approx(float(result.mean().sel(layer=1, pos=1)) / 3)
    with pytest.raises(ConfigError, match="Pass clean_logits to the sweep"):
        sweep(clean=None).normalized()
    with pytest.raises(DataError, match="the same for the clean and the corrupted run"):
        sweep(clean=0.0).normalized()


def test_as_transformer_lens_has_it() -> None:
    result = sweep()
    theirs = result.to_patching_result()
    assert theirs.axis_names == ["layer", "pos"]
    assert theirs.values.shape == (2, 3, 4)
    assert not theirs.reduced
    assert np.allclose(theirs.effect().numpy(), result.data["effect"].values, equal_nan=True)
    assert theirs.index_df.to_numpy().tolist()[:4] == [[1, 0], [1, 1], [1, 2], [3, 0]]
    plain = sweep(per_example=False)
    assert plain.to_patching_result().reduced
    assert plain.to_patching_result().values.shape == (2, 3)
    assert plain.table()["p"].isna().all()
    assert not plain.is_per_example


def test_saved_and_shown(tmp_path: Path) -> None:
    result = sweep()
    again = mi.load_result(result.save(tmp_path / "sweep.nc"))
    assert isinstance(again, PatchingSweep)
    assert again.summary() == result.summary()
    assert "layer 1, pos 1: effect +" in result.summary()
    assert len(result.to_dataframe()) == 24
    figure = again.plot()
    drawn = figure.axes[0].collections[0].get_array().reshape(2, 3)
    assert np.allclose(drawn, result.mean().values)
    assert "router_logits" in figure._suptitle.get_text()
    page = again.report(tmp_path / "page.html").read_text()
    assert "router_logits" in page


def test_estimates_are_drawn_summed_over_positions() -> None:
    effect = np.random.default_rng(0).normal(size=(1, 2, 3, 5, 2))
    metrics = Metrics(lambda logits: logits.sum(dim=(1, 2)), 2)
    metrics.first(torch.zeros(2, 2, 2), "zeros")
    flat = {"baseline": ((METRIC, EXAMPLE), np.zeros((1, 2))), "clean": ((METRIC, EXAMPLE), np.ones((1, 2)))}
    axes = {"layer": [0, 1], "expert": range(3), "pos": range(5)}
    data = effect_dataset(
        metrics, axes, effect, 2, is_used=((*axes, EXAMPLE), np.ones(effect.shape[1:], dtype=int)), **flat
    )
    data.attrs = {"method": "gradient", "metrics": ["metric"], "n_examples": 2, "agreement": None}
    result = AttributionResult(data)
    drawn = result.plot().axes[0].collections[0].get_array().reshape(2, 3)
    assert np.allclose(drawn, effect[0].mean(axis=-1).sum(axis=-1))
    largest = result.by_expert().iloc[0]
    assert largest["estimate"] == pytest.approx(drawn[int(largest["layer"]), int(largest["expert"])])
    assert abs(largest["estimate"]) == pytest.approx(np.abs(drawn).max())
