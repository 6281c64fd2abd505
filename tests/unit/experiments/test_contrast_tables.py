"""The table of a contrast: against scipy and by hand, at its level where there is no difference, and its words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats as scipy_stats

import moe_interp as mi
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.contrast import tables
from moe_interp.experiments.contrast.result import ContrastResult
from moe_interp.experiments.contrast.steering_result import SteeringResult
from moe_interp.stats.significance import risk_differences

N_LAYERS, N_EXPERTS = 3, 8


def dataset(selection: np.ndarray, n_a: int, paired: bool = False, **attrs: Any) -> xr.Dataset:
    n = len(selection)
    return xr.Dataset(
        {"selection": (("prompt", "layer", "expert"), selection), "n_tokens": ("prompt", np.full(n, 9))},
        coords={
            "prompt": [f"p{i}" for i in range(n)],
            "group": ("prompt", ["a"] * n_a + ["b"] * (n - n_a)),
            "layer": list(range(selection.shape[1])),
            "expert": np.arange(selection.shape[2]),
        },
        attrs={"paired": int(paired), "phase": "prompt", "seed": 0, **attrs},
    )


def noise(n: int, seed: int, n_layers: int = N_LAYERS) -> np.ndarray:
    """Shares of tokens of two experts a token among eight, tokens of a prompt alike."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(N_EXPERTS, 0.7), size=(n, n_layers)) * 2


def planted(n: int = 12, seed: int = 0) -> np.ndarray:
    """Expert 2 of layer 1 is used more by the first half, expert 5 by the second."""
    selection = noise(2 * n, seed)
    selection[:n, 1, 2] += 0.8
    selection[n:, 1, 5] += 0.8
    return selection


@pytest.mark.parametrize("paired", [False, True])
def test_differences_p_and_q_are_those_of_scipy(paired: bool) -> None:
    selection = planted(6)
    table = ContrastResult(dataset(selection, 6, paired)).experts()
    a, b = selection[:6], selection[6:]
    np.testing.assert_allclose(table["difference"], (a.mean(0) - b.mean(0)).ravel())
    np.testing.assert_allclose(table["share_a"], a.mean(0).ravel())
    for row in (2, 10, 13, 20):
        layer, expert = divmod(row, N_EXPERTS)
        x, y = a[:, layer, expert], b[:, layer, expert]
        kind = "samples" if paired else "independent"
        reference = scipy_stats.permutation_test(
            (x, y), lambda x, y, axis: x.mean(axis) - y.mean(axis), permutation_type=kind, n_resamples=np.inf
        )
        assert table["p"][row] == pytest.approx(reference.pvalue)
    np.testing.assert_allclose(table["q"], scipy_stats.false_discovery_control(table["p"]))
    assert table.attrs["smallest_p"] == pytest.approx(2 / 64 if paired else 2 / 924)
    assert table["p"].min() >= table.attrs["smallest_p"] - 1e-12


def test_planted_experts_are_found_and_stable() -> None:
    result = ContrastResult(dataset(planted(), 12))
    assert result.found("a") == {1: [2]}
    assert result.found("b") == {1: [5]}
    assert sorted(result.found("both")[1]) == [2, 5]
    assert result.found("both", most=1)[1] == [result.top(1)["expert"][0]]
    assert result.found("a", min_stability=1.1) == {}
    table = result.experts().set_index(["layer", "expert"])
    assert (table.loc[[(1, 2), (1, 5)], "stability"] > 0.95).all()
    assert table.drop([(1, 2), (1, 5)])["stability"].max() < 0.5
    low, high = table.loc[(1, 2), ["ci_low", "ci_high"]]
    assert low < 0.8 < high
    assert low > 0
    assert result.top(2, "b")["expert"][0] == 5
    text = result.summary()
    assert "1 are used more by a and 1 more by b" in text
    assert "layer 1 expert 2: +" in text
    with pytest.raises(ConfigError, match=r"side='c'"):
        result.found("c")  # type: ignore[arg-type]


def test_permuting_experts_permutes_the_table_and_swapping_sets_turns_its_sign() -> None:
    selection, order = planted(), np.random.default_rng(1).permutation(N_EXPERTS)
    table = ContrastResult(dataset(selection, 12)).experts()
    shuffled = ContrastResult(dataset(selection[..., order], 12)).experts()
    for column in ("difference", "p", "ci_low"):
        expected = table[column].to_numpy().reshape(N_LAYERS, N_EXPERTS)[:, order]
        np.testing.assert_allclose(shuffled[column].to_numpy().reshape(N_LAYERS, N_EXPERTS), expected)
    swapped = ContrastResult(dataset(np.concatenate([selection[12:], selection[:12]]), 12)).experts()
    np.testing.assert_allclose(swapped["difference"], -table["difference"])
    np.testing.assert_allclose(swapped["ci_low"], -table["ci_high"])


@pytest.mark.parametrize("paired", [False, True])
def test_the_false_discovery_rate_is_at_its_level_without_a_difference(
    paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing differs, any finding is false: at most .05 of data sets have one, beside chance."""
    monkeypatch.setattr(risk_differences, "N_PERMUTATIONS", 1999)
    monkeypatch.setattr(risk_differences, "N_RESAMPLES", 1)
    trials, wrong = 120, 0
    for seed in range(trials):
        data = dataset(noise(20, 100 + seed, n_layers=2), 10, paired)
        wrong += bool((tables.expert_table(data)["found"] != "").any())
    assert wrong <= scipy_stats.binom.ppf(0.999, trials, 0.05)


def test_labels_that_are_permuted_lose_what_was_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(risk_differences, "N_PERMUTATIONS", 1999)
    monkeypatch.setattr(risk_differences, "N_RESAMPLES", 1)
    selection, trials, wrong = planted(), 60, 0
    for seed in range(trials):
        order = np.random.default_rng(seed).permutation(len(selection))
        wrong += bool((tables.expert_table(dataset(selection[order], 12))["found"] != "").any())
    assert wrong <= scipy_stats.binom.ppf(0.999, trials, 0.05)


def test_few_prompts_say_what_they_can_reach() -> None:
    result = ContrastResult(dataset(noise(4, 0), 2))
    assert result.experts().attrs["smallest_p"] == pytest.approx(2 / 6)
    assert (
        "So few prompts reach p = 0.33 at best; with 24 tests, at least 160 must sit there together" in result.summary()
    )
    assert np.isnan(result.experts()["stability"]).all()
    assert result.found("a") == {}


def test_what_is_no_contrast_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"groups with \{'a': 1, 'b': 3\} prompts. Expected: at least two in"):
        ContrastResult(dataset(noise(4, 0), 1))
    with pytest.raises(DataError, match=r"without selection\[prompt, layer, expert\]"):
        ContrastResult(xr.Dataset({"other": ("prompt", [1.0])}))
    with pytest.raises(DataError, match=r"variants \[\] and variables"):
        SteeringResult(xr.Dataset({"loss": ("sequence", [1.0])}))


def test_a_contrast_is_saved_drawn_and_reported(tmp_path: Path) -> None:
    result = ContrastResult(dataset(planted(), 12, model="tiny"))
    loaded = mi.load_result(result.save(tmp_path / "contrast.nc"))
    assert isinstance(loaded, ContrastResult)
    assert loaded.summary() == result.summary()
    assert len(loaded.to_dataframe()) == 24 * N_LAYERS * N_EXPERTS
    figure = result.plot()
    (mesh,) = [c for c in figure.axes[0].collections if c.get_array() is not None and c.get_array().size == 24]
    np.testing.assert_allclose(np.asarray(mesh.get_array()).ravel(), result.experts()["difference"])
    (dots,) = [c for c in figure.axes[0].collections if c is not mesh]
    assert sorted(map(tuple, np.asarray(dots.get_offsets()).tolist())) == [(2.5, 1.5), (5.5, 1.5)]
    assert "1 used more by a, 1 by b, of 24" in figure.axes[0].get_title(loc="left")
    page = result.report(tmp_path).read_text(encoding="utf-8")
    assert "used more by a" in page


def steering(loss: np.ndarray, domains: list[str]) -> SteeringResult:
    n = loss.shape[1]
    variants = ["natural", "steered", *[f"random {i}" for i in range(len(loss) - 2)]]
    return SteeringResult(
        xr.Dataset(
            {"loss": (("variant", "sequence"), loss), "slot_share": ("variant", np.linspace(0, 1, len(loss)))},
            coords={
                "variant": variants,
                "sequence": [str(i) for i in range(n)],
                "domain": ("sequence", domains),
            },
            attrs={"how": "suppress", "experts": {"0": [1, 2]}, "model": "tiny"},
        )
    )


def test_effects_are_paired_and_beside_random_draws_by_hand() -> None:
    rng = np.random.default_rng(0)
    natural = rng.normal(2, 1, 16)
    drawn = natural + rng.normal(0.1, 0.05, (4, 16))
    steered = natural + np.where(np.arange(16) < 8, 1.0, 0.1) + rng.normal(0, 0.05, 16)
    result = steering(np.stack([natural, steered, *drawn]), ["x"] * 8 + ["y"] * 8)
    table = result.effects().set_index("domain")
    for domain, rows in (("all", slice(None)), ("x", slice(0, 8)), ("y", slice(8, 16))):
        row = table.loc[domain]
        assert row["effect"] == pytest.approx((steered - natural)[rows].mean())
        assert row["excess"] == pytest.approx((steered - drawn.mean(0))[rows].mean())
        assert row["random"] == pytest.approx((drawn - natural)[:, rows].mean())
        assert row["effect_p"] == pytest.approx(
            scipy_stats.permutation_test(
                ((steered - natural)[rows],),
                lambda x, axis: x.mean(axis),
                permutation_type="samples",
                n_resamples=np.inf if domain != "all" else 9999,
            ).pvalue,
            abs=0.01 if domain == "all" else 1e-12,
        )
    assert table.loc["x", "excess_verdict"] == "higher"
    assert table.loc["y", "excess_verdict"] == "no difference shown"
    assert table.loc["x", "draws_p"] == pytest.approx(1 / 5)
    assert "2 experts in 1 layers of tiny: suppressed together, beside 4 draws" in result.summary()
