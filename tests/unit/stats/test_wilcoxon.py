from itertools import product

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import derive_rng, smallest_attainable_p, wilcoxon_signed_rank
from moe_interp.stats.significance.wilcoxon import signed_rank_null

# Hollander & Wolfe, depression scale before and after; R: wilcox.test(x, y, paired = TRUE, alternative = "greater")
BEFORE = np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30])
AFTER = np.array([0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29])


def tied(shape, seed=0):
    """Differences with many ties and zeros."""
    return np.round(2 * derive_rng(seed, "tied").standard_normal(shape)) / 2


def by_enumeration(x, zero_method, alternative):
    """All sign patterns of the nonzero differences, one at a time."""
    if zero_method == "wilcox":
        x = x[x != 0]
    ranks = scipy_stats.rankdata(np.abs(x))[x != 0]
    observed = ranks[x[x != 0] > 0].sum()
    sums = np.array([np.dot(signs, ranks) for signs in product([0, 1], repeat=len(ranks))])
    upper, lower = (sums >= observed - 1e-9).mean(), (sums <= observed + 1e-9).mean()
    return {"greater": upper, "less": lower, "two-sided": min(1, 2 * min(upper, lower))}[alternative]


def test_textbook_value():
    result = wilcoxon_signed_rank(BEFORE - AFTER, alternative="greater")
    assert result.w_plus == 40
    assert result.p_value == pytest.approx(10 / 512, abs=1e-12)  # R prints 0.01953
    assert result.effect == pytest.approx((40 - 5) / 45, abs=1e-12)


def test_by_hand_with_tie_and_zero():
    # |x| ranks: 0 -> 1, the three ones -> 3, the two -> 5; W+ = 3 + 3 + 5, W- = 3
    result = wilcoxon_signed_rank([0, 1, 1, -1, 2])
    assert (result.w_plus, result.w_minus, result.n, result.n_zero) == (11, 3, 5, 1)
    # of 16 patterns of {3, 3, 3, 5}, W+ >= 11 in: all (14), one of the threes negative (3 x 11)
    assert result.p_value == pytest.approx(2 * 4 / 16, abs=1e-12)
    assert result.effect == pytest.approx(8 / 14, abs=1e-12)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("zero_method", ["pratt", "wilcox"])
def test_exact_null_with_ties_and_zeros_equals_enumeration(zero_method, alternative):
    x = tied((40, 8))
    p = wilcoxon_signed_rank(x, zero_method=zero_method, alternative=alternative).p_value
    expected = [by_enumeration(row, zero_method, alternative) for row in x]
    np.testing.assert_allclose(p, expected, atol=1e-12)


@pytest.mark.parametrize("n", [6, 10, 12, 25])
@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_exact_equals_scipy_without_ties(n, alternative):
    x = derive_rng(1, n).standard_normal((50, n)) + 0.3
    expected = scipy_stats.wilcoxon(x, axis=-1, method="exact", alternative=alternative).pvalue
    np.testing.assert_allclose(wilcoxon_signed_rank(x, alternative=alternative).p_value, expected, atol=1e-10)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("zero_method", ["pratt", "wilcox"])
@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_normal_approximation_equals_scipy_with_ties_and_zeros(zero_method, alternative, correction):
    x = tied((50, 50)) + 0.5 * (derive_rng(2).random((50, 1)) < 0.5)
    result = wilcoxon_signed_rank(x, zero_method=zero_method, alternative=alternative, correction=correction)
    expected = scipy_stats.wilcoxon(
        x, axis=-1, method="asymptotic", zero_method=zero_method, alternative=alternative, correction=correction
    )
    assert not result.exact.any()
    np.testing.assert_allclose(result.p_value, expected.pvalue, atol=1e-10)


@pytest.mark.parametrize("n", [10, 12, 50])
def test_paper_sized_family(n):
    x = tied((4, 32, 7, n))
    x[0, 0, 0] = 0
    result = wilcoxon_signed_rank(x)
    assert result.p_value.shape == (4, 32, 7)
    assert result.p_value[0, 0, 0] == 1
    assert result.effect[0, 0, 0] == 0
    assert ((result.p_value > 0) & (result.p_value <= 1)).all()
    one = wilcoxon_signed_rank(x[3, 5, 2])  # the family changes nothing for a row
    assert one.p_value == pytest.approx(result.p_value[3, 5, 2], abs=1e-12)


def test_invariances():
    x = tied((30, 12))
    base = wilcoxon_signed_rank(x)
    np.testing.assert_allclose(wilcoxon_signed_rank(x[:, ::-1]).p_value, base.p_value, atol=1e-12)
    np.testing.assert_allclose(wilcoxon_signed_rank(3 * x).p_value, base.p_value, atol=1e-12)
    np.testing.assert_allclose(wilcoxon_signed_rank(-x).p_value, base.p_value, atol=1e-12)
    np.testing.assert_allclose(wilcoxon_signed_rank(-x).effect, -base.effect, atol=1e-12)
    np.testing.assert_array_equal(wilcoxon_signed_rank(x.T, axis=0).p_value, base.p_value)


def test_missing_items_are_left_out_row_by_row():
    x = np.stack([tied(30, 1), tied(30, 2), np.full(30, np.nan)])
    x[0, 9:] = np.nan
    result = wilcoxon_signed_rank(x)
    assert result.n.tolist() == [9, 30, 0]
    assert result.exact.tolist() == [True, False, True]
    assert result.p_value[0] == pytest.approx(wilcoxon_signed_rank(x[0, :9]).p_value, abs=1e-12)
    assert result.p_value[1] == pytest.approx(wilcoxon_signed_rank(x[1]).p_value, abs=1e-12)
    assert np.isnan(result.p_value[2])
    assert np.isnan(result.effect[2])


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_the_stated_floor_is_what_the_test_attains(alternative):
    way = -1 if alternative == "less" else 1
    for n in range(1, 61):
        extreme = way * (1 + derive_rng(n, "floor").random(n))
        floor = smallest_attainable_p(n, alternative)
        assert floor == pytest.approx(float(wilcoxon_signed_rank(extreme, alternative=alternative).p_value), rel=1e-12)
        if n < 20:  # the smallest difference turned round is the next best
            extreme[np.abs(extreme).argmin()] *= -1
            assert n == 1 or wilcoxon_signed_rank(extreme, alternative=alternative).p_value > floor
        method = "exact" if n <= 25 else "asymptotic"
        expected = scipy_stats.wilcoxon(way * np.arange(1.0, n + 1), method=method, alternative=alternative).pvalue
        assert floor == pytest.approx(expected, rel=1e-10)


def test_smallest_attainable_p_by_hand():
    assert smallest_attainable_p(1) == 1
    assert smallest_attainable_p(10) == pytest.approx(2 / 1024, rel=1e-14)
    assert smallest_attainable_p(10, "greater") == pytest.approx(1 / 1024, rel=1e-14)
    assert smallest_attainable_p(25) == pytest.approx(2 / 2**25, rel=1e-12)
    # z = 465 / sqrt(30 x 31 x 61 / 6)
    assert smallest_attainable_p(30) == pytest.approx(2 * scipy_stats.norm.sf(465 / np.sqrt(9455)), rel=1e-12)
    assert smallest_attainable_p(30, exact_max_n=30) == pytest.approx(2 / 2**30, rel=1e-12)
    # ties: the exact floor stays, the normal one falls to that of z = sqrt(n)
    assert wilcoxon_signed_rank(np.ones(25)).p_value == pytest.approx(2 / 2**25, rel=1e-12)
    assert wilcoxon_signed_rank(np.ones(30)).p_value == pytest.approx(2 * scipy_stats.norm.sf(np.sqrt(30)), rel=1e-12)


def test_null_distribution_of_untied_ranks():
    null = signed_rank_null(np.arange(1, 11)[None])[0, ::2]
    assert null.sum() == pytest.approx(1, abs=1e-14)
    assert null[:9].sum() == pytest.approx(25 / 1024, abs=1e-14)  # R: psignrank(8, 10)


def test_level_is_the_attainable_one_when_exact():
    p = wilcoxon_signed_rank(derive_rng(3).standard_normal((20_000, 10))).p_value
    attainable = 2 * 25 / 1024  # the largest attainable p up to .05
    assert abs((p <= 0.05).mean() - attainable) < 3 * np.sqrt(attainable * (1 - attainable) / 20_000)


@pytest.mark.parametrize("n", [26, 50])
def test_level_of_the_approximation_from_the_exact_null(n):
    null = signed_rank_null(np.arange(1, n + 1)[None])[0, ::2]
    w = np.arange(len(null))
    z = (w - n * (n + 1) / 4) / np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    level = null[2 * scipy_stats.norm.sf(np.abs(z)) <= 0.05].sum()
    p = wilcoxon_signed_rank(derive_rng(4, n).standard_normal((20_000, n))).p_value
    assert abs(level - 0.05) < 0.002
    assert abs((p <= 0.05).mean() - level) < 3 * np.sqrt(0.05 * 0.95 / 20_000)


def test_errors():
    with pytest.raises(DataError, match="x holds 1 infinite values"):
        wilcoxon_signed_rank([1.0, np.inf])
    with pytest.raises(ConfigError, match=r"alternative is 'both'.*'two-sided', 'greater', 'less'"):
        wilcoxon_signed_rank([1.0], alternative="both")
    with pytest.raises(DataError, match="axis is 3"):
        wilcoxon_signed_rank(np.ones((2, 2)), axis=3)
    with pytest.raises(ConfigError, match="n is 0"):
        smallest_attainable_p(0)
