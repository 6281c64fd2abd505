from itertools import combinations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats import (
    derive_rng,
    expected_spearman,
    latent_pearson,
    spearman,
    spearman_brown,
    split_half_reliability,
)
from tests.unit.stats.planted_noise import planted


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


def test_too_few_items_are_refused():
    with pytest.raises(DataError, match="at least 4 items and 3 experts"):
        split_half_reliability(derive_rng(13).standard_normal((2, 2, 8)))
