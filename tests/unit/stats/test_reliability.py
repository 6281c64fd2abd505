from itertools import combinations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import (
    corrected_correlation,
    derive_rng,
    expected_spearman,
    latent_pearson,
    spearman,
    spearman_brown,
    split_half_reliability,
)


def planted(reliability, rho, n=50, layers=32, experts=16, seed=0):
    """Items, and the mean Spearman correlation of their expectations."""
    rng = derive_rng(seed, "planted")
    r = float(latent_pearson(rho, experts))
    a, b = rng.standard_normal((2, layers, experts))
    b = r * a + np.sqrt(1 - r**2) * b
    noise = np.sqrt(n * (1 - reliability) / reliability)
    x, y = (side + noise * rng.standard_normal((n, layers, experts)) for side in (a, b))
    return x, y, float(spearman(a, b).rho.mean())


def test_spearman_brown_by_hand():
    assert spearman_brown(0.5) == pytest.approx(2 / 3, abs=1e-12)
    assert spearman_brown(0.5, 4) == pytest.approx(0.8, abs=1e-12)
    assert spearman_brown(spearman_brown(0.37, 3), 1 / 3) == pytest.approx(0.37, abs=1e-12)


def test_expected_spearman_against_simulation_and_its_inverse():
    rng = derive_rng(1)
    for r in (-0.7, 0.2, 0.6):
        a, b = rng.standard_normal((2, 20_000, 12))
        rho = spearman(a, r * a + np.sqrt(1 - r**2) * b).rho
        assert rho.mean() == pytest.approx(float(expected_spearman(r, 12)), abs=3 * rho.std() / np.sqrt(20_000))
    grid = np.linspace(-1, 1, 41)
    np.testing.assert_allclose(latent_pearson(expected_spearman(grid, 16), 16), grid, atol=1e-6)
    assert expected_spearman(0.5, 10**9) == pytest.approx(6 / np.pi * np.arcsin(0.25), abs=1e-8)


@pytest.mark.parametrize("experts", [7, 70])  # few experts are ranked by comparison, many by sorting
def test_split_half_equals_all_splits(experts):
    x = derive_rng(2).standard_normal((6, 2, experts)) + derive_rng(3).standard_normal(experts)
    x = x.round(1)  # ties
    result = split_half_reliability(x, n_splits=4000)
    for layer in range(2):
        rhos = []
        for first in combinations(range(6), 3):
            second = [i for i in range(6) if i not in first]
            means = x[list(first), layer].mean(0), x[second, layer].mean(0)
            rhos.append(scipy_stats.spearmanr(*means).statistic)
        assert result.half[layer] == pytest.approx(np.mean(rhos), abs=4 * np.std(rhos) / np.sqrt(4000) + 1e-6)
    np.testing.assert_allclose(result.full, 2 * result.half / (1 + result.half), atol=1e-12)
    assert result.pooled == pytest.approx(float(spearman_brown(result.half.mean())), abs=1e-12)


def test_split_half_finds_the_planted_reliability_and_skips_flat_layers():
    x, _, _ = planted(0.8, 0.0)
    x[:, 3] = 0.25
    result = split_half_reliability(x)
    assert np.isnan(result.half[3])
    assert result.pooled == pytest.approx(float(spearman_brown(expected_spearman(2 / 3, 16))), abs=0.05)
    assert split_half_reliability(x[..., ::-1]).pooled == pytest.approx(result.pooled, abs=1e-12)


def test_corrected_correlation_without_noise_is_the_plain_one():
    x, y, truth = planted(0.999, 0.5)
    result = corrected_correlation(x, y, n_resamples=20)
    assert result.raw.value == pytest.approx(truth, abs=0.01)
    assert result.corrected.value == pytest.approx(truth, abs=0.01)
    assert result.reliability_x.value == pytest.approx(0.999, abs=0.001)


@pytest.mark.parametrize("reliability, rho", [(0.5, 0.0), (0.5, 0.6), (0.8, 0.3)])
def test_bias_and_coverage(reliability, rho):
    """The study of 2000 runs is docs/stats-coverage.md; this one is small and seeded."""
    errors, covered, raw = [], [], []
    for seed in range(20):
        x, y, truth = planted(reliability, rho, seed=seed)
        result = corrected_correlation(x, y, n_resamples=40, n_splits=25, n_permutations=9, seed=seed)
        errors.append(result.corrected.value - truth)
        raw.append(result.raw.value - truth)
        covered.append(result.corrected.low <= truth <= result.corrected.high)
        assert not result.too_noisy
    assert abs(np.mean(errors)) <= 0.05
    assert np.mean(covered) >= 0.95 - 3 * np.sqrt(0.0475 / 20)
    assert rho == 0 or np.mean(raw) < -0.04  # what the correction is for


def test_no_correlation_and_too_noisy_are_told_apart():
    clear = corrected_correlation(*planted(0.8, 0.0)[:2], n_resamples=40)
    assert clear.verdict.startswith("no correlation: ")
    assert clear.p_value > 0.05
    assert corrected_correlation(*planted(0.8, 0.5)[:2], n_resamples=40).verdict.startswith("positive correlation: ")
    x, y, _ = planted(0.8, -0.5)
    assert corrected_correlation(x, y, n_resamples=40).verdict.startswith("negative correlation: ")
    noise = derive_rng(9).standard_normal(y.shape)
    noisy = corrected_correlation(x, noise, n_resamples=40)
    assert noisy.too_noisy
    assert noisy.verdict.startswith("too noisy: the reliability of y may be below 0.2")
    assert np.isnan([noisy.corrected.value, noisy.corrected.low, noisy.corrected.high]).all()
    assert np.isfinite(noisy.raw.value)


def test_noise_shared_by_x_and_y_makes_no_correlation():
    rng = derive_rng(10)
    shared = 6 * rng.standard_normal((50, 32, 16))
    x, y = rng.standard_normal((2, 1, 32, 16)) + shared
    result = corrected_correlation(x, y, n_resamples=40)
    assert result.raw.value > 0.3
    assert abs(result.corrected.value) < 0.2


def test_invariances():
    x, y, _ = planted(0.8, 0.4, layers=6)
    base = corrected_correlation(x, y, n_resamples=20)
    order = derive_rng(11).permutation(16)
    shuffled = corrected_correlation(x[..., order], y[..., order], n_resamples=20)
    assert shuffled.corrected.value == pytest.approx(base.corrected.value, abs=1e-6)
    # a baseline is the same for all experts of an item and layer
    shifted = corrected_correlation(3 * x, y - 10 * derive_rng(12).random((50, 6, 1)), n_resamples=20)
    assert shifted.corrected.low == pytest.approx(base.corrected.low, abs=1e-6)
    flipped = corrected_correlation(x, -y, n_resamples=20)
    assert flipped.corrected.value == pytest.approx(-base.corrected.value, abs=1e-6)
    flat = corrected_correlation(
        np.concatenate([x, x[:, :1]], axis=1), np.concatenate([y, 0 * y[:, :1]], axis=1), n_resamples=20
    )
    assert flat.corrected.value == pytest.approx(base.corrected.value, abs=1e-12)


def test_domains_are_pooled():
    one, two = planted(0.8, 0.5, n=40, layers=8, seed=1), planted(0.8, 0.5, n=60, layers=8, seed=2)
    result = corrected_correlation([one[0], two[0]], [one[1], two[1]], n_resamples=40)
    assert result.n_items == (40, 60)
    parts = [corrected_correlation(x, y, n_resamples=40) for x, y, _ in (one, two)]
    assert result.raw.value == pytest.approx(np.mean([part.raw.value for part in parts]), abs=1e-12)
    width = result.corrected.high - result.corrected.low
    assert width < min(part.corrected.high - part.corrected.low for part in parts)


def test_errors():
    x = derive_rng(13).standard_normal((10, 2, 8))
    with pytest.raises(DataError, match=r"the same shape \[item, layer, expert\] with at least 4 experts"):
        corrected_correlation(x, x[:, :1])
    with pytest.raises(DataError, match="at least 8 items"):
        corrected_correlation(x[:6], x[:6])
    with pytest.raises(DataError, match="a layer in which experts differ"):
        corrected_correlation(x, np.zeros_like(x))
    with pytest.raises(DataError, match="x has 2 domains and y 1"):
        corrected_correlation([x, x], [x])
    with pytest.raises(DataError, match="the same layers and experts in every domain"):
        corrected_correlation([x, x[:, :1]], [x, x[:, :1]])
    with pytest.raises(ConfigError, match="n_splits is 10"):
        corrected_correlation(x, x, n_splits=10)
    with pytest.raises(DataError, match="1 missing values"):
        corrected_correlation(np.where(x == x.max(), np.nan, x), x)
    with pytest.raises(DataError, match="at least 4 items and 3 experts"):
        split_half_reliability(x[:2])
