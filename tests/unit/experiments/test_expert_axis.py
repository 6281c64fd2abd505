"""Experts are numbers on one axis, unless sets were forced together or some of them only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from moe_interp.experiments.isolation.result import IsolationResult
from moe_interp.results import Result, load_result
from tests.unit.experiments.planted_isolation import planted_isolation, routing_apart


@pytest.fixture(scope="module")
def texts() -> xr.Dataset:
    """A dataset as earlier versions wrote it: experts as texts, two axes."""
    data = routing_apart(planted_isolation(n_items={"code": 8, "math": 9}, n_layers=2).data)
    return data.assign_coords(expert=[str(expert) for expert in range(16)])


def test_an_expert_is_selected_by_its_number(texts: xr.Dataset) -> None:
    data = IsolationResult(texts).data
    assert data["expert"].dtype.kind == "i"
    assert "routed_expert" not in data.dims
    np.testing.assert_array_equal(data["delta"].sel(expert=3), texts["delta"].sel(expert="3"))
    np.testing.assert_array_equal(data["routing_item"].sel(expert=3), texts["routing_item"].sel(routed_expert=3))
    for table in (IsolationResult(texts).specialization(), IsolationResult(texts).domain_effect()):
        assert table["expert"].dtype.kind == "i"


def test_routing_follows_the_order_of_the_experts(texts: xr.Dataset) -> None:
    order = np.random.default_rng(0).permutation(16)
    shuffled = IsolationResult(texts.isel(expert=order))
    assert shuffled.data["expert"].values.tolist() == order.tolist()
    straight = IsolationResult(texts)
    for name in ("delta", "share_item", "slot_share"):
        xr.testing.assert_equal(shuffled.data[name].sel(expert=5), straight.data[name].sel(expert=5))
    columns = ["domain", "rho", "low", "high"]
    pd.testing.assert_frame_equal(shuffled.calibration_by_domain()[columns], straight.calibration_by_domain()[columns])
    by_expert = [r.dominance().sort_values(["domain", "expert"])["share"].to_numpy() for r in (shuffled, straight)]
    np.testing.assert_allclose(*by_expert)


def test_sets_and_some_experts_leave_routing_its_own_axis(texts: xr.Dataset) -> None:
    some = IsolationResult(texts.isel(expert=[3, 0])).data
    assert some["expert"].values.tolist() == [3, 0]
    assert some.sizes["routed_expert"] == 16
    pair = IsolationResult(texts.isel(expert=[0, 1]).assign_coords(expert=["0", "1+2"])).data
    assert pair["expert"].values.tolist() == ["0", "1+2"]
    assert pair["delta"].sel(expert="1+2").sizes["item"] == 17


def test_selected_experts_are_still_compared_with_even_use_of_all(texts: xr.Dataset) -> None:
    whole = IsolationResult(texts)
    some = IsolationResult(whole.data.sel(expert=[2, 5])).dominance()
    assert some["uniform"].tolist() == [1 / 16] * 4
    assert some["ratio"].tolist() == pytest.approx((some["share"] * 16).tolist())


def test_files_of_before_load_and_come_back_the_same(texts: xr.Dataset, tmp_path: Path) -> None:
    class Before(Result):
        kind = "isolation"

    loaded = load_result(Before(texts).save(tmp_path / "before.nc"))
    assert isinstance(loaded, IsolationResult)
    xr.testing.assert_identical(loaded.data.drop_encoding(), IsolationResult(texts).data)
    again = load_result(loaded.save(tmp_path / "after.nc"))
    xr.testing.assert_identical(again.data.drop_encoding(), loaded.data.drop_encoding())
    assert planted_isolation(n_items={"a": 6}).data["expert"].values.tolist() == list(range(16))
