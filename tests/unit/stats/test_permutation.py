import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import (
    derive_rng,
    paired_permutation,
    shifted_group_test,
    two_group_permutation,
)


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
