"""Specialization within and between domains, against scipy and planted truths."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.isolation.result import IsolationResult
from tests.unit.experiments.planted_isolation import planted_isolation

CELLS = {("math", 1, 3): 1.0, ("facts", 2, 5): -1.0, ("code", 0, 7): 1.0}
EMPTY = {"quality_sd": 0.0, "fragility": 0.0}


@pytest.fixture(scope="module")
def planted() -> IsolationResult:
    return planted_isolation(cells=CELLS, **EMPTY)


def test_planted_cells_are_found_and_their_direction_is_right(planted):
    table = planted.specialization()
    found = table[table["direction"] != "none"]
    words = {(row.domain, row.layer, int(row.expert)): row.direction for row in found.itertuples()}
    assert {cell: words.get(cell) for cell in CELLS} == {c: "helped" if v > 0 else "hurt" for c, v in CELLS.items()}
    assert len(found) <= 5  # BH lets one false rejection in twenty through
    assert table.attrs["n_tests"] == len(table) == 3 * 4 * 16
    assert table.attrs["helped"] + table.attrs["hurt"] == len(found)
    floor = scipy_stats.wilcoxon(np.arange(1.0, 31), method="asymptotic", correction=False).pvalue
    assert table.attrs["smallest_p"] == pytest.approx(floor)


def test_rows_agree_with_scipy(planted):
    table = planted.specialization(baseline="uniform", mass="natural")
    data = planted.data
    q = scipy_stats.false_discovery_control(table["p"])
    np.testing.assert_allclose(table["q"], q, atol=1e-10)
    for index in (0, 40, 100, 191):
        row = table.iloc[index]
        x = data["delta"].sel(mass="natural", baseline="uniform", layer=row.layer, expert=row.expert)
        x = x.values[data["domain"].values == row.domain]
        method = {"method": "exact"} if len(x) <= 25 else {"method": "asymptotic", "correction": False}
        expected = scipy_stats.wilcoxon(x, zero_method="wilcox", **method)
        np.testing.assert_allclose(row["p"], expected.pvalue, rtol=1e-10)
        np.testing.assert_allclose([row["mean"], row["median"]], [x.mean(), np.median(x)], atol=1e-12)
        assert row["n"] == len(x)
        low, high = np.sort(x)[[scipy_stats.binom.ppf(0.025, len(x), 0.5).astype(int) - 1, -1]][0], row["ci_high"]
        assert row["ci_low"] == pytest.approx(low)
        assert row["ci_low"] <= row["median"] <= high
        w = scipy_stats.rankdata(np.abs(x)) * np.sign(x)
        assert row["rank_biserial"] == pytest.approx(w.sum() / np.abs(w).sum())


def test_permuting_experts_permutes_the_table(planted):
    order = np.random.default_rng(1).permutation(16)
    other = IsolationResult(planted.data.isel(expert=order))
    key = ["domain", "layer", "expert"]
    first, second = (r.specialization().set_index(key).sort_index() for r in (planted, other))
    pd.testing.assert_frame_equal(first, second, check_exact=False, atol=1e-12)


def test_domains_too_small_for_any_test_are_shown_but_not_counted():
    result = planted_isolation(n_items={"big": 12, "five": 5, "one": 1}, **EMPTY)
    table = result.specialization()
    small = table[table["domain"] != "big"]
    assert set(small["direction"]) == {"not testable"}
    assert small["q"].isna().all()
    assert table.attrs["n_tests"] == 64
    assert np.isinf(small["ci_high"]).all()


def test_an_unused_expert_is_a_test_with_p_one():
    result = planted_isolation(mode="ablate", n_items={"math": 10, "facts": 10})
    data = result.data.copy(deep=True)
    data["delta"].loc[{"expert": 4}] = 0.0
    table = IsolationResult(data).specialization()
    unused = table[table["expert"] == 4]
    assert unused["unused"].all()
    assert (unused["p"] == 1).all()
    assert (unused["direction"] == "none").all()
    assert table.attrs["n_tests"] == 128
    assert table.attrs["unused"] == 8
    assert not table.loc[table["expert"] != 4, "unused"].any()


def test_the_masses_are_compared_cell_by_cell(planted):
    data = planted.data.copy(deep=True)
    data["delta"].loc[{"mass": "natural", "layer": 1, "expert": 3}] *= -1
    table = IsolationResult(data).mass_agreement()
    row = table[(table["domain"] == "math") & (table["layer"] == 1) & (table["expert"] == 3)].iloc[0]
    assert (row["direction_one"], row["direction_natural"], row["agree"]) == ("helped", "hurt", False)
    assert row["mean_natural"] == pytest.approx(-0.5 * row["mean_one"], rel=0.05)
    assert table.attrs["opposite"] == 1
    assert not table.attrs["same"]
    data["delta"].loc[{"mass": "natural"}] = data["delta"].sel(mass="one") + 1e-7
    assert IsolationResult(data).mass_agreement().attrs["same"]
    with pytest.raises(DataError, match=r"mass 'one' only. Expected: two masses"):
        IsolationResult(data.sel(mass=["one"])).mass_agreement()


def test_first_token_deltas_are_tested_on_their_own(planted):
    table = planted.specialization(score="first")
    x = planted.data["delta_first"].sel(mass="one", baseline="natural", layer=0, expert=0)
    x = x.values[planted.data["domain"].values == "code"]
    assert table.iloc[0]["mean"] == pytest.approx(x.mean())


def test_a_fragile_domain_is_no_specialization_and_a_planted_interaction_is():
    fragile = planted_isolation(domain_sd=0.0, fragility=20.0, baselines=("uniform",))
    table = fragile.domain_effect()
    assert table["significant"].sum() == 0
    assert table.attrs["global_p"] > 0.05
    result = planted_isolation(domain_sd=0.0, cells={("math", 1, 3): 1.5})
    table = result.domain_effect()
    best = table.loc[table["q"].idxmin()]
    assert (best["layer"], best["expert"], best["best_domain"], bool(best["significant"])) == (1, 3, "math", True)
    assert best["contrast_math"] > 0.5


def test_the_domain_effect_is_the_same_under_every_baseline_and_flips_its_best_domain_under_ablation():
    result = planted_isolation(cells=CELLS)
    tables = [
        IsolationResult(result.data.sel(baseline=[name])).domain_effect(n_permutations=99)
        for name in ("natural", "uniform", "random")
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], table)
    ablated = IsolationResult(result.data.assign_attrs(mode="ablate")).domain_effect(n_permutations=99)
    np.testing.assert_allclose(ablated["contrast_math"], tables[0]["contrast_math"], atol=1e-9)
    assert (ablated["best_domain"] != tables[0]["best_domain"]).all()


def test_domains_too_small_get_no_word_between_domains():
    result = planted_isolation(n_items={"a": 5, "b": 20}, domain_sd=3.0)
    table = result.domain_effect(n_permutations=199)
    assert table.attrs["too_few"] == ["a"]
    assert set(table["verdict"]) == {"too few items to say (n = 5)"}
    assert not table["significant"].any()
    assert "too few items to say in a; expected at least 6 a domain" in result.summary()
    enough = planted_isolation(n_items={"a": 12, "b": 20}, domain_sd=3.0).domain_effect(n_permutations=999)
    assert set(enough["verdict"]) == {"differs between domains", "no difference shown"}
    assert (enough["significant"] == (enough["q"] <= 0.05)).all()


def test_what_cannot_be_answered_says_why():
    one = planted_isolation(n_items={"math": 12}, baselines=("uniform",), masses=("natural",))
    with pytest.raises(DataError, match=r"the single domain 'math'.*compares domains with each other"):
        one.domain_effect()
    with pytest.raises(ConfigError, match=r"baseline='natural'. Expected: one of \['uniform'\]"):
        one.specialization()
    with pytest.raises(ConfigError, match=r"mass='one'. Expected: one of \['natural'\]"):
        one.specialization(baseline="uniform", mass="one")
    assert one.specialization(baseline="uniform").attrs["mass"] == "natural"
    with pytest.raises(ConfigError, match="score='last'"):
        one.specialization(baseline="uniform", score="last")
