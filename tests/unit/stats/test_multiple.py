import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from moe_interp import stats
from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import adjust_p, derive_rng, rejected, wilcoxon_power


@pytest.mark.parametrize("method, name", [("bh", "fdr_bh"), ("by", "fdr_by"), ("holm", "holm")])
def test_equals_statsmodels(method, name):
    p = derive_rng(0, method).random((4, 7, 5)) ** 3
    p[0, 0, :3] = [0, 1, p[1, 1, 1]]
    expected = multipletests(p.ravel(), method=name)[1].reshape(p.shape)
    np.testing.assert_allclose(adjust_p(p, method=method), expected, atol=1e-10)


def test_by_hand():
    p = [0.01, 0.04, 0.03, 0.5]
    np.testing.assert_allclose(adjust_p(p), [0.04, 0.16 / 3, 0.16 / 3, 0.5], atol=1e-12)
    np.testing.assert_allclose(adjust_p(p, method="holm"), [0.04, 0.09, 0.09, 0.5], atol=1e-12)
    np.testing.assert_allclose(adjust_p(p, method="by")[0], 0.04 * (1 + 1 / 2 + 1 / 3 + 1 / 4), atol=1e-12)


def test_missing_p_is_no_test_but_p_of_one_is():
    p = np.array([0.01, np.nan, 0.02])
    np.testing.assert_allclose(adjust_p(p), [0.02, np.nan, 0.02])
    np.testing.assert_allclose(adjust_p([0.01, 1.0, 0.02]), [0.03, 1, 0.03])
    assert rejected(adjust_p(p)).tolist() == [True, False, True]
    assert np.isnan(adjust_p([np.nan])).all()


def test_floor_trap_of_ten_items_and_896_tests():
    floor = stats.smallest_attainable_p(10)
    p = np.ones(896)
    p[:34] = floor
    assert rejected(adjust_p(p)).sum() == 0
    p[34] = floor  # 35 are just enough
    assert rejected(adjust_p(p)).sum() == 35
    p[:400] = floor  # step-up rejects hundreds where a step-down rule (Holm) rejects none
    assert rejected(adjust_p(p)).sum() == 400
    assert rejected(adjust_p(p, method="holm")).sum() == 0


def test_plan_agrees_with_the_procedures():
    assert stats.tests_needed_at_floor(10, 896) == 35
    assert stats.items_needed(896) == 16
    assert stats.items_needed(896, at_floor=35) == 10
    for method in ("bh", "by", "holm"):
        for n, m in ((8, 50), (10, 896), (14, 896), (20, 2048), (26, 6000), (30, 896), (26, 60_000)):
            needed = stats.tests_needed_at_floor(n, m, method=method)
            p = np.ones(m)
            p[: min(needed, m)] = stats.smallest_attainable_p(n)
            assert rejected(adjust_p(p, method=method)).any() == (needed <= m)
            p[max(needed - 1, 0) :] = 1
            assert needed > m or not rejected(adjust_p(p, method=method)).any()


def test_plan_in_words():
    assert "at least 35 of the 896 tests must reach it together" in stats.plan_wilcoxon(10, 896)
    assert "none of the 896 tests can be rejected" in stats.plan_wilcoxon(4, 896)
    assert "a single test of 896 can be rejected" in stats.plan_wilcoxon(16, 896)
    # the floor of the test that is run: the normal law above 25 items
    assert stats.plan_wilcoxon(30, 896).startswith("With 30 items the smallest attainable p is 1.73e-06: a single test")
    assert "at least 4 of the 100000 tests must reach it" in stats.plan_wilcoxon(30, 100_000)


def test_false_discovery_share_is_held():
    rng = derive_rng(1)
    shares = []
    for _ in range(1000):
        z = rng.standard_normal(100) + np.where(np.arange(100) < 20, 3.0, 0.0)
        hits = rejected(adjust_p(2 * scipy_stats.norm.sf(np.abs(z))))
        shares.append(hits[20:].sum() / max(hits.sum(), 1))
    expected = 0.05 * 80 / 100  # BH at alpha holds the rate at alpha times the share of true nulls
    assert abs(np.mean(shares) - expected) < 3 * np.std(shares) / np.sqrt(len(shares))


def test_power_against_the_exact_moments_of_the_statistic():
    n, effect = 40, 0.4
    p1, p2 = scipy_stats.norm.cdf([effect, np.sqrt(2) * effect])
    p3 = scipy_stats.multivariate_normal.cdf([np.sqrt(2) * effect] * 2, cov=[[1, 0.5], [0.5, 1]])
    mean = n * p1 + n * (n - 1) / 2 * p2
    variance = n * p1 * (1 - p1) + n * (n - 1) / 2 * (2 * (p1 - p2) ** 2 + 3 * p2 * (1 - p2))
    variance += n * (n - 1) * (n - 2) * (p3 - p2**2)  # Lehmann (1975)
    critical = n * (n + 1) / 4 + scipy_stats.norm.ppf(0.975) * np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    expected = scipy_stats.norm.sf((critical - mean) / np.sqrt(variance))
    assert wilcoxon_power(effect, n) == pytest.approx(expected, abs=0.02)


def test_power_limits():
    assert wilcoxon_power(5.0, 10, alpha=0.05 / 896) == 0  # below the smallest attainable p
    assert wilcoxon_power(0.0, 30, n_simulations=4000) == pytest.approx(0.05, abs=3 * np.sqrt(0.0475 / 4000))
    assert wilcoxon_power(1.0, 20, seed=3) == wilcoxon_power(1.0, 20, seed=3)


def test_errors():
    with pytest.raises(DataError, match=r"p-values between -0.1 and 1.2.*numbers in \[0, 1\]"):
        adjust_p([-0.1, 1.2])
    with pytest.raises(ConfigError, match="method is 'bonferroni'"):
        adjust_p([0.1], method="bonferroni")
    with pytest.raises(ConfigError, match="alpha is 5"):
        rejected([0.1], alpha=5)
    with pytest.raises(ConfigError, match="m is 0"):
        stats.tests_needed_at_floor(10, 0)
