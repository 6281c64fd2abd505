import numpy as np
import pytest

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import CORRECTED_COVERS, corrected, corrected_correlation, derive_rng
from moe_interp.stats.intervals.verdicts import COVERS
from tests.unit.stats.planted_noise import planted


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


def test_noise_that_both_sides_share_in_an_item_is_no_correlation():
    """Independent expectations, the same noise in both: the means agree by far, halves of different items do not."""
    runs, wrong, raw = 40, 0, 0
    for run in range(runs):
        rng = derive_rng(run, "shared noise")
        shared = 2.0 * rng.standard_normal((16, 4, 16))
        x, y = (rng.standard_normal((4, 16)) + shared + 0.3 * rng.standard_normal(shared.shape) for _ in range(2))
        found = corrected_correlation(x, y, n_resamples=20, n_permutations=199, seed=run)
        wrong += found.p_crossed <= 0.05
        raw += found.p_value <= 0.05
    assert wrong / runs <= 0.06 + 2 * np.sqrt(0.06 * 0.94 / runs)
    assert raw / runs > 0.15  # what the verdict would hang on without the halves


def test_layers_whose_experts_are_alike_count_once():
    """One pattern over experts in all layers, unrelated in x and y: permuted apart, layers would seem independent."""
    runs, wrong, apart = 40, 0, 0
    for run in range(runs):
        rng = derive_rng(run, "alike")
        x, y = (rng.standard_normal(12) + 0.3 * rng.standard_normal((10, 6, 12)) for _ in range(2))
        found = corrected_correlation(x, y, n_resamples=20, n_permutations=199, seed=run)
        wrong += found.p_crossed <= 0.05
        apart += found.p_value <= 0.05
    assert wrong / runs <= 0.06 + 2 * np.sqrt(0.06 * 0.94 / runs)
    assert apart / runs > 0.15


def test_a_clear_correlation_is_found_by_the_crossed_test():
    rng = derive_rng(0, "clear")
    truth = rng.standard_normal((4, 12))
    x, y = (truth + 0.5 * rng.standard_normal((12, 4, 12)) for _ in range(2))
    found = corrected_correlation(x, y, n_resamples=20, n_permutations=199)
    assert found.p_crossed == 1 / 200
    assert found.verdict.startswith("positive correlation")


def test_with_eight_items_the_interval_covers_what_the_verdict_is_told(monkeypatch):
    told, decide = [], corrected.decide
    monkeypatch.setattr(corrected, "decide", lambda *a, **k: told.append(k["coverage"]) or decide(*a, **k))
    covered = []
    for seed in range(30):
        x, y, truth = planted(0.8, 0.3, n=8, seed=seed)
        found = corrected_correlation(x, y, n_resamples=40, n_splits=25, n_permutations=9, seed=seed).corrected
        covered.append(found.low <= truth <= found.high)
    assert set(told) == {CORRECTED_COVERS}
    assert COVERS <= CORRECTED_COVERS < 0.95
    assert np.mean(covered) >= CORRECTED_COVERS - 3 * np.sqrt(CORRECTED_COVERS * (1 - CORRECTED_COVERS) / 30)
