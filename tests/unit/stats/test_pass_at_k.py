"""The unbiased estimator of pass@K, against exact rational arithmetic and simulation."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy.stats import hypergeom

import moe_interp as mi
from moe_interp.errors import DataError


def exact(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(comb(n - c, k), comb(n, k))


def test_equals_rational_arithmetic_for_all_n_up_to_40() -> None:
    triples = [(n, c, k) for n in range(41) for c in range(n + 1) for k in range(n + 1)]
    found = mi.pass_at_k(*np.array(triples).T)
    wanted = np.array([float(exact(*triple)) for triple in triples])
    np.testing.assert_allclose(found, wanted, rtol=1e-14, atol=0)
    is_sure = np.array([n - c < k for n, c, k in triples])
    assert (found[is_sure] == 1).all()


@pytest.mark.parametrize(
    "c, k", [(1, 1), (5, 100), (500_000, 3), (1000, 1000), (1, 999_999), (999_999, 1), (30, 2_000), (0, 7)]
)
def test_keeps_its_digits_at_a_million(c: int, k: int) -> None:
    assert mi.pass_at_k(10**6, c, k) == pytest.approx(float(exact(10**6, c, k)), rel=1e-13, abs=0)


def test_a_grid_at_a_million_is_finite_and_grows() -> None:
    c, k = np.arange(0, 10**6 + 1, 20_000), np.array([[1], [10], [1000], [500_000], [10**6]])
    found = mi.pass_at_k(10**6, c, k)
    assert found.shape == (5, 51)
    assert np.isfinite(found).all()
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()


def test_broadcasts_and_gives_a_float_for_numbers() -> None:
    assert isinstance(mi.pass_at_k(160, 3, 8), float)
    assert mi.pass_at_k(160, 3, 8) == pytest.approx(hypergeom.sf(0, 160, 3, 8))
    grid = mi.pass_at_k(np.full((4, 1), 10), np.arange(4)[:, None], np.array([1, 2, 5]))
    assert grid.shape == (4, 3)
    assert grid[2, 1] == pytest.approx(float(exact(10, 2, 2)))
    assert mi.pass_at_k([], [], 1).shape == (0,)


def test_is_unbiased() -> None:
    p, n, k = 0.13, 12, 5
    right = np.arange(n + 1)
    chance = np.array([comb(n, c) * p**c * (1 - p) ** (n - c) for c in right])
    assert chance @ mi.pass_at_k(n, right, k) == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@pytest.mark.parametrize(
    "given, message",
    [
        ((3, 4, 1), "c=4 with n=3"),
        ((3, 1, 4), "k=4 with n=3"),
        (([5, 3], [1, 1], 4), "k=4 with n=3"),
        ((-1, 0, 0), "n=-1"),
        ((3, -1, 1), "c=-1"),
        ((3, 1, -1), "k=-1"),
        ((3, 1.0, 1), "c of type float64"),
        ((3.5, 1, 1), "n of type float64"),
        ((3, True, 1), "c of type bool"),
        ((3, 1, "1"), "k of type"),
        ((np.array([1.0, np.nan]), 1, 1), "n of type float64"),
        (([3, 4], [1, 2, 3], 1), "shapes that broadcast"),
        (([[3, 4], [3]], 1, 1), "n of rows that differ in length"),
        ((2**70, 1, 1), "n of type object"),
    ],
)
def test_refuses_what_is_no_count(given: tuple[object, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mi.pass_at_k(*given)
