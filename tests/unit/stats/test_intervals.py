import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import (
    bootstrap_interval,
    derive_rng,
    mean_interval,
    median_interval,
    pseudomedian_interval,
)

# Hollander & Wolfe, differences after - before on the depression scale
DIFFERENCES = np.array([-0.952, 0.147, -1.022, -0.43, -0.62, -0.59, -0.49, 0.08, -0.01])


def coverage(interval, truth=0.0):
    return ((interval.low <= truth) & (truth <= interval.high)).mean()


def test_pseudomedian_textbook_value():
    # R: wilcox.test(after, before, paired = TRUE, conf.int = TRUE); Hollander & Wolfe print -.46 and (-.786, -.010)
    result = pseudomedian_interval(DIFFERENCES)
    np.testing.assert_allclose([result.estimate, result.low, result.high], [-0.46, -0.786, -0.01], atol=1e-10)
    assert result.attained == pytest.approx(1 - 2 * 10 / 512, abs=1e-12)


def test_median_by_hand():
    # n = 9: P(Binomial(9, 1/2) <= 1) = 10 / 512, so the second smallest and second largest
    result = median_interval(DIFFERENCES)
    np.testing.assert_allclose([result.estimate, result.low, result.high], [-0.49, -0.952, 0.08], atol=1e-12)
    assert result.attained == pytest.approx(1 - 20 / 512, abs=1e-12)


@pytest.mark.parametrize("n", [6, 10, 30])
def test_median_interval_inverts_the_sign_test(n):
    x = np.sort(derive_rng(0, n).standard_normal(n))
    result = median_interval(x)
    for k, point in enumerate((x[1:] + x[:-1]) / 2, start=1):
        accepted = scipy_stats.binomtest(k, n).pvalue > 0.05
        assert accepted == (result.low <= point <= result.high)


@pytest.mark.parametrize("n", [6, 10, 16])
def test_pseudomedian_interval_inverts_the_signed_rank_test(n):
    x = derive_rng(1, n).standard_normal(n)
    result = pseudomedian_interval(x)
    walsh = np.sort([(x[i] + x[j]) / 2 for i in range(n) for j in range(i, n)])
    points = (walsh[1:] + walsh[:-1]) / 2
    accepted = scipy_stats.wilcoxon(x[:, None] - points, axis=0, method="exact").pvalue > 0.05
    np.testing.assert_array_equal(accepted, (result.low <= points) & (points <= result.high))
    assert result.estimate == pytest.approx(np.median(walsh), abs=1e-12)


@pytest.mark.parametrize("function", [median_interval, pseudomedian_interval])
def test_exact_coverage_is_the_attained_one(function):
    for n in (6, 10, 20):
        x = derive_rng(2, n).standard_t(3, (4000, n))
        result = function(x)
        attained = result.attained[0]
        assert attained >= 0.95
        assert abs(coverage(result) - attained) < 3 * np.sqrt(attained * (1 - attained) / 4000)


@pytest.mark.parametrize("function", [median_interval, pseudomedian_interval])
def test_exact_intervals_of_ragged_and_short_rows(function):
    x = derive_rng(3).standard_normal((4, 12))
    x[1, 8:] = np.nan
    x[2, 5:] = np.nan
    x[3] = np.nan
    result = function(x)
    assert result.low[1] == function(x[1, :8]).low
    assert result.high[0] == function(x[0]).high
    assert (result.low[2], result.high[2]) == (-np.inf, np.inf)  # five items: no such interval
    assert np.isnan(result.estimate[3])
    moved = function(2 * x + 1)
    np.testing.assert_allclose(moved.low[:2], 2 * result.low[:2] + 1, atol=1e-12)


@pytest.mark.parametrize("method, theirs", [("percentile", "percentile"), ("bca", "BCa")])
def test_plain_bootstrap_agrees_with_scipy(method, theirs):
    x = derive_rng(4).exponential(size=30)
    ours = bootstrap_interval(x, method=method, expand=False, n_resamples=40_000)
    reference = scipy_stats.bootstrap(
        (x,), np.mean, method=theirs, n_resamples=40_000, rng=np.random.default_rng(0)
    ).confidence_interval
    np.testing.assert_allclose([ours.low, ours.high], reference, atol=0.01 * x.std())


def test_bootstrap_of_a_function_equals_that_of_its_name():
    x = derive_rng(5).standard_normal((3, 25))
    for name, function in (("median", lambda a: np.median(a, axis=-1)), ("mean", lambda a: a.mean(-1))):
        named = bootstrap_interval(x, name, expand=False, n_resamples=4000)
        own = bootstrap_interval(x, function, expand=False, n_resamples=4000)
        np.testing.assert_allclose(named.low, own.low, atol=0.05)
        np.testing.assert_allclose(named.high, own.high, atol=0.05)


@pytest.mark.parametrize("method", ["percentile", "bca", "studentized"])
def test_bootstrap_invariances(method):
    x = derive_rng(6).exponential(size=(2, 3, 20))
    base = bootstrap_interval(x, method=method, n_resamples=500)
    assert base.low.shape == (2, 3)
    moved = bootstrap_interval(3 * x - 1, method=method, n_resamples=500)
    np.testing.assert_allclose(moved.low, 3 * base.low - 1, atol=1e-10)
    np.testing.assert_allclose(moved.high, 3 * base.high - 1, atol=1e-10)
    one = bootstrap_interval(x[1, 2], method=method, n_resamples=500)
    np.testing.assert_allclose([one.low, one.high], [base.low[1, 2], base.high[1, 2]], atol=1e-10)
    constant = bootstrap_interval(np.full(10, 2.5), method=method, n_resamples=100)
    assert (constant.low, constant.high) == (2.5, 2.5)


def test_studentized_quantiles_by_hand():
    # two items: half of the resamples have one twice, no spread and an endless t, and so the interval is endless
    result = bootstrap_interval([1.0, 3.0], method="studentized", n_resamples=200)
    assert (result.low, result.high) == (-np.inf, np.inf)


def test_the_default_holds_the_interval_for_small_samples():
    x = derive_rng(8).exponential(size=(5, 7))
    default, sure = bootstrap_interval(x), mean_interval(x)
    plain = bootstrap_interval(x, lambda a: a.mean(-1))
    np.testing.assert_allclose(default.low, np.minimum(plain.low, sure.low), atol=1e-12)
    np.testing.assert_allclose(default.high, np.maximum(plain.high, sure.high), atol=1e-12)


@pytest.mark.parametrize(
    "method, expand",
    [("percentile", True), ("percentile", False), ("bca", True), ("bca", False), ("studentized", True)],
)
@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_what_it_attains_is_what_it_covers(method, expand, law):
    for n in (2, 3, 5, 8, 20):
        rng = derive_rng(9, law, n)
        hits = []
        for seed in range(8):
            x = rng.standard_normal((100, n)) if law == "normal" else rng.exponential(size=(100, n)) - 1
            found = bootstrap_interval(x, method=method, expand=expand, n_resamples=400, seed=seed)
            hits.append(coverage(found))
        error = np.sqrt(0.25 / 800)
        assert np.mean(hits) > found.attained[0] - 3 * error, n


@pytest.mark.parametrize("law", ["normal", "t3"])
def test_bootstrap_coverage_of_symmetric_laws(law):
    """The full table is docs/stats-coverage.md; here the default at n = 50, within Monte Carlo error of .93 or more."""
    rng = derive_rng(7, law)
    batches = []
    for seed in range(20):
        x = rng.standard_normal((50, 50)) if law == "normal" else rng.standard_t(3, (50, 50))
        batches.append(coverage(bootstrap_interval(x, n_resamples=1000, seed=seed)))
    assert np.mean(batches) > 0.93


def test_errors():
    with pytest.raises(DataError, match="x holds 1 missing values"):
        bootstrap_interval([1, np.nan, 2])
    with pytest.raises(ConfigError, match="statistic of a studentized interval is 'median'"):
        bootstrap_interval([1, 2, 3], "median", method="studentized")
    with pytest.raises(ConfigError, match="the number of items is 1"):
        bootstrap_interval([1])
    with pytest.raises(ConfigError, match="level is 95"):
        median_interval([1, 2], level=95)
