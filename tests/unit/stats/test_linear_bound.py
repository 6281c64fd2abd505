"""Both directions of the bound of a linear router."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moe_interp import stats
from moe_interp.errors import ConfigError, DataError


def test_by_hand() -> None:
    """States vary along the first two of three axes, of which the router reads 3 and 0.5 logits a unit."""
    weights = [[3.0, 0.0, 100.0], [0.0, 0.5, 100.0]]
    found = stats.linear_bound(weights, [[0.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert (found.rank, found.seen_rank) == (2, 2)
    assert found.upper == pytest.approx(3)
    assert found.lower == pytest.approx(0.5)
    assert found.remainder == 0
    length, inside, seen = found.distances([[3.0, 4, 12]])
    assert length == pytest.approx([13.0])
    assert inside == pytest.approx([5.0])
    assert seen == pytest.approx([5.0])


@pytest.mark.parametrize(("n", "d", "experts"), [(30, 8, 4), (6, 40, 4), (50, 5, 12), (20, 20, 20)])
@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_no_two_states_break_it_in_either_direction(n: int, d: int, experts: int, spread: float) -> None:
    rng = np.random.default_rng(n + d)
    scales = np.exp(-spread * rng.random(d))
    weights, states = rng.normal(size=(experts, d)) / scales[::-1], rng.normal(size=(n, d)) * scales + 5
    found = stats.linear_bound(weights, states)
    pairs = np.array([states[i] - states[j] for i, j in combinations(range(n), 2)])
    moved = np.linalg.norm(pairs @ weights.T, axis=-1)
    length, _, seen = found.distances(pairs)
    assert (moved <= found.upper * length * (1 + 1e-12)).all()
    assert (moved >= found.lower * seen * (1 - 1e-9)).all()
    # the constants are as tight as can be: the extreme directions reach them
    best, worst = found.seen_axes[0], found.seen_axes[-1]
    assert np.linalg.norm(weights @ best) == pytest.approx(found.upper)
    assert np.linalg.norm(weights @ worst) == pytest.approx(found.lower)


def test_with_part_of_the_variance_the_remainder_completes_the_bound() -> None:
    rng = np.random.default_rng(3)
    weights, states = rng.normal(size=(4, 12)), rng.normal(size=(60, 12)) * np.geomspace(5, 0.1, 12)
    found = stats.linear_bound(weights, states, variance=0.9)
    assert 0 < found.rank < 12
    whole = stats.linear_bound(weights, states)
    assert whole.rank == 12
    assert whole.upper >= found.upper
    assert whole.upper == pytest.approx(np.linalg.norm(weights, 2))
    pairs = np.array([states[i] - states[j] for i, j in combinations(range(60), 2)])
    length, inside, _ = found.distances(pairs)
    rest = np.sqrt(np.maximum(length**2 - inside**2, 0))
    moved = np.linalg.norm(pairs @ weights.T, axis=-1)
    assert (moved <= (found.upper * inside + found.remainder * rest) * (1 + 1e-9)).all()
    assert (moved > found.upper * inside).any()  # it is needed


def test_a_router_of_zeros_sees_nothing() -> None:
    found = stats.linear_bound(np.zeros((3, 2)), [[0.0, 1.0], [2.0, 1.0]])
    assert (found.upper, found.lower, found.seen_rank) == (0.0, 0.0, 0)
    assert found.distances([[1.0, 1.0]])[2].tolist() == [0.0]


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="variance=0"):
        stats.linear_bound(np.eye(2), np.eye(2), variance=0)
    with pytest.raises(DataError, match="2 states without variance"):
        stats.linear_bound(np.eye(2), np.ones((2, 2)))
    with pytest.raises(DataError, match=r"states of shape \(2,\)"):
        stats.linear_bound(np.eye(2), np.ones(2))
