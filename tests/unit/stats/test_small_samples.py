"""Intervals over few units against textbook cases, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp.errors import DataError
from moe_interp.stats import cluster_interval, derive_rng, mean_interval, ratio_interval, stratified_interval

LAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
}
NS = (2, 3, 5, 6, 10, 20, 50, 200)


def test_symmetric_units_get_students_interval_at_the_raised_level() -> None:
    x = np.array([-3.0, -1.0, 0.0, 1.0, 3.0, 7.0, -7.0])  # no skew
    found = mean_interval(x)
    n, kurtosis = 7, np.mean(x**4) / np.mean(x**2) ** 2
    df = min(n - 1, 3 * n / kurtosis - 1)
    level = 1 - 0.05 * np.exp(-2 / (df + 1))
    low, high = scipy_stats.t.interval(level, df, 0, x.std(ddof=1) / np.sqrt(n))
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)
    assert found.n == 7


def test_the_standard_error_of_a_ratio_is_the_jackknifes() -> None:
    """Against leave-one-out by a loop; half the width over t is the standard error where there is no skew."""
    total, size = np.array([3.0, 5.0, 4.0, 9.0]), np.array([2.0, 4.0, 3.0, 5.0])
    found = ratio_interval(total, size)
    without = np.array([(total.sum() - a) / (size.sum() - b) for a, b in zip(total, size)])
    se = np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    apart = 3 * (without.mean() - without)
    z = apart / np.sqrt((apart**2).mean())
    df = min(size.sum() ** 2 / (size**2).sum() - 1, 12 / (z**4).mean() - 1, 3)
    a = (z**3).mean() / 2
    t = scipy_stats.t.isf(0.025 * np.exp(-1.5 * abs(a) - 2 / (df + 1)), df)
    skewed = [3 / a * (np.cbrt(1 + a * (q - a / 6)) - 1) for q in (t, -t)]
    assert found.estimate == pytest.approx(21 / 14)
    assert found.low == pytest.approx(21 / 14 - max(t, skewed[0]) * se)
    assert found.high == pytest.approx(21 / 14 + max(t, -skewed[1]) * se)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("spread", [None, 0.0, 0.5, 1.0])
def test_it_covers_at_every_n(law: str, spread: float | None) -> None:
    """Means, and ratios over clusters of equal and of log-normal size, with effects of clusters and noise of tokens."""
    runs = 1500
    for n in NS:
        rng = derive_rng(n, "covers", law, str(spread))
        values = LAWS[law](rng, (n, runs))
        if spread is None:
            found = mean_interval(values, axis=0)
        else:
            size = np.maximum(1, rng.lognormal(3.5, spread, (n, runs)).astype(int)).astype(float)
            noise = rng.standard_normal((n, runs)) * np.sqrt(0.7 * size)
            found = ratio_interval(np.sqrt(0.3) * size * values + noise, size)
        covered = np.mean((found.low <= 0) & (found.high >= 0))
        assert covered > 0.94 - 3 * np.sqrt(0.94 * 0.06 / runs), n


def test_clusters_without_a_part_are_not_counted() -> None:
    total, size = np.array([3.0, 5.0, 4.0]), np.array([2.0, 4.0, 3.0])
    plain = ratio_interval(total, size)
    padded = ratio_interval([*total, 0.0, 0.0], [*size, 0.0, 0.0])
    assert padded.n == 3
    assert [padded.low, padded.high] == pytest.approx([float(plain.low), float(plain.high)])


def test_many_statistics_at_once_equal_one_at_a_time_and_units_may_be_permuted() -> None:
    rng = derive_rng(0, "batch")
    total, size = rng.standard_normal((9, 2, 3)), rng.integers(0, 4, (9, 2, 3)).astype(float)
    size[:2] = 1
    found = ratio_interval(total, size)
    for at in np.ndindex(2, 3):
        one = ratio_interval(total[:, *at], size[:, *at])
        assert [found.low[at], found.high[at], found.n[at]] == pytest.approx([float(one.low), float(one.high), one.n])
    order = rng.permutation(9)
    moved = ratio_interval(3 * total[order] + 2 * size[order], size[order])
    np.testing.assert_allclose(moved.low, 3 * found.low + 2)
    np.testing.assert_allclose(moved.high, 3 * found.high + 2)


def test_sizes_may_be_named_where_the_sums_do_not_show_them() -> None:
    rng = derive_rng(1, "sizes")
    size = np.array([1.0, 1.0, 1.0, 1.0, 30.0, 1.0])
    total = size * rng.standard_normal(6)
    both = np.stack([total, size], -1)
    named = cluster_interval([both], lambda s: s[..., 0] / s[..., 1], sizes=size)
    plain = ratio_interval(total, size)
    assert [named.low, named.high] == pytest.approx([float(plain.low), float(plain.high)])
    with pytest.raises(DataError, match="sizes of shape"):
        cluster_interval([both], lambda s: s[..., 0] / s[..., 1], sizes=np.ones((6, 2)))


def test_one_unit_has_no_interval_and_equal_units_have_a_point() -> None:
    one = ratio_interval([3.0], [2.0])
    assert one.estimate == 1.5
    assert np.isnan([one.low, one.high]).all()
    assert one.attained == 0
    same = mean_interval(np.full(8, 0.1))
    assert same.low == same.high == pytest.approx(0.1)


def test_bounds_cut_the_interval() -> None:
    found = mean_interval([0.0, 0.0, 0.0, 1.0], bounds=(0, 1))
    assert found.low == 0
    assert found.high == 1


def test_groups_count_alike_and_vary_within() -> None:
    """Against the textbook's standard error and Satterthwaite's degrees of freedom, on parts without skew."""
    parts = [np.array([-1.0, 0.0, 1.0, 4.0, -4.0]), 5 + np.array([-2.0, -1.0, 1.0, 2.0, 0.0])]
    found = stratified_interval(parts)
    variances = [part.var(ddof=1) / 5 / 4 for part in parts]
    df = sum(variances) ** 2 / sum(v**2 / 4 for v in variances)
    assert found.estimate == pytest.approx(2.5)
    half = scipy_stats.t.isf(0.025 * np.exp(-2 / (df + 1)), df) * np.sqrt(sum(variances))
    apart = np.concatenate([part - part.mean() for part in parts])
    assert 3 * 10 / ((apart**4).mean() / (apart**2).mean() ** 2) - 1 > df  # tails do not decide here
    assert [found.low, found.high] == pytest.approx([2.5 - half, 2.5 + half])
    assert found.n == 5


@pytest.mark.parametrize("law", LAWS)
def test_groups_are_covered_from_six_items_on(law: str) -> None:
    for sizes in ((6, 6), (6, 30), (6, 12, 12, 12), (10, 100)):
        rng = derive_rng(0, "groups", law, *sizes)
        parts = [(3 if g == 0 else 1) * LAWS[law](rng, (n, 2000)) + g for g, n in enumerate(sizes)]
        found = stratified_interval(parts)
        truth = (len(sizes) - 1) / 2
        assert np.mean((found.low <= truth) & (found.high >= truth)) > 0.93 - 3 * np.sqrt(0.93 * 0.07 / 2000), sizes
        assert found.n[0] == min(sizes)


def test_a_group_of_one_item_has_no_interval() -> None:
    found = stratified_interval([[1.0], [2.0, 3.0, 4.0]])
    assert found.estimate == 2.0
    assert np.isnan([found.low, found.high]).all()
