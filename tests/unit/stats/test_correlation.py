import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import derive_rng, fisher_z_interval, fisher_z_mean, mean_rho_permutation, spearman


def planted(shape, strength, seed=0):
    x, noise = derive_rng(seed, "planted").standard_normal((2, *shape))
    return x, strength * x + noise


def test_spearman_equals_scipy_with_ties():
    x, y = (side.round(1) for side in planted((3, 5, 16), 0.5))
    result = spearman(x, y)
    for index in np.ndindex(3, 5):
        expected = scipy_stats.spearmanr(x[index], y[index])
        assert result.rho[index] == pytest.approx(expected.statistic, abs=1e-10)
        assert result.p_value[index] == pytest.approx(expected.pvalue, abs=1e-10)


def test_spearman_by_hand():
    # d = (0, 1, -1, 0): 1 - 6 * 2 / (4 * 15)
    result = spearman([1, 2, 3, 4], [10, 30, 20, 40])
    assert result.rho == pytest.approx(0.8, abs=1e-12)
    assert spearman([1, 2, 3], [5, 6, 9]).p_value == 0


def test_spearman_invariances_and_broadcast():
    x, y = planted((4, 12), 0.7)
    order = derive_rng(5).permutation(12)
    np.testing.assert_allclose(spearman(x[:, order], y[:, order]).rho, spearman(x, y).rho, atol=1e-12)
    np.testing.assert_allclose(spearman(np.exp(x), -y).rho, -spearman(x, y).rho, atol=1e-12)
    np.testing.assert_allclose(spearman(x.T, y.T, axis=0).rho, spearman(x, y).rho, atol=1e-12)
    np.testing.assert_allclose(spearman(x[0], y).rho, [spearman(x[0], row).rho for row in y], atol=1e-12)


def test_spearman_of_constant_missing_and_short_rows():
    x, y = planted((2, 12), 0.7)
    y[0] = 3
    x[1, 4], y[1, 7] = np.nan, np.nan
    result = spearman(x, y)
    kept = [i for i in range(12) if i not in (4, 7)]
    assert np.isnan(result.rho[0])
    assert result.n.tolist() == [12, 10]
    assert result.rho[1] == pytest.approx(scipy_stats.spearmanr(x[1, kept], y[1, kept]).statistic, abs=1e-12)
    assert np.isnan(spearman([1.0], [2.0]).rho)


def test_fisher_mean_by_hand():
    rho = np.array([0.5, -0.2, np.nan, 1.0])
    expected = np.tanh((np.arctanh(0.5) + np.arctanh(-0.2) + np.arctanh(0.9999)) / 3)
    assert fisher_z_mean(rho) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(fisher_z_mean([np.nan]))
    assert fisher_z_mean(rho[None], axis=None) == pytest.approx(expected, abs=1e-12)


def test_fisher_interval_by_hand_and_coverage():
    one = fisher_z_interval([0.3], 16)
    half = scipy_stats.norm.ppf(0.975) * np.sqrt(1.06 / 13)
    np.testing.assert_allclose([one.low, one.high], np.tanh(np.arctanh(0.3) + np.array([-half, half])), atol=1e-12)
    assert one.assumption == "independent units"
    x, y = planted((2000, 8, 16), 0.0, seed=2)
    many = fisher_z_interval(spearman(x, y).rho, 16)
    # Fieller's variance is itself approximate: allow .01 beyond Monte Carlo error
    assert abs(((many.low <= 0) & (many.high >= 0)).mean() - 0.95) < 3 * np.sqrt(0.0475 / 2000) + 0.01


def test_permutation_of_experts_against_enumeration():
    x, y = planted((1, 5), 1.0, seed=3)
    _, whole = mean_rho_permutation(x, y, n_permutations=20_000)
    exact = scipy_stats.permutation_test(
        (x[0],),
        lambda a: abs(scipy_stats.spearmanr(a, y[0]).statistic),
        permutation_type="pairings",
        alternative="greater",
    ).pvalue
    assert whole.p_value == pytest.approx(exact, abs=3 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_permutation_level_when_domains_share_deltas():
    # the same deltas in both domains: independent permutations per domain would reject far too often
    x, y = planted((600, 2, 3, 10), 0.0, seed=4)
    x[:, 1], y[:, 1] = x[:, 0], y[:, 0]
    p = np.array(
        [mean_rho_permutation(a, b, n_permutations=199, seed=k)[1].p_value for k, (a, b) in enumerate(zip(x, y))]
    )
    assert abs((p <= 0.05).mean() - 0.05) < 3 * np.sqrt(0.0475 / 600)


def test_permutation_finds_a_planted_correlation_and_skips_constant_layers():
    x, y = planted((2, 6, 16), 1.0)
    y[:, 0] = 0
    per_domain, whole = mean_rho_permutation(x, y, n_permutations=499)
    assert whole.p_value == 1 / 500
    np.testing.assert_allclose(per_domain.statistic, fisher_z_mean(spearman(x, y).rho), atol=1e-12)
    assert whole.statistic == pytest.approx(fisher_z_mean(spearman(x, y).rho, axis=None), abs=1e-12)
    again = mean_rho_permutation(x, y, n_permutations=499)
    np.testing.assert_array_equal(again[0].p_value, per_domain.p_value)


def test_errors():
    with pytest.raises(DataError, match=r"x has shape \(3,\) and y \(4,\)"):
        spearman(np.ones(3), np.ones(4))
    with pytest.raises(DataError, match=r"\[domain, layer, expert\]"):
        mean_rho_permutation(np.ones(4), np.ones(4))
    with pytest.raises(ConfigError, match="n \\(pairs behind a correlation\\) is 3"):
        fisher_z_interval([0.1], 3)
    with pytest.raises(DataError, match="1 missing values"):
        mean_rho_permutation([[1, 2, np.nan]], [[1, 2, 3]])
