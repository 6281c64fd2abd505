"""The gain along the shared direction, and its controls."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp import stats
from moe_interp.errors import ConfigError, DataError


def test_by_hand() -> None:
    """Two experts, two dimensions: Pi_e W = [[1, -1/2], [-1, 1/2]], mu = (3, 0), centred states along (0, 1)."""
    weights = [[2.0, 0.0], [0.0, 1.0]]
    states = [[3.0, 1.0], [3.0, -1.0]]
    found = stats.shared_direction(weights, states, n_random=5)
    assert found.gain == pytest.approx(np.sqrt(2))
    assert found.mean_norm == pytest.approx(3)
    assert found.random_gain == pytest.approx(np.sqrt(2.5 / 2))
    assert found.component == pytest.approx([np.sqrt(0.5)])
    assert found.component_variance == pytest.approx([1.0])
    assert found.centred_gain == pytest.approx(np.sqrt(0.5))
    assert found.centred_rms == pytest.approx(np.sqrt(0.5))
    assert len(found.random) == 5


def test_equals_a_loop_over_tokens_and_directions() -> None:
    rng = np.random.default_rng(0)
    weights, states = rng.normal(size=(6, 10)), rng.normal(size=(40, 10)) + 2
    found = stats.shared_direction(weights, states, n_random=4000, n_components=20)
    projection = np.eye(6) - np.ones((6, 6)) / 6
    mean = sum(states) / 40
    moved = [projection @ weights @ (h - mean) for h in states]
    assert found.gain == pytest.approx(np.linalg.norm(projection @ weights @ mean) / np.linalg.norm(mean))
    assert found.centred_rms == pytest.approx(np.sqrt(np.mean([m @ m for m in moved])))
    rms = np.sqrt(np.mean([(h - mean) @ (h - mean) for h in states]))
    assert found.centred_gain == pytest.approx(found.centred_rms / rms)
    assert np.sqrt((found.random**2).mean()) == pytest.approx(found.random_gain, rel=0.02)
    values, vectors = np.linalg.eigh(np.cov(states.T))
    by_axis = [np.linalg.norm(projection @ weights @ v) for v in vectors.T[::-1]]
    assert found.component == pytest.approx(by_axis)
    assert found.component_variance == pytest.approx(values[::-1] / values.sum())


def test_a_planted_suppression_is_found_and_experts_names_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(size=32)
    shared /= np.linalg.norm(shared)
    weights = rng.normal(size=(8, 32))
    weights -= 0.98 * np.outer(weights @ shared, shared)
    states = rng.normal(size=(300, 32)) + 20 * shared
    found = stats.shared_direction(weights, states)
    assert found.gain < 0.15 * found.centred_gain
    assert found.p_suppressed == pytest.approx(1 / 1000)
    same = stats.shared_direction(weights[::-1] + rng.normal(size=32), states)
    assert same.gain == pytest.approx(found.gain)
    assert same.centred_rms == pytest.approx(found.centred_rms)


def test_an_unsuppressed_direction_ranks_among_random_ones() -> None:
    rng = np.random.default_rng(2)
    p = []
    for _ in range(100):
        weights, states = rng.normal(size=(4, 16)), rng.normal(size=(50, 16)) + rng.normal(size=16)
        p.append(stats.shared_direction(weights, states, n_random=99).p_suppressed)
    assert 0.4 < np.mean(p) < 0.6
    assert np.mean(np.array(p) <= 0.1) < 0.2


def test_bad_input_is_named() -> None:
    weights, states = np.ones((3, 4)), np.arange(8.0).reshape(2, 4)
    with pytest.raises(DataError, match=r"weights of shape \(3, 4\) and states of shape \(2, 5\)"):
        stats.shared_direction(weights, np.ones((2, 5)))
    with pytest.raises(DataError, match="3 states without variance"):
        stats.shared_direction(weights, np.full((3, 4), 0.1))
    with pytest.raises(DataError, match="mean 0"):
        stats.shared_direction(weights, [[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    with pytest.raises(DataError, match="1 values that are not finite"):
        stats.shared_direction(weights, [[np.inf, 0, 0, 0], [-1.0, 0, 0, 0]])
    with pytest.raises(ConfigError, match="n_random is 0"):
        stats.shared_direction(weights, states, n_random=0)
