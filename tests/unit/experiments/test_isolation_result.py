"""The result as a whole: files, words, the published numbers, and datasets it refuses."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from moe_interp.errors import DataError
from moe_interp.experiments.isolation import published
from moe_interp.experiments.isolation.findings import plan_isolation
from moe_interp.experiments.isolation.result import IsolationResult
from moe_interp.results import load_result
from tests.unit.experiments.planted_isolation import planted_isolation


@pytest.fixture(scope="module")
def planted() -> IsolationResult:
    return planted_isolation()


def test_a_saved_result_comes_back_and_says_the_same(planted, tmp_path):
    loaded = load_result(planted.save(tmp_path / "run.nc"))
    assert type(loaded) is IsolationResult
    xr.testing.assert_identical(loaded.data.drop_encoding(), planted.data)
    assert loaded.summary() == planted.summary()
    pd.testing.assert_frame_equal(loaded.calibration(), planted.calibration())
    assert loaded.domains == ("code", "facts", "math")


def test_one_row_a_delta(planted):
    frame = planted.to_dataframe("delta")
    assert len(frame) == planted.data["delta"].size
    row = frame.iloc[12345]
    assert planted.data["delta"].sel({k: row[k] for k in planted.data["delta"].dims}).item() == row["delta"]


def test_tables_are_computed_once_and_handed_out_as_copies(planted):
    first = planted.specialization()
    first["p"] = -1.0
    assert (planted.specialization()["p"] > 0).all()


def test_the_summary_says_what_matters(planted):
    text = planted.summary()
    for part in (
        "Isolation of 16 experts in each of 4 layers of planted; 76 items (code 20, facts 30, math 26).",
        "smallest attainable p",
        "mass one",
        "mass natural",
        "The masses agree in",
        "all domains: ",
        "positive correlation",
        "Within an item (answer positions)",
        "cross-fitted",
        "4 layers allow no p below 0.33",
        "help some domains more than others",
    ):
        assert part in text
    assert "nan" not in text
    impact = {mass: planted.layer_impact(mass=mass).set_index("layer")["impact"] for mass in ("one", "natural")}
    one, natural = (f"L{impact[mass].idxmax()} with {impact[mass].max():.3f}" for mass in ("one", "natural"))
    assert f"Under mass natural the layer of the largest impact is {natural} (mass one: {one})." in text
    own = planted.data["score"].groupby("domain").mean()
    assert f"code {float(own.sel(domain='code')):.2f}, facts {float(own.sel(domain='facts')):.2f}" in text


@pytest.mark.parametrize("n_items", [{"a": 1}, {"a": 3}, {"a": 1, "b": 9}, {"a": 7, "b": 40}])
def test_small_runs_are_summarised_without_nonsense(n_items):
    result = planted_isolation(n_items=n_items, baselines=("uniform",), masses=("natural",), n_layers=2)
    text = result.summary()
    assert "nan" not in text
    assert len(result.findings_table()) > 4
    if len(n_items) == 1:
        assert "not testable, the single domain 'a'" in text
    if min(n_items.values()) < 6:
        assert "Too few items for any test at 0.05, at least 6 are needed: a." in text


def test_ablation_is_called_so():
    text = planted_isolation(mode="ablate", attrs={"model": "tiny"}).summary()
    assert text.startswith("Ablation of 16 experts in each of 4 layers of tiny")


def test_the_plan_knows_the_published_trap():
    plan = plan_isolation({"math": 10, "science": 10, "general": 10, "reasoning": 10}, 14, 16)
    assert "896 tests: 4 domains x 14 layers x 16 experts." in plan
    assert "smallest attainable p is 0.00195: at least 35 of the 896 tests must reach it together" in plan
    assert "16 items per domain would let a single test be rejected on its own." in plan
    # above 25 items the test uses the normal law, and so does the plan
    large = plan_isolation({"math": 30, "science": 50}, 32, 64)
    assert "With 30 items the smallest attainable p is 1.73e-06: a single test of 4096" in large
    assert plan_isolation({"a": 3}, 2, 4) == "Too few items for any test at 0.05, at least 6 are needed: a."
    with pytest.raises(DataError, match="items per domain"):
        plan_isolation({}, 2, 4)


def test_the_findings_stand_beside_the_published_ones(planted):
    table = planted.findings_table()
    assert table.attrs["note"].startswith("A comparison, not a reproduction")
    rows = table.set_index("finding")
    significant = rows.loc["tests significant at q <= .05"]
    assert significant["phi_mini_moe_10"] == "207/896 (23%)"
    assert significant["phi_mini_moe_50"] == "482/896 (54%)"
    tests = planted.specialization()
    assert significant["value"] == pytest.approx(tests["direction"].isin(["helped", "hurt"]).mean())
    assert rows.loc["calibration rho, math", "phi_mini_moe_10"] == "0.043"
    assert rows.loc["calibration rho, all domains", "phi_mini_moe_50"] == "0.069"
    whole = planted.calibration_by_domain().iloc[-1]
    assert rows.loc["calibration rho, all domains", "value"] == whole["rho"]
    assert rows.loc["calibration rho, all domains", "reliability"] == whole["reliability_quality"]
    assert "reasoning 0.063" in rows.loc["calibration rho, its domains", "phi_mini_moe_10"]
    share = rows.loc["largest share of the slots, mean over layers"]
    assert share["value"] == planted.dominance()["share"].max()
    assert "0.0803" in share["phi_mini_moe_10"]
    assert "L30 0.779" in table["phi_mini_moe_10"].str.cat(sep=" ")


@pytest.mark.shared_data
def test_the_published_numbers_are_those_of_the_tables(shared_data):
    tables = json.loads((shared_data / "routing" / "published_tables_young2026.json").read_text())
    assert published.SMALL.n_items == tables["n_items_per_domain"]
    assert published.SMALL.rho == {row["domain"].lower(): row["rho"] for row in tables["table2_router_calibration"]}
    assert published.SMALL.mean_rho == tables["table2_mean_rho"]
    bh = tables["table5_bh"]
    assert (published.SMALL.n_significant, published.SMALL.n_tests) == (bh["step_up_survivors"], bh["n_tests"])
    shares = {name.lower(): share for name, share in tables["table3_e2_activation"].items()}
    assert shares.pop("uniform") == published.UNIFORM_SHARE
    assert shares == published.DOMINANT_SHARE
    assert {int(k): v for k, v in tables["table4_layer_avg_best_delta"].items()} == published.LAYER_IMPACT


def test_datasets_of_another_kind_are_refused(planted):
    data = planted.data
    with pytest.raises(DataError, match="variable 'score': none"):
        IsolationResult(data.drop_vars("score"))
    with pytest.raises(DataError, match="items without domains"):
        IsolationResult(data.drop_vars("domain"))
    with pytest.raises(DataError, match="item 'code-0' more than once"):
        IsolationResult(data.isel(item=[0, 0, 1]))
    broken = data.copy(deep=True)
    broken["delta"][0, 0, 5, 0, 0] = np.nan
    with pytest.raises(DataError, match="item 'code-5' and 0 more without all deltas"):
        IsolationResult(broken)
