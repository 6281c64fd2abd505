from itertools import permutations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import (
    derive_rng,
    domain_effect,
    paired_permutation,
    rejected,
    shifted_group_test,
    two_group_permutation,
)

DOMAIN = np.repeat(["code", "law", "math", "poetry"], 12)


def fragile(seed, interaction=0.0, shape=(48, 3, 8)):
    """Deltas with a main effect of the domain and of the item, and an interaction with the expert."""
    rng = derive_rng(seed, "fragile")
    codes = np.repeat(np.arange(4), 12)
    delta = rng.standard_normal(shape) + rng.standard_normal((48, 1, 1)) - 1.5 * codes[:, None, None]
    return delta + interaction * rng.standard_normal((4, *shape[1:]))[codes]


def test_statistic_equals_analysis_of_variance():
    delta = fragile(0, 0.5)
    result = domain_effect(delta, DOMAIN, n_permutations=9)
    centred = delta - delta.mean(-1, keepdims=True)
    groups = [centred[np.array(DOMAIN) == name] for name in result.domains]
    expected = scipy_stats.f_oneway(*groups)
    within = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups)
    np.testing.assert_allclose((result.statistic / 3) / (within / 44), expected.statistic, atol=1e-10)
    np.testing.assert_allclose(result.eta_squared, result.statistic / (result.statistic + within), atol=1e-12)
    np.testing.assert_allclose(result.contrast[2], groups[2].mean(0) - centred.mean(0), atol=1e-12)


def test_p_equals_enumeration():
    delta = np.array([[0.3, 0.1], [1.0, 0.2], [-0.4, 0.9], [0.2, 1.4]])
    label = np.array([0, 0, 1, 1])
    result = domain_effect(delta, label, n_permutations=4000)

    def between(order):
        centred = (delta - delta.mean(-1, keepdims=True))[list(order)]
        return sum(2 * (centred[label == d].mean(0) - centred.mean(0)) ** 2 for d in (0, 1))

    null = np.array([between(order) for order in permutations(range(4))])
    exact = (null >= between(range(4)) - 1e-9).mean(0)
    np.testing.assert_allclose(result.p_value, exact, atol=4 * np.sqrt(0.25 / 4000))


def test_level_with_a_main_effect_of_domain_and_no_interaction():
    cells, whole = [], []
    for seed in range(400):
        result = domain_effect(fragile(seed), DOMAIN, n_permutations=199, seed=seed)
        cells.append(result.p_value <= 0.05)
        whole.append(result.global_p <= 0.05)
    assert abs(np.mean(cells) - 0.05) < 0.01
    assert abs(np.mean(whole) - 0.05) < 3 * np.sqrt(0.0475 / 400)
    # without centring, every one of these data sets would be called specialized
    uncentred = scipy_stats.f_oneway(*[fragile(0)[np.array(DOMAIN) == d, 0, 0] for d in np.unique(DOMAIN)])
    assert uncentred.pvalue < 1e-4


def test_power_with_an_interaction():
    results = [domain_effect(fragile(seed, 1.0), DOMAIN, n_permutations=999, seed=seed) for seed in range(10)]
    assert all(result.global_p == 0.001 for result in results)
    assert np.mean([rejected(result.q_value).mean() for result in results]) > 0.7


def test_domain_effect_finds_the_specialist():
    delta = fragile(1)
    delta[24:36, 1, 4] += 3.0  # math
    result = domain_effect(delta, DOMAIN, n_permutations=1999)
    assert result.domains == ("code", "law", "math", "poetry")
    assert np.unravel_index(result.contrast[2].argmax(), (3, 8)) == (1, 4)
    assert rejected(result.q_value)[1, 4]


def test_domain_effect_invariances():
    delta = fragile(2, 0.5)
    base = domain_effect(delta, DOMAIN, n_permutations=99)
    shifted = domain_effect(delta + 5 * derive_rng(3).random((48, 3, 1)), DOMAIN, n_permutations=99)
    np.testing.assert_array_equal(shifted.p_value, base.p_value)
    order = derive_rng(4).permutation(8)
    np.testing.assert_allclose(
        domain_effect(delta[..., order], DOMAIN, n_permutations=99).p_value, base.p_value[:, order], atol=1e-12
    )
    assert domain_effect(delta[:, 0], DOMAIN, n_permutations=99).p_value.shape == (8,)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_sign_flips_equal_scipy(alternative):
    x = (derive_rng(5).standard_normal((3, 9)) + 0.4).round(1)
    result = paired_permutation(x, alternative=alternative)
    assert result.exact
    for row, p in zip(x, result.p_value):
        expected = scipy_stats.permutation_test(
            (row, np.zeros(9)),
            lambda a, b: np.mean(a - b),
            permutation_type="samples",
            n_resamples=np.inf,
            alternative=alternative,
        ).pvalue
        assert p == pytest.approx(expected, abs=1e-10)


def test_sign_flips_by_hand_and_drawn():
    # of 8 patterns of (1, 2, 3), only +++ and --- reach |6|
    assert paired_permutation([1.0, 2.0, 3.0]).p_value == pytest.approx(2 / 8, abs=1e-12)
    assert paired_permutation(np.zeros(5)).p_value == 1
    x = derive_rng(6).standard_normal(20) + 0.5
    drawn = paired_permutation(x, n_permutations=20_000)
    assert not drawn.exact
    assert drawn.p_value == pytest.approx(scipy_stats.ttest_1samp(x, 0).pvalue, abs=0.01)
    level = (paired_permutation(derive_rng(7).standard_normal((4000, 12))).p_value <= 0.05).mean()
    assert abs(level - 0.05) < 3 * np.sqrt(0.0475 / 4000)


@pytest.mark.parametrize("alternative", ["greater", "less"])
def test_two_groups_equal_scipy(alternative):
    x = derive_rng(8).standard_normal((2, 11)).round(1)
    group = np.arange(11) < 4
    result = two_group_permutation(x, group, alternative=alternative)
    assert result.exact
    assert result.n_permutations == 330
    for row, p in zip(x, result.p_value):
        expected = scipy_stats.permutation_test(
            (row[group], row[~group]), lambda a, b: a.mean() - b.mean(), n_resamples=np.inf, alternative=alternative
        ).pvalue
        assert p == pytest.approx(expected, abs=1e-10)


def test_two_groups_by_hand_and_drawn():
    # 2 of 6 splits of (1, 2, 3, 4) into pairs differ by 2: {3, 4} and {1, 2}
    assert two_group_permutation([1.0, 2, 3, 4], np.array([False, False, True, True])).p_value == pytest.approx(2 / 6)
    x = derive_rng(9).standard_normal((1000, 24))
    drawn = two_group_permutation(x, np.arange(24) % 3 == 0, n_permutations=1999)
    assert not drawn.exact
    assert abs((drawn.p_value <= 0.05).mean() - 0.05) < 3 * np.sqrt(0.0475 / 1000) + 0.005
    impact = np.array([0.75, 0.7, 0.65] + [0.05] * 20 + [0.44, 0.78])
    ends = np.r_[[True] * 3, [False] * 20, [True] * 2]
    assert two_group_permutation(impact, ends, n_permutations=999).p_value <= 0.002


def test_errors():
    with pytest.raises(DataError, match=r"counts \{'math': 4\}.*at least two domains"):
        domain_effect(np.ones((4, 3)), ["math"] * 4)
    with pytest.raises(DataError, match="for 4 items"):
        domain_effect(np.ones((4, 3)), ["a", "b", "a"])
    with pytest.raises(DataError, match="one boolean per value, with members and others"):
        two_group_permutation([1.0, 2.0], np.array([True, True]))
    with pytest.raises(DataError, match="1 missing values"):
        paired_permutation([1.0, np.nan])
    with pytest.raises(ConfigError, match="n_permutations is 0"):
        paired_permutation([1.0, 2.0], n_permutations=0)


def test_shifted_labels_by_a_loop():
    x, group = derive_rng(11).standard_normal(9), np.arange(9) < 3
    found = shifted_group_test(x, group)
    each = []
    for by in range(9):
        moved = [group[(place - by) % 9] for place in range(9)]
        inside = [value for value, is_in in zip(x, moved) if is_in]
        outside = [value for value, is_in in zip(x, moved) if not is_in]
        each.append(sum(inside) / 3 - sum(outside) / 6)
    assert found.statistic == pytest.approx(each[0])
    assert found.p_value == pytest.approx(np.mean(np.abs(each) >= abs(each[0]) - 1e-12))
    assert shifted_group_test(group.astype(float), group).p_value == pytest.approx(1 / 9)
    with pytest.raises(DataError, match="one boolean per value"):
        shifted_group_test(x, np.zeros(9, dtype=bool))
