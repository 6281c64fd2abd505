"""The comparison table: means and spreads by hand, and finished runs read back rather than trained again."""

from __future__ import annotations

import sys

import pandas as pd
import pytest

from moe_interp.errors import ConfigError, ResultError
from moe_interp.testbed.compare import Comparison, compare, row_of
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains import Domain
from moe_interp.testbed.model import ModelConfig

TINY = TestbedConfig(
    model=ModelConfig(n_layers=2, d_model=32, n_heads=2, n_experts=4, top_k=2, d_expert=16, max_length=64),
    vocab_size=280,
    domains=("letters", "numbers"),
    length=16,
    micro_batch=4,
    steps=2,
    warmup_steps=1,
    validation_sequences=3,
)
DOMAINS = (
    Domain("letters", tuple(f"abc {'xy' * i}" for i in range(20)), ("cab xy",)),
    Domain("numbers", tuple(f"{i} + 7 = {i + 7}" for i in range(20)), ("4 - 1",)),
)
RUNS = Comparison(
    pd.DataFrame(
        {
            "strategy": ["a", "a", "b", "b"],
            "seed": [0, 1, 0, 1],
            "specialization": [0.5, 0.7, 0.2, 0.6],
            "loss": [1.0, 3.0, 2.0, 2.0],
        }
    )
)


def test_summary_gives_mean_and_standard_deviation_over_seeds():
    table = RUNS.summary()
    assert table.index.tolist() == ["a", "b"]
    assert table.loc["a", ["specialization", "specialization_sd", "seeds"]].tolist() == pytest.approx(
        [0.6, 0.02**0.5, 2]
    )
    assert table.loc["b", ["loss", "loss_sd"]].tolist() == [2.0, 0.0]


def test_differences_are_paired_by_seed():
    # .3 and .1: mean .2, standard error sqrt(.02 / 2) = .1
    found = RUNS.difference("specialization", "a", "b")
    assert found == {"mean": pytest.approx(0.2), "standard_error": pytest.approx(0.1), "seeds": 2, "seeds_agree": True}
    assert RUNS.difference("loss", "a", "b")["seeds_agree"] is False
    with pytest.raises(ConfigError, match="metric 'magic'"):
        RUNS.difference("magic", "a", "b")
    with pytest.raises(ConfigError, match="a seed in common"):
        RUNS.difference("loss", "a", "c")


def test_a_row_averages_layers_and_domains():
    record = {
        "tokens": 64,
        "dropped_slots": 0.25,
        "routing": {"layer": [0, 1], "specialization": [0.2, 0.4], "dead_experts": [0, 1]},
        "validation": {"x": 1.0, "y": 2.0},
    }
    assert row_of(record) == {
        "tokens": 64,
        "dropped_slots": 0.25,
        "specialization": pytest.approx(0.3),
        "dead_experts": 0.5,
        "loss_x": 1.0,
        "loss_y": 2.0,
        "loss": 1.5,
    }


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch):
    options = {"out": tmp_path, "domains": DOMAINS, "progress": False}
    first = compare(TINY, ["reference", "none"], [0, 1], **options)
    assert first.runs["strategy"].tolist() == ["reference"] * 2 + ["none"] * 2
    assert first.runs.loc[0, "specialization"] == 1.0
    with pytest.raises(ResultError, match="the very same configuration"):
        compare(TINY.model_copy(update={"lr": 0.1}), ["none"], [0], **options)
    monkeypatch.setattr(sys.modules["moe_interp.testbed.compare"], "train", None)
    pd.testing.assert_frame_equal(compare(TINY, ["reference", "none"], [0, 1], **options).runs, first.runs)


def test_an_empty_or_unknown_grid_is_refused_before_training():
    with pytest.raises(ConfigError, match="at least one of each"):
        compare(TINY, [], [0])
    with pytest.raises(ConfigError, match="strategy 'magic'"):
        compare(TINY, ["none", "magic"], [0])
