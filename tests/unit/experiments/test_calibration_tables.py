"""Calibration: planted routers, independence of the baseline, scipy, and what noise forbids to say."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.experiments.isolation.data import quality_array, routing_array
from moe_interp.experiments.isolation.item_calibration import expert_permutation_p, unit_ranks
from moe_interp.experiments.isolation.result import IsolationResult
from tests.unit.experiments.planted_isolation import planted_isolation, routing_apart


@pytest.fixture(scope="module")
def aligned() -> IsolationResult:
    return planted_isolation(router="aligned", noise=0.6)


def whole(result: IsolationResult) -> pd.Series:
    return result.calibration_by_domain().iloc[-1]


def test_positions_that_no_item_of_a_domain_has_are_undefined_without_a_warning():
    result = planted_isolation(router="aligned", noise=0.6)
    index = np.flatnonzero(result.data["domain"].values == result.data["domain"].values[0])
    result.data["routing_item"].values[1, index] = np.nan  # prompts of one token
    table = result.calibration()
    without = table["domain"] == result.data["domain"].values[0]
    assert table.loc[without, "rho_prompt"].isna().all()
    assert table.loc[~without, "rho_prompt"].notna().all()
    assert table["rho"].notna().all()


def test_rho_agrees_with_scipy(aligned):
    table, data = aligned.calibration(), aligned.data
    for row in table.itertuples():
        index = data["domain"].values == row.domain
        forced = data["delta"].sel(mass="one", baseline="natural", layer=row.layer).values[index].mean(0)
        for name, variable, positions in (
            ("rho", "routing_item", "all"),
            ("rho_share", "share_item", "all"),
            ("rho_answer", "routing_item", "answer"),
        ):
            routing = data[variable].sel(positions=positions, layer=row.layer).values[index].mean(0)
            expected = scipy_stats.spearmanr(routing, forced)
            assert getattr(row, name) == pytest.approx(expected.statistic, abs=1e-12)
            if name == "rho":
                assert row.p == pytest.approx(expected.pvalue, rel=1e-8)
    np.testing.assert_allclose(table["q"], scipy_stats.false_discovery_control(table["p"]), atol=1e-12)
    by_domain = aligned.calibration_by_domain().set_index("domain")
    for domain, part in table.groupby("domain"):
        assert by_domain.loc[domain, "rho"] == pytest.approx(np.tanh(np.arctanh(part["rho"]).mean()))
    assert table.attrs["domains"][-1]["rho"] == pytest.approx(np.tanh(np.arctanh(table["rho"]).mean()))


def test_calibration_is_the_same_under_every_baseline(aligned):
    for name in ("uniform", "random"):
        other = IsolationResult(aligned.data.sel(baseline=[name]))
        pd.testing.assert_frame_equal(aligned.calibration(), other.calibration())
        pd.testing.assert_frame_equal(aligned.calibration_by_domain(), other.calibration_by_domain())
        pd.testing.assert_frame_equal(aligned.item_calibration(), other.item_calibration())
        assert not np.allclose(aligned.specialization()["p"], other.specialization(baseline=name)["p"])


@pytest.mark.parametrize("mode", ["force", "ablate"])
def test_a_router_that_knows_the_good_experts_is_told_from_one_that_does_not(mode):
    row = {router: whole(planted_isolation(router=router, mode=mode)) for router in ("aligned", "permuted", "reversed")}
    assert row["aligned"]["low"] > 0.7
    assert row["aligned"]["p"] < 0.001
    assert row["aligned"]["verdict"].startswith("positive correlation")
    assert row["permuted"]["p"] > 0.05
    assert not row["permuted"]["too_noisy"]
    assert row["permuted"]["verdict"].startswith("no correlation beyond chance")
    assert row["reversed"]["corrected_high"] < -0.7
    assert row["reversed"]["verdict"].startswith("negative correlation")


def test_noise_is_told_from_the_lack_of_a_correlation():
    row = whole(planted_isolation(router="aligned", quality_sd=0.05, noise=3.0))
    assert row["too_noisy"]
    assert row["verdict"].startswith("too noisy to tell: reliability of routing")
    assert np.isnan(row["corrected"])
    assert row["reliability_quality_low"] < 0.2 < row["reliability_routing_low"]


def test_the_correction_undoes_noise():
    noisy = whole(planted_isolation(quality_sd=0.3, noise=1.2, seed=3))
    assert noisy["rho"] < noisy["corrected"]
    assert noisy["corrected"] > 0.9
    assert noisy["low"] < noisy["rho"] < noisy["high"]
    assert noisy["reliability_quality"] < 0.95


def test_few_items_and_small_domains_are_said_so():
    few = planted_isolation(n_items={"a": 3}).calibration_by_domain()
    assert few.iloc[0]["verdict"].startswith("too noisy to tell: 3 items and 16 experts")
    mixed = planted_isolation(n_items={"a": 12, "b": 12, "c": 1}).calibration_by_domain()
    assert np.isnan(mixed.iloc[2]["low"])
    assert mixed.iloc[-1]["n_items"] == 24
    assert mixed.iloc[-1]["verdict"].endswith("(without c: fewer than 8 items)")
    with pytest.raises(DataError, match=r"2 experts. Expected: at least 3 to rank"):
        planted_isolation(n_experts=2).calibration()
    with pytest.raises(DataError, match=r"2 experts. Expected: at least 3 to rank"):
        planted_isolation(n_experts=2).item_calibration()


def test_a_set_of_experts_is_routed_to_as_its_members_together(aligned):
    data = routing_apart(aligned.data).isel(expert=[2, 9, 4]).assign_coords(expert=["2", "9+11", "4"])
    routing = routing_array(data)
    full = routing_array(aligned.data)
    np.testing.assert_allclose(routing, np.stack([full[..., 2], full[..., 9] + full[..., 11], full[..., 4]], axis=-1))
    assert set(IsolationResult(data).calibration()["n_experts"]) == {3}


def test_a_missing_position_is_left_out():
    result = planted_isolation()
    data = result.data.copy(deep=True)
    data["routing_item"].loc[{"positions": "prompt", "item": "code-0"}] = np.nan
    rest = data["routing_item"].sel(positions="prompt", layer=0).values[1:20].mean(0)
    expected = scipy_stats.spearmanr(rest, quality_array(data)[:20, 0].mean(0)).statistic
    table = IsolationResult(data).calibration()
    assert table.loc[0, "rho_prompt"] == pytest.approx(expected)
    assert not IsolationResult(data).item_calibration().isna().any().any()


def test_within_items_rho_is_the_mean_of_each_items_own(aligned):
    table = aligned.item_calibration().set_index(["positions", "domain"])
    data = aligned.data
    index = np.flatnonzero(data["domain"].values == "math")
    x, y = routing_array(data, "answer")[index], quality_array(data)[index]
    own = [scipy_stats.spearmanr(x[i, layer], y[i, layer]).statistic for i in range(len(index)) for layer in range(4)]
    row = table.loc[("answer", "math")]
    assert row["rho"] == pytest.approx(np.mean(own))
    other = [
        scipy_stats.spearmanr(x[i, layer], y[j, layer]).statistic
        for i in range(len(index))
        for j in range(len(index))
        if i != j
        for layer in range(4)
    ]
    assert row["rho_other_items"] == pytest.approx(np.mean(other))
    assert row["low"] < row["rho"] < row["high"]
    assert row["p"] < 0.01
    assert row["specificity_p"] > 0.05  # the planted router knows the domain, not the item


def test_a_router_that_follows_the_item_is_specific():
    result = planted_isolation(quality_sd=0.0, noise=0.3)
    data = result.data.copy(deep=True)
    own = quality_array(data)
    routing = np.exp(own - own.max(-1, keepdims=True))
    data["routing_item"].loc[{"positions": "answer"}] = routing / routing.sum(-1, keepdims=True)
    row = IsolationResult(data).item_calibration().set_index(["positions", "domain"]).loc[("answer", "all domains")]
    assert row["rho"] == pytest.approx(1)
    assert row["specificity"] > 0.9
    assert row["specificity_p"] == pytest.approx(0.001)


def test_the_permutation_of_experts_agrees_with_visiting_all():
    rng = np.random.default_rng(0)
    x, y = unit_ranks(rng.normal(size=(6, 1, 4)) + [0, 0.4, 0.8, 1.2]), unit_ranks(rng.normal(size=(6, 1, 4)))
    observed = (x * y).sum()
    null = np.array([(x[..., list(order)] * y).sum() for order in permutations(range(4))])
    exact = (np.abs(null) >= abs(observed) - 1e-9).mean()
    p = expert_permutation_p([(x, y)], 9999, 0)
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 9999) + 1e-4)
