"""What the domain router's result says: in words only where the interval and the test of enough items allow it."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import moe_interp as mi


def result_of(score: np.ndarray, domain: list[str] | None = None) -> mi.DomainRouterResult:
    """``score[router, item]`` of natural, domain and random routing."""
    n = score.shape[1]
    coords = {
        "router": ["natural", "domain", "random"],
        "item": [f"i{i}" for i in range(n)],
        "domain": ("item", ["a"] * n if domain is None else domain),
    }
    axes = ("router", "item")
    data = xr.Dataset({"score": (axes, score), "score_first": (axes, score)}, coords=coords)
    return mi.DomainRouterResult(data.assign_attrs(k=2, random_draws=1))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_items_get_no_verdict(n: int) -> None:
    score = np.stack([np.zeros(n), np.ones(n), -np.arange(n)]).astype(float)
    text = result_of(score).summary()
    assert f"too few items to say (n = {n})" in text
    assert not any(word in text.replace("best", "") for word in ("better", "worse", "no difference"))
    assert ("no interval" in text) == (n == 1)


@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_without_an_effect_at_most_six_in_a_hundred_are_called_better_or_worse(law: str) -> None:
    runs = 50
    for n in (6, 11):
        rng = np.random.default_rng([n, len(law)])
        wrong = 0
        for _ in range(runs):
            score = rng.normal(size=(3, n))
            if law == "exponential":
                score = rng.exponential(size=(3, n)) - 1
                score[0] = 0  # a difference of two would be symmetric
            verdicts = result_of(score).compare().set_index(["router", "domain"])["verdict"]
            wrong += verdicts["domain", "all"] != "no difference shown"
        assert wrong / runs <= 0.06 + 2 * np.sqrt(0.06 * 0.94 / runs), n


def test_a_clear_effect_is_named() -> None:
    rng = np.random.default_rng(0)
    score = np.stack([np.zeros(30), 1 + rng.normal(size=30), -1 + rng.normal(size=30)])
    lines = result_of(score).summary().splitlines()
    assert lines[1].endswith(", better")
    assert lines[2].endswith(", worse")
    assert "95% intervals over 30 items" in lines[0]


def test_a_domain_may_be_called_all() -> None:
    score = np.zeros((3, 8))
    score[1, :4] = 1.0
    table = result_of(score, ["all"] * 4 + ["b"] * 4).compare()
    assert table.attrs["pooled"] == "all (pooled)"
    means = table[table["router"] == "domain"].set_index("domain")["mean"]
    assert means.to_dict() == {"all": 1.0, "b": 0.0, "all (pooled)": 0.5}
    assert "+0.500" in result_of(score, ["all"] * 4 + ["b"] * 4).summary()
