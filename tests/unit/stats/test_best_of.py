"""The best of the first few alternatives, against loops and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp.errors import ConfigError, DataError
from moe_interp.stats import best_of, in_top


def test_by_hand() -> None:
    x, standard = np.log([0.2, 0.4, 0.8]), np.log(0.4)
    found = best_of(x, standard, [1, 2, 3])
    np.testing.assert_allclose(found.gap, [-0.2, 0, 0.4], atol=1e-15)
    np.testing.assert_allclose(found.regret, [0, 0, np.log(2)])
    assert found.positive.tolist() == [0, 0, 1]
    assert [float(in_top(x, standard, size, 1)) for size in (1, 2, 3)] == [1, 1, 0]
    assert float(in_top(x, standard, 3, 2)) == 1


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_equals_a_loop_over_the_first_that_are_there(size: int) -> None:
    rng = np.random.default_rng(0)
    x, standard = -rng.exponential(size=(3, 2, 6)), -rng.exponential(size=(3, 2))
    x[0, 0, 4:] = np.nan  # four alternatives
    x[0, 1, 1] = np.nan  # one in between is absent: the next counts
    x[1, 1, :] = np.nan
    margin = 0.1 * rng.random((3, 2))
    found = best_of(x, standard, [size], margin)
    for at in np.ndindex(3, 2):
        present, s = [v for v in x[at] if not np.isnan(v)][:size], standard[at]
        if len(present) < size:
            assert np.isnan([found.gap[0][at], found.regret[0][at], found.positive[0][at]]).all()
            assert np.isnan(in_top(x, standard, size, 1)[at])
            continue
        assert found.gap[0][at] == pytest.approx(np.exp(max(present)) - np.exp(s))
        assert found.regret[0][at] == pytest.approx(max(0, max(present) - s))
        assert found.positive[0][at] == (max(present) > s + margin[at])
        for k in (1, 3):
            better = sum(v > s + margin[at] for v in present)
            assert in_top(x, standard, size, k, margin)[at] == (better < k)


def test_the_order_counts_and_more_alternatives_are_never_worse() -> None:
    rng = np.random.default_rng(1)
    x, standard = rng.normal(-1, 1, (20, 32)), rng.normal(-1, 1, 20)
    found, turned = best_of(x, standard, [1, 2, 8, 32]), best_of(x[:, ::-1], standard, [1, 2, 8, 32])
    assert (np.diff(found.regret, axis=0) >= 0).all()
    assert (np.diff(found.gap, axis=0) >= 0).all()
    np.testing.assert_array_equal(found.regret[-1], turned.regret[-1])
    assert (found.regret[0] != turned.regret[0]).any()
    np.testing.assert_allclose(found.regret[0], np.maximum(x[:, 0] - standard, 0))


def test_errors() -> None:
    with pytest.raises(ConfigError, match="the number of alternatives is 0"):
        best_of([[1.0]], [0.0], [0])
    with pytest.raises(ConfigError, match="k is 0"):
        in_top([[1.0]], [0.0], 1, 0)
    with pytest.raises(DataError, match="standard holds 1 missing"):
        best_of([[1.0]], [np.nan], [1])
