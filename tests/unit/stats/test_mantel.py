"""Mantel's test against a loop, scipy and its level, also with tokens that depend on each other."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from moe_interp import stats
from moe_interp.errors import ConfigError, DataError


def similarities(points: np.ndarray) -> np.ndarray:
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    return unit @ unit.T


def test_equals_a_loop_over_all_orders() -> None:
    rng = np.random.default_rng(0)
    x, y = (similarities(rng.normal(size=(6, 3))) for _ in range(2))
    found = stats.mantel(x, y, alternative="greater")
    pairs = np.triu_indices(6, 1)
    loop = []
    for order in permutations(range(6)):
        moved = x[np.ix_(order, order)]
        loop.append(scipy_stats.pearsonr(moved[pairs], y[pairs]).statistic)
    assert found.exact
    assert found.n_permutations == 720
    assert found.correlation == pytest.approx(loop[0])
    assert found.p_value == pytest.approx(np.mean(np.array(loop) >= loop[0] - 1e-12))
    assert found.null_mean == pytest.approx(np.mean(loop))
    assert found.null_sd == pytest.approx(np.std(loop))


def test_blocks_leave_out_pairs_of_one_sequence_and_move_together() -> None:
    rng = np.random.default_rng(1)
    x, y = (similarities(rng.normal(size=(8, 3))) for _ in range(2))
    found = stats.mantel(x, y, tokens_per_unit=2)
    unit = np.arange(8) // 2
    first, second = np.triu_indices(8, 1)
    apart = unit[first] != unit[second]
    first, second = first[apart], second[apart]
    loop = []
    for order in permutations(range(4)):
        moved = np.concatenate([[2 * u, 2 * u + 1] for u in order])
        loop.append(np.corrcoef(x[np.ix_(moved, moved)][first, second], y[first, second])[0, 1])
    above, below = np.mean(np.array(loop) >= loop[0] - 1e-12), np.mean(np.array(loop) <= loop[0] + 1e-12)
    assert found.correlation == pytest.approx(loop[0])
    assert found.p_value == pytest.approx(min(1, 2 * min(above, below)))
    x[0, 1] = x[1, 0] = 1e6  # within one sequence
    assert stats.mantel(x, y, tokens_per_unit=2).correlation == pytest.approx(loop[0])


def autocorrelated(rng: np.random.Generator, n: int, m: int, d: int) -> np.ndarray:
    """``[n * m, d]``: tokens of a sequence that are nearly the same state."""
    return (rng.normal(size=(n, 1, d)) + 0.3 * rng.normal(size=(n, m, d))).reshape(n * m, d)


@pytest.mark.parametrize("tokens", [1, 4])
def test_holds_its_level_also_with_autocorrelated_tokens(tokens: int) -> None:
    rng = np.random.default_rng(2)
    runs, n = 300, 10
    x = np.stack([similarities(autocorrelated(rng, n, tokens, 4)) for _ in range(runs)])
    y = np.stack([similarities(autocorrelated(rng, n, tokens, 4)) for _ in range(runs)])
    found = stats.mantel(x, y, tokens_per_unit=tokens, n_permutations=99)
    rate = float((found.p_value <= 0.05).mean())
    assert 0.02 <= rate <= 0.085  # .05 with 3.2 standard errors of 300 runs, above
    if tokens > 1:  # permuted one by one, the same tokens reject far too often
        wrong = stats.mantel(x[:60], y[:60], n_permutations=99)
        assert float((wrong.p_value <= 0.05).mean()) > 0.2


def test_a_planted_agreement_is_found_and_rows_share_their_permutations() -> None:
    rng = np.random.default_rng(3)
    states = rng.normal(size=(20, 5))
    same, other = similarities(states), similarities(rng.normal(size=(20, 5)))
    found = stats.mantel(np.stack([same, other]), np.stack([same, same]), n_permutations=199)
    assert found.correlation[0] == pytest.approx(1)
    assert found.p_value[0] == pytest.approx(2 / 200)
    assert found.mean == pytest.approx(found.correlation.mean())
    assert found.mean_p < 0.05
    again = stats.mantel(same, same, n_permutations=199)
    assert again.null_mean == pytest.approx(found.null_mean[0])


def test_within_strata_a_difference_of_domains_is_no_agreement() -> None:
    rng = np.random.default_rng(4)
    domain = np.repeat([0, 1], 10)
    p, within = [], []
    for _ in range(60):
        x, y = (similarities(rng.normal(size=(20, 6)) + 3 * np.eye(6)[domain]) for _ in range(2))
        p.append(float(stats.mantel(x, y, n_permutations=99).p_value))
        within.append(float(stats.mantel(x, y, n_permutations=99, strata=domain).p_value))
    assert np.mean(np.array(p) <= 0.05) > 0.9
    assert np.mean(np.array(within) <= 0.05) < 0.17


def test_a_constant_side_has_no_correlation() -> None:
    found = stats.mantel(np.ones((5, 5)), similarities(np.random.default_rng(5).normal(size=(5, 3))))
    assert np.isnan(found.correlation)
    assert np.isnan(found.p_value)
    assert np.isnan(found.mean_p)


def test_bad_input_is_named() -> None:
    square = np.eye(4)
    with pytest.raises(DataError, match=r"2 things in units of 1, 2 units.*at least 3 units"):
        stats.mantel(np.eye(2), np.eye(2))
    with pytest.raises(DataError, match="4 things in units of 3"):
        stats.mantel(square, square, tokens_per_unit=3)
    with pytest.raises(DataError, match=r"x of shape \(4, 4\) and y of shape \(3, 3\)"):
        stats.mantel(square, np.eye(3))
    with pytest.raises(DataError, match=r"strata of shape \(2,\)"):
        stats.mantel(square, square, strata=[0, 1])
    with pytest.raises(ConfigError, match="alternative is 'both'"):
        stats.mantel(square, square, alternative="both")
