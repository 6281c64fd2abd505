"""Classes that are called free of selection show nothing where no route is special, at many sizes of noise; and few
sequences are too few to say anything."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp.errors import DataError
from moe_interp.experiments.counterfactual.prediction_calibration import prediction_calibration
from moe_interp.experiments.counterfactual.result import CounterfactualResult
from tests.unit.experiments.planted_predictions import exchangeable_predictions

SIZES = [(0.0, 1.2), (1.0, 1.0), (2.0, 1.0), (3.0, 0.5), (2.5, 1.5)]


@pytest.mark.parametrize(("base", "noise"), SIZES)
def test_no_class_free_of_selection_has_an_alignment_where_routes_are_exchangeable(base: float, noise: float) -> None:
    result = CounterfactualResult(exchangeable_predictions(100, 40, base, noise, n_routes=8, seed=5))
    for by in ("resampled", "entropy"):
        confident = result.data["logp_standard"] if by == "resampled" else -result.data["entropy"]
        thirds = tuple(np.exp(np.quantile(confident, [1 / 3, 2 / 3])))
        table = result.by_confidence(by, thirds)  # type: ignore[arg-type]
        for row in table[table["n_cells"] > 200].to_dict("records"):
            half = (row["alignment_high"] - row["alignment_low"]) / 2
            # 3.3 standard errors, as thirty classes of five sizes are looked at: a false alarm in 3% of such tests
            assert abs(row["alignment"]) < 1.7 * half < 0.2, (by, row["class"])
            assert row["verdict"] not in ("aligned", "misaligned"), (by, row["class"])
            # of nine that are alike each is the best equally often
            assert row["inclusion_1"] == pytest.approx(1 / 9, abs=0.06), (by, row["class"])
    assert "is confirmed" not in result.summary()
    fresh = result.controls("entropy")
    fresh = fresh[(fresh["kind"] == "fresh_draw") & (fresh["n_cells"] > 200)]
    half = (fresh["excess_regret_high"] - fresh["excess_regret_low"]) / 2
    assert (fresh["excess_regret"].abs() < 1.7 * half).all()


def test_the_entropy_of_the_standard_routes_own_prediction_selects() -> None:
    data = exchangeable_predictions(60, 50, 2.5, 1.5, n_routes=8, seed=1)
    careless = data.assign(entropy_second=(("token", "layer"), data["entropy"].values[:, None]))
    table = CounterfactualResult(careless).by_confidence("entropy").set_index("class")
    low, high = table.loc["fragile", "inclusion_1"], table.loc["confident", "inclusion_1"]
    assert high - low > 0.05  # sharp by luck: the realized token is its own guess, or else far from it
    table = CounterfactualResult(data).by_confidence("entropy").set_index("class")
    assert abs(table.loc["fragile", "inclusion_1"] - table.loc["confident", "inclusion_1"]) < 0.03


def test_a_dataset_without_the_mean_predictions_entropy_loads_and_never_confirms() -> None:
    for seed in range(3):
        data = exchangeable_predictions(30, 20, 2.0, 1.0, n_routes=8, seed=seed).drop_vars("entropy_second")
        result = CounterfactualResult(data)
        assert "is confirmed" not in result.summary()
        with pytest.raises(DataError, match="has not kept the entropy of the second draw's mean prediction"):
            result.by_confidence("entropy")


def test_verdicts_of_controls_are_seldom_given_where_there_is_nothing() -> None:
    lengths = np.random.default_rng(0).lognormal(2.0, 0.8, 240).astype(int) + 1
    data = exchangeable_predictions(240, 0, 1.5, 0.7, n_routes=6, seed=7, lengths=lengths)
    owner = data["sequence"].values
    names, said, runs = np.unique(owner), 0, 0
    for n in (2, 5, 6, 12, 30):
        for part in np.split(names, np.arange(n, 241 - n, n))[:20]:
            result = CounterfactualResult(data.isel(token=np.isin(owner, part)))
            verdict = result.controls().set_index("kind").loc["random", "verdict"]
            if n < 6:
                assert verdict == f"too few sequences to say (n = {n})"
            else:
                said, runs = said + (verdict in ("larger", "smaller")), runs + 1
    # at most 6% in the long run: of 48 runs more than 8 with a probability of 0.1%
    assert runs == 48
    assert said <= 8


def test_calibration_is_measured() -> None:
    right = prediction_calibration(exchangeable_predictions(80, 40, 2.0, 0.0, n_routes=2, seed=0)).set_index(
        "predicted"
    )
    for measure in ("calibration_error", "surprise"):
        assert right.loc["all", f"{measure}_low"] < 0 < right.loc["all", f"{measure}_high"]
        assert right.loc["all", f"{measure}_high"] - right.loc["all", f"{measure}_low"] < 0.1
    assert right["n_tokens"].iloc[1:].sum() == right.loc["all", "n_tokens"] == 80 * 40
    # nature is flatter than the model: it is too sure
    data = exchangeable_predictions(80, 40, 2.0, 0.0, n_routes=2, flatten=0.4, seed=0)
    sure = prediction_calibration(data).set_index("predicted")
    assert sure.loc["all", "calibration_error_high"] < -0.1
    assert sure.loc["all", "surprise_low"] > 0.1
    p, is_right = np.exp(data["logp_top"].values), data["is_top"].values
    inside = (p >= 0.5) & (p < 0.9)
    assert sure.loc[".5 to .9", "right"] == pytest.approx(is_right[inside].mean())
    assert sure.loc[".5 to .9", "calibration_error"] == pytest.approx((is_right - p)[inside].mean())
    expected = -(data["logp_standard"] + data["entropy"]).mean().item()
    assert sure.loc["all", "surprise"] == pytest.approx(expected)
    bare = prediction_calibration(data.drop_vars(["logp_top", "is_top"]))
    assert bare["predicted"].tolist() == ["all"]
    assert bare["surprise"].item() == pytest.approx(expected)
    assert np.isnan(bare["right"].item())


def test_the_summary_gives_calibration_beside_the_models_own_prediction_and_no_verdict() -> None:
    data = exchangeable_predictions(40, 20, 2.0, 0.7, 0.3, n_routes=4, seed=0)
    # a drawn token that the model foresees, and realized ones that it does not
    own = data.assign(
        logp_own=data["logp"] * 0 - 0.3,
        logp_own_null=data["logp_null"] * 0 - 0.3,
        logp_own_standard=data["logp_standard"] * 0 - 0.3,
        logp_own_second=data["logp_second"] * 0 - 0.3,
    )
    result = CounterfactualResult(own)
    assert result.controls().set_index("kind").loc["own_prediction", "verdict"] == "none by itself"
    (line,) = [line for line in result.summary().splitlines() if "model's own prediction" in line]
    assert "By itself that says nothing of the routes" in line
    assert "its most likely token is right on " in line
    assert "larger" not in line
    assert "smaller" not in line
