"""Dominance, the worth of a layer's best expert, the two regimes, and the choice of experts."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp import stats
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.best_experts import best_experts, cross_fitted, split_items
from moe_interp.experiments.isolation.impact import regimes, two_regimes
from moe_interp.experiments.isolation.result import IsolationResult
from tests.unit.experiments.planted_isolation import planted_isolation, routing_apart

BEST = {("math", 1, 3): 2.0, ("math", 2, 8): 2.0, ("facts", 1, 5): 2.0, ("code", 1, 6): 2.0}


@pytest.fixture(scope="module")
def planted() -> IsolationResult:
    return planted_isolation(cells=BEST, noise=0.2)


def test_dominance_is_the_share_of_slots_against_even_use(planted):
    table = planted.dominance()
    share = planted.data["slot_share"].mean("layer").values
    np.testing.assert_allclose(table["share"], share.ravel(), atol=1e-12)
    np.testing.assert_allclose(table["ratio"], 16 * share.ravel(), atol=1e-12)
    np.testing.assert_allclose(table.groupby("domain")["share"].sum(), 1)
    assert (table["low"] <= table["share"]).all()
    assert (table["share"] <= table["high"]).all()
    top = table[table["rank"] == 1].set_index("domain")["expert"]
    assert top.tolist() == share.argmax(1).tolist()
    layered = planted.dominance(by_layer=True)
    np.testing.assert_allclose(layered["share"], planted.data["slot_share"].values.ravel(), atol=1e-12)


def test_dominance_covers_experts_that_were_not_forced(planted):
    some = IsolationResult(routing_apart(planted.data).isel(expert=[0, 1, 2]))
    assert len(some.dominance()) == 3 * 16


def test_layer_impact_finds_the_planted_layer_and_expert(planted):
    table = planted.layer_impact()
    assert table["impact"].idxmax() == 1
    assert table.loc[1, "best_experts"] == "code 6 (100%), facts 5 (100%), math 3 (100%)"
    delta = planted.data["delta"].sel(mass="one", baseline="natural", layer=1)
    groups = planted.data["domain"].values
    expected = np.mean(
        [delta.sel(expert=e).values[groups == d].mean() for d, e in (("code", 6), ("facts", 5), ("math", 3))]
    )
    assert table.loc[1, "impact"] == pytest.approx(expected)
    assert table.loc[1, "naive"] == pytest.approx(expected)
    assert (table["low"] <= table["impact"]).all()
    assert (table["impact"] <= table["high"]).all()


def test_noise_alone_has_naive_impact_but_none_when_cross_fitted():
    table = planted_isolation(quality_sd=0, noise=1.0, n_layers=20, n_items={"a": 30, "b": 30}).layer_impact()
    assert table["naive"].min() > 0.1
    assert abs(table["impact"].mean()) < 0.06
    covered = (table["low"] <= 0) & (table["high"] >= 0)
    assert covered.mean() >= 0.9


def test_the_baseline_moves_every_impact_but_not_the_choice(planted):
    natural, uniform = planted.layer_impact(), planted.layer_impact(baseline="uniform")
    assert natural["best_experts"].tolist() == uniform["best_experts"].tolist()
    assert (uniform["impact"] > natural["impact"]).all()


def test_under_ablation_the_best_expert_is_the_one_whose_removal_costs_most():
    table = planted_isolation(cells=BEST, noise=0.2, mode="ablate").layer_impact()
    assert table["impact"].idxmin() == 1
    assert table.loc[1, "best_experts"].startswith("code 6")


def test_cross_fitting_by_hand():
    # two items: each is measured at the other's best expert
    choose = np.array([[[0.0, 1.0, 2.0]], [[5.0, 1.0, 2.0]]])
    measure = np.array([[[10.0, 11.0, 12.0]], [[20.0, 21.0, 22.0]]])
    fit = cross_fitted(choose, measure, np.random.default_rng(0), n_splits=7)
    np.testing.assert_array_equal(fit.value, [16.0])  # the mean of 10 and 22
    np.testing.assert_array_equal(fit.votes, [[7, 0, 7]])


def test_with_a_clear_best_expert_the_cross_fitted_error_is_that_of_a_mean():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 2, 4)) + [9.0, 0, 0, 0]
    fit = cross_fitted(values, values, rng, n_resamples=2000)
    error = np.sqrt((fit.deviations**2).mean(0))
    np.testing.assert_allclose(fit.value, values[..., 0].mean(0))
    np.testing.assert_allclose(error, values[..., 0].std(0, ddof=1) / np.sqrt(60), rtol=0.05)


def test_the_regimes_are_those_of_the_study_and_the_test_knows_its_limits():
    names = regimes(np.arange(32))
    assert [names.index("middle"), names.index("late")] == [6, 30]
    assert regimes(np.arange(4)) == ["early", "middle", "middle", "late"]
    assert regimes(np.array([1, 3]), 32) == ["early", "early"]
    outer = np.array([True, False, False, True])
    four = two_regimes(np.array([3.0, 1.0, 0.0, 2.0]), outer)
    assert four["difference"] == pytest.approx(2.0)
    assert four["p"] == four["smallest_p"] == pytest.approx(2 / 6)
    assert four["verdict"] == "not testable: 4 layers allow no p below 0.33"
    outer = np.array(names) != "middle"
    many = two_regimes(outer + np.linspace(0, 0.5, 32), outer)
    assert many["verdict"] == "larger in early and last layers"
    assert two_regimes(-1.0 * outer, outer)["verdict"] == "larger in the middle"
    assert two_regimes(np.linspace(0, 1, 32) % 0.2, outer)["verdict"] == "no difference shown"
    assert two_regimes(np.ones(2), np.array([True, False]))["verdict"] == "not testable"


@pytest.mark.parametrize("kind", ["independent", "autoregressive", "random walk", "trend"])
def test_layers_that_are_like_their_neighbours_are_no_regimes(kind):
    rng, runs = np.random.default_rng(len(kind)), 100
    for n_layers in (24,):
        outer = np.array(regimes(np.arange(n_layers))) != "middle"
        wrong = 0
        for _ in range(runs):
            noise = rng.normal(size=n_layers)
            impact = noise if kind == "independent" else np.cumsum(noise)
            if kind == "autoregressive":
                for layer in range(1, n_layers):
                    noise[layer] += 0.8 * noise[layer - 1]
                impact = noise
            if kind == "trend":
                impact = rng.normal() * np.arange(n_layers) + noise
            wrong += str(two_regimes(impact, outer)["verdict"]).startswith("larger")
        assert wrong / runs <= 0.06 + 2 * np.sqrt(0.06 * 0.94 / runs), n_layers


def test_sixteen_layers_are_too_few_to_tell_regimes_from_a_trend():
    outer = np.array(regimes(np.arange(16))) != "middle"
    found = two_regimes(outer.astype(float), outer)
    assert found["p"] < 0.01
    assert (
        found["verdict"] == "not testable: 16 layers allow no p below 0.062, as layers next to each other may be alike"
    )
    wide = two_regimes(np.resize(outer.astype(float), 16), outer, half_width=2.0, n_items=30)
    assert wide["verdict"] == found["verdict"]


def test_regimes_need_items_as_well():
    outer = np.array(regimes(np.arange(32))) != "middle"
    assert two_regimes(outer + 0.0, outer, 0.5, 30)["verdict"] == "larger in early and last layers"
    assert two_regimes(outer + 0.0, outer, 1.5, 30)["verdict"] == "no difference shown"
    assert two_regimes(outer + 0.0, outer, 0.5, 5)["verdict"] == "too few items in a domain to say (n = 5)"


def test_even_use_gets_a_word_of_any_expert_in_few_layers():
    """Without correction over the experts of a layer, more than a third of the layers would have one."""
    data = planted_isolation(n_items={"a": 20}, n_layers=100).data
    share = (1 + 0.2 * stats.derive_rng(0, "even use").standard_normal(data["share_item"].shape)) / 16
    even = IsolationResult(data.assign(share_item=(data["share_item"].dims, share))).dominance(by_layer=True)
    some = (even["verdict"] != "no difference shown").groupby(even["layer"]).any()
    assert len(some) == 100
    assert some.mean() < 0.05 + 3 * np.sqrt(0.0475 / 100)
    more = IsolationResult(data.assign(share_item=(data["share_item"].dims, share + 0.1))).dominance()
    assert set(more["verdict"]) == {"above even use"}


def test_experts_are_called_unevenly_used_only_beyond_noise():
    """Even use but for noise: few get a word, each by itself; with few items none."""
    table = planted_isolation(n_items={"a": 40}, n_layers=2).dominance()
    assert set(table["verdict"]) <= {"above even use", "below even use", "no difference shown"}
    assert (table.loc[table["verdict"] == "above even use", "low"] > 1 / 16).all()
    few = planted_isolation(n_items={"a": 5}, n_layers=2).dominance()
    assert set(few["verdict"]) == {"too few items to say (n = 5)"}


def test_best_experts_are_the_planted_ones_under_every_baseline_and_half(planted):
    halves = split_items(planted, seed=1)
    for items in (None, *halves):
        chosen = best_experts(planted, "math", 2, items)
        assert chosen[1][0] == 3
        assert chosen[2][0] == 8
        assert all(len(set(ids)) == 2 for ids in chosen.values())
    for name in ("uniform", "random"):
        other = IsolationResult(planted.data.sel(baseline=[name]))
        assert best_experts(other, "math", 3) == best_experts(planted, "math", 3)
    some = IsolationResult(planted.data.isel(expert=[9, 3, 5]))
    assert best_experts(some, "math", 1)[1] == [3]


def test_ties_go_to_the_smaller_id_whatever_the_order(planted):
    data = planted.data.copy(deep=True)
    data["delta"][:] = 0.0
    assert best_experts(IsolationResult(data.isel(expert=[7, 2, 11])), "math", 2)[0] == [2, 7]


def test_halves_are_disjoint_complete_balanced_and_repeatable(planted):
    first, second = split_items(planted, seed=4)
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(planted.data["item"].values)
    for domain in planted.domains:
        counts = [sum(name.startswith(domain) for name in half) for half in (first, second)]
        assert counts[0] - counts[1] in (0, 1)
    assert split_items(planted, seed=4) == (first, second)
    assert split_items(planted, seed=5) != (first, second)


def test_bad_choices_are_refused(planted):
    with pytest.raises(DataError, match=r"domain 'law'. Expected: one of \['code', 'facts', 'math'\]"):
        best_experts(planted, "law", 1)
    with pytest.raises(ConfigError, match=r"k=17. Expected: 1 to 16"):
        best_experts(planted, "math", 17)
    with pytest.raises(DataError, match="item 'nobody'"):
        best_experts(planted, "math", 1, ["nobody"])
    with pytest.raises(DataError, match="no item of 'math' among the 1 given"):
        best_experts(planted, "math", 1, ["code-0"])
    sets = IsolationResult(routing_apart(planted.data).isel(expert=[0, 1]).assign_coords(expert=["0+2", "1"]))
    with pytest.raises(DataError, match=r"experts forced together, such as 0\+2"):
        best_experts(sets, "math", 1)
    single = planted_isolation(n_items={"a": 1, "b": 8})
    for call in (lambda: split_items(single), single.layer_impact):
        with pytest.raises(DataError, match="one item in domain 'a'"):
            call()
