"""What may be said of an interval, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp.stats import decide, derive_rng, mean_interval, verdict


@pytest.mark.parametrize(
    ("bounds", "options", "expected"),
    [
        ((0.1, 0.3), {}, "above"),
        ((-0.3, -0.1), {}, "below"),
        ((-0.3, 0.1), {}, "open"),
        ((0.0, 0.3), {}, "open"),
        ((0.1, 0.3), {"null": 0.2}, "open"),
        ((0.1, 0.3), {"p": 0.04}, "above"),
        ((0.1, 0.3), {"p": 0.06}, "open"),
        ((0.1, 0.3), {"p": np.nan}, "too few"),
        ((-0.05, 0.09), {"margin": 0.1}, "within"),
        ((0.02, 0.09), {"margin": 0.1}, "within"),
        ((0.02, 0.11), {"margin": 0.1}, "above"),
        ((np.nan, 0.3), {}, "too few"),
        ((0.1, 0.3), {"coverage": 0.92}, "too few"),
        ((0.1, 0.3), {"coverage": 0.93}, "above"),
    ],
)
def test_each_decision(bounds: tuple[float, float], options: dict[str, float], expected: str) -> None:
    assert decide(*bounds, n=20, **options) == expected


def test_few_units_are_named() -> None:
    assert verdict(0.1, 0.3, n=5, units="sequences") == "too few sequences to say (n = 5)"
    assert verdict(0.1, 0.3, n=6, words=("better", "worse")) == "better"


@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_at_most_six_in_a_hundred_are_wrong_without_an_effect(law: str) -> None:
    for n in (2, 4, 6, 8, 12, 20, 50, 200):
        rng = derive_rng(n, "verdict", law)
        x = rng.standard_normal((1000, n)) if law == "normal" else rng.exponential(size=(1000, n)) - 1
        found = mean_interval(x)
        said = [decide(*map(float, each), n=n) for each in zip(found.low, found.high)]
        wrong = np.mean([word in ("above", "below") for word in said])
        assert wrong <= 0.06 + 2 * np.sqrt(0.06 * 0.94 / 1000), n
        assert (n >= 6) == ("too few" not in said)
