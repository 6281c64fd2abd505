from itertools import combinations

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.oneway import anova_oneway

from moe_interp.errors import DataError
from moe_interp.stats import derive_rng, domain_effect, rejected

DOMAIN = np.repeat(["code", "law", "math", "poetry"], 12)


def fragile(seed, interaction=0.0, shape=(48, 3, 8)):
    """Deltas with a main effect of the domain and of the item, and an interaction with the expert."""
    rng = derive_rng(seed, "fragile")
    codes = np.repeat(np.arange(4), 12)
    delta = rng.standard_normal(shape) + rng.standard_normal((48, 1, 1)) - 1.5 * codes[:, None, None]
    return delta + interaction * rng.standard_normal((4, *shape[1:]))[codes]


def groups_of(delta, labels, names):
    centred = delta - delta.mean(-1, keepdims=True)
    return [centred[np.array(labels) == name].reshape(-1, *delta.shape[1:]) for name in names]


def naive_welch(groups):
    w = np.array([len(g) / g.var(0, ddof=1) for g in groups])
    means = np.array([g.mean(0) for g in groups])
    return (w * (means - (w * means).sum(0) / w.sum(0)) ** 2).sum(0)


def naive_overall(groups):
    """Sum over pairs of domains of the mean product of differences between different items, over its error."""
    flat = [g.reshape(len(g), -1) for g in groups]
    weight = [len(g) / g.var(0, ddof=1).sum() for g in flat]
    top, square = 0.0, 0.0
    for d, x in enumerate(flat):
        c = weight[d] * (1 - weight[d] / sum(weight))
        own = [x[i] @ x[j] for i in range(len(x)) for j in range(len(x)) if i != j]
        top += c * np.mean(own)
        square += c**2 * 2 * np.mean(np.square(own)) / len(own)
        for e in range(d):
            b = weight[d] * weight[e] / sum(weight)
            cross = (x @ flat[e].T).ravel()
            top -= 2 * b * cross.mean()
            square += 4 * b**2 * np.mean(cross**2) / len(cross)
    return top / np.sqrt(square)


def test_statistic_equals_welch_and_eta_the_analysis_of_variance():
    delta, domain = fragile(0, 0.5)[:40], DOMAIN[:40]
    result = domain_effect(delta, domain, n_permutations=9)
    groups = groups_of(delta, domain, result.domains)
    for at in np.ndindex(3, 8):
        expected = anova_oneway([g[:, at[0], at[1]] for g in groups])
        assert result.statistic[at] == pytest.approx(expected.statistic, rel=1e-9)
    between = sum(len(g) * (g.mean(0) - np.concatenate(groups).mean(0)) ** 2 for g in groups)
    within = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups)
    np.testing.assert_allclose(result.eta_squared, between / (between + within), atol=1e-12)
    np.testing.assert_allclose(result.contrast[2], groups[2].mean(0) - np.concatenate(groups).mean(0), atol=1e-12)
    assert result.n_items == (12, 12, 12, 4)
    np.testing.assert_allclose(result.spread, [np.sqrt(g.var(0, ddof=1).mean()) for g in groups])


def test_p_equals_naive_statistics_over_all_arrangements():
    delta = derive_rng(11).standard_normal((7, 2, 3)) + np.array([0, 0, 0, 1, 1, 1, 1])[:, None, None] * [0, 0, 1.5]
    label = np.array([0, 0, 0, 1, 1, 1, 1])
    result = domain_effect(delta, label, n_permutations=4000)
    cells, whole = [], []
    for members in combinations(range(7), 3):
        inside = np.isin(np.arange(7), members).astype(int)
        groups = groups_of(delta - (delta - delta.mean(-1, keepdims=True)).mean(0), inside, (1, 0))
        cells.append(naive_welch(groups))
        whole.append(naive_overall(groups))
    exact = (np.array(cells) >= cells[0] - 1e-9).mean(0)
    parametric = anova_p(delta, label)
    np.testing.assert_allclose(result.p_value, np.maximum(exact, parametric), atol=4 * np.sqrt(0.25 / 4000))
    assert result.global_p == pytest.approx((np.array(whole) >= whole[0] - 1e-9).mean(), abs=4 * np.sqrt(0.25 / 4000))


def anova_p(delta, label):
    groups = groups_of(delta, label, (0, 1))
    return np.array([[anova_oneway([g[:, i, j] for g in groups]).pvalue for j in range(3)] for i in range(2)])


def test_level_with_a_main_effect_of_domain_and_no_interaction():
    cells, whole = [], []
    for seed in range(400):
        result = domain_effect(fragile(seed), DOMAIN, n_permutations=199, seed=seed)
        cells.append(result.p_value <= 0.05)
        whole.append(result.global_p <= 0.05)
    assert 0.035 < np.mean(cells) < 0.055
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
    np.testing.assert_allclose(shifted.p_value, base.p_value, rtol=1e-9)
    order = derive_rng(4).permutation(8)
    np.testing.assert_allclose(
        domain_effect(delta[..., order], DOMAIN, n_permutations=99).p_value, base.p_value[:, order], atol=1e-12
    )
    assert domain_effect(delta[:, 0], DOMAIN, n_permutations=99).p_value.shape == (8,)


def test_errors():
    with pytest.raises(DataError, match=r"counts \{'math': 4\}.*at least two domains"):
        domain_effect(np.ones((4, 3)), ["math"] * 4)
    with pytest.raises(DataError, match="for 4 items"):
        domain_effect(np.ones((4, 3)), ["a", "b", "a"])


@pytest.mark.parametrize("law", ["normal", "exponential"])
@pytest.mark.parametrize(("sizes", "spread"), [((10, 40), 4.0), ((40, 10), 4.0), ((6, 40), 1.4), ((10, 10, 10), 4.0)])
def test_level_with_unequal_spread(law, sizes, spread):
    """The first domain is wider. With the sum of squares alone .29 of cells and .88 of runs reach .05 at 10 and 40."""
    label = np.repeat(np.arange(len(sizes)), sizes)
    cells, whole = [], []
    for seed in range(200):
        rng = derive_rng(seed, "unequal")
        noise = rng.standard_normal if law == "normal" else lambda shape, r=rng: r.exponential(size=shape) - 1
        delta = noise((len(label), 2, 8)) * np.where(label == 0, spread, 1.0)[:, None, None]
        result = domain_effect(delta, label, n_permutations=99, seed=seed)
        cells.append(np.mean(result.p_value <= 0.05))
        whole.append(result.global_p <= 0.05)
    # .06, and three Monte Carlo errors
    assert np.mean(cells) < 0.06 + 3 * np.std(cells) / np.sqrt(200)
    assert np.mean(whole) < 0.06 + 3 * np.sqrt(0.0564 / 200)


def test_power_in_a_small_wide_domain():
    label = np.repeat([0, 1], (10, 40))
    found = []
    for seed in range(40):
        delta = derive_rng(seed, "wide").standard_normal((50, 2, 8)) * np.where(label == 0, 4.0, 1.0)[:, None, None]
        delta[:10, :, 3] += 8.0
        result = domain_effect(delta, label, n_permutations=199)
        found.append((result.p_value[:, 3] <= 0.05).mean())
        assert result.too_few == ()
    assert np.mean(found) > 0.95


def test_domains_too_small_for_words_are_named():
    rng = derive_rng(12)
    narrow = np.repeat(["a", "b"], (5, 12))
    assert domain_effect(rng.standard_normal((17, 4)), narrow, n_permutations=9).too_few == ("a",)
    wide = np.repeat(["a", "b"], (8, 40))
    delta = rng.standard_normal((48, 4, 8))
    assert domain_effect(delta, wide, n_permutations=9).too_few == ()
    delta[:8] *= 4
    assert domain_effect(delta, wide, n_permutations=9).too_few == ("a",)
    assert domain_effect(delta[::-1], wide, n_permutations=9).too_few == ()


def test_cells_without_spread_in_a_domain_are_not_testable():
    delta = derive_rng(13).standard_normal((20, 2, 4))
    delta[:, 1] = 0
    delta[:10, 0] = [1.0, 2.0, 3.0, 4.0]
    result = domain_effect(delta, np.repeat([0, 1], 10), n_permutations=99)
    assert np.isnan(result.p_value[0]).all()
    assert np.isnan(result.statistic[0]).all()
    assert (result.p_value[1] == 1).all()
    assert 0 < result.global_p <= 1
    assert domain_effect(np.zeros((8, 2, 3)), np.repeat([0, 1], 4), n_permutations=9).global_p == 1
