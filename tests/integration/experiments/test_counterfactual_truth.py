"""Regret where the truth is known: a router taught its experts, the same rows moved to the other domain's experts."""

from __future__ import annotations

import pytest
import torch

import moe_interp as mi
from moe_interp.testbed.training.train import TrainedRun, train
from tests.integration.experiments.test_planted_truth import N_EXPERTS, N_LAYERS, TINY, permuted_rows


@pytest.fixture(scope="module")
def run() -> TrainedRun:
    return train(TINY, progress=False)


def routes(run: TrainedRun) -> mi.CounterfactualResult:
    """All 28 routes of every token of 24 held-out sequences."""
    sequences = run.validation.tokens.tolist()
    return mi.counterfactual_routes(run.moe, sequences, n_routes=27, sampler=mi.AllSubsets(), progress=False)


def test_a_reference_router_leaves_little_regret_and_exchanged_rows_leave_much(run: TrainedRun) -> None:
    reference = routes(run)
    with permuted_rows(run, [torch.arange(N_EXPERTS).roll(N_EXPERTS // 2)] * N_LAYERS):
        exchanged = routes(run)
    right, wrong = (result.controls().set_index("kind") for result in (reference, exchanged))
    assert right.loc["router", "regret_high"] < wrong.loc["router", "regret_low"] / 2
    # no more regret than if the model's prediction were right, and far less than a drawn route would have
    assert right.loc["own_prediction", "excess_regret_high"] < 0
    assert right.loc["fresh_draw", "excess_regret_high"] < -0.05
    # with the rows exchanged, more than both can explain
    assert wrong.loc["own_prediction", "excess_regret_low"] > 0
    assert wrong.loc["fresh_draw", "excess_regret_low"] > 0
    assert set(reference.by_layer()["verdict"]) == {"aligned"}
    assert set(exchanged.by_layer()["verdict"]) == {"misaligned"}
    assert (reference.by_layer()["inclusion_1"] > exchanged.by_layer()["inclusion_1"]).all()
    # all routes are known: random ones are the same set, and nothing was dropped
    assert right.loc["random", "excess_regret"] == pytest.approx(0, abs=1e-6)
    assert reference.by_layer()["n_dropped"].tolist() == [0, 0]


def test_the_summary_tells_the_two_apart(run: TrainedRun) -> None:
    assert "own prediction, regret is" in (text := routes(run).summary())
    assert "the run's own is smaller" in text
    with permuted_rows(run, [torch.arange(N_EXPERTS).roll(N_EXPERTS // 2)] * N_LAYERS):
        assert "the run's own is larger" in routes(run).summary()
