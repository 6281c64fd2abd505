"""The comparison table: means and spreads by hand, and finished runs read back rather than trained again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr

from moe_interp.errors import ConfigError, ResultError
from moe_interp.results import load_result
from moe_interp.testbed.compare import compare
from moe_interp.testbed.comparison import ComparisonResult, RepeatedRunWarning, comparison
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.domain import Domain
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


def log(specialization, losses, dropped=0.25):
    """A run's log: one line of training only, two validations."""
    routing = {"layer": [0, 1], "specialization": specialization, "dead_experts": [0, 1]}
    routing |= {"effective_experts": [0.5, 1.0], "max_violation": [10.0, 12.0]}
    lines = [{"step": 1, "loss": 9.0}]
    for step in (2, 4):
        record = {"step": step, "tokens": step * 64, "dropped_slots": dropped, "routing": routing}
        lines.append(record | {"validation": {"x": losses[0], "y": losses[1]}})
    lines[1] = lines[1] | {"routing": routing | {"specialization": [0.0, 0.0]}}
    return lines


# averages over layers: a .5 and .7, b .2 and .6; over domains: a 1 and 3, b 2 and 2
RUNS = comparison(
    TINY,
    {
        ("a", 0): log([0.4, 0.6], [0.5, 1.5]),
        ("a", 1): log([0.7, 0.7], [3.0, 3.0]),
        ("b", 0): log([0.1, 0.3], [1.0, 3.0]),
        ("b", 1): log([0.6, 0.6], [2.0, 2.0]),
    },
)


def test_runs_average_layers_and_domains_at_the_last_step():
    runs = RUNS.runs
    assert runs["strategy"].tolist() == ["a", "a", "b", "b"]
    assert runs["seed"].tolist() == [0, 1, 0, 1]
    assert runs["specialization"].tolist() == pytest.approx([0.5, 0.7, 0.2, 0.6])
    assert runs["loss"].tolist() == pytest.approx([1, 3, 2, 2])
    assert runs["loss_y"].tolist() == [1.5, 3, 3, 2]
    first = runs.loc[0]
    assert (first["tokens"], first["dropped_slots"], first["dead_experts"]) == (256, 0.25, 0.5)
    assert runs["jsd"].isna().all()  # not in these logs


def test_layers_and_steps_are_kept():
    frame = RUNS.to_dataframe("specialization").set_index(["strategy", "seed", "step", "layer"])["specialization"]
    assert frame["a", 0].tolist() == [0, 0, 0.4, 0.6]
    assert RUNS.data["domain_loss"].sel(strategy="b", seed=0, step=2, domain="y") == 3


def test_the_table_gives_mean_and_standard_deviation_over_seeds():
    table = RUNS.table()
    assert table.index.tolist() == ["a", "b"]
    assert table.loc["a", ["specialization", "specialization_sd", "seeds"]].tolist() == pytest.approx(
        [0.6, 0.02**0.5, 2]
    )
    assert table.loc["b", ["loss", "loss_sd"]].tolist() == [2.0, 0.0]


def test_the_summary_is_the_table_in_80_columns():
    text = RUNS.summary()
    assert "2 strategies, seeds 0, 1, 256 tokens a run: mean±sd over seeds" in text
    row = next(line for line in text.splitlines() if line.startswith("a "))
    assert row.split() == ["a", "0.600±0.141", "0.750±0.000", "11.000±0.000", "0.5", "2.000±1.414"]
    longest = {("micro_batch+capacity", seed): log([0, 1], [1, 2]) for seed in (0, 1)}
    assert max(map(len, comparison(TINY, longest).summary().splitlines())) <= 80
    assert "±" not in comparison(TINY, {("a", 0): log([0, 1], [1, 2])}).summary().split("specializ.:")[0]


def test_a_saved_comparison_is_the_same(tmp_path):
    loaded = load_result(RUNS.save(tmp_path / "testbed.nc"))
    assert isinstance(loaded, ComparisonResult)
    pd.testing.assert_frame_equal(loaded.runs, RUNS.runs)
    assert loaded.manifest.config["lr"] == TINY.lr
    assert loaded.manifest.seeds == {"seed 0": 0, "seed 1": 1}


def test_differences_are_paired_by_seed():
    # .3 and .1: mean .2, standard error sqrt(.02 / 2) = .1
    found = RUNS.difference("specialization", "a", "b")
    assert found == {"mean": pytest.approx(0.2), "standard_error": pytest.approx(0.1), "seeds": 2, "seeds_agree": True}
    assert RUNS.difference("loss", "a", "b")["seeds_agree"] is False
    with pytest.raises(ConfigError, match="metric 'magic'"):
        RUNS.difference("magic", "a", "b")
    with pytest.raises(ConfigError, match=r"'c'\. Expected: two of a, b"):
        RUNS.difference("loss", "a", "c")


def test_seeds_whose_runs_are_the_same_count_once():
    data = RUNS.data.copy(deep=True)
    again = data.isel(seed=[0]).assign_coords(seed=[9])
    both = xr.concat([data, again], "seed", data_vars="minimal", coords="minimal", compat="override", join="outer")
    with pytest.warns(RepeatedRunWarning, match="seed 9 came out as those of an earlier seed"):
        found = ComparisonResult(both).difference("specialization", "a", "b")
    assert found == RUNS.difference("specialization", "a", "b")


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch):
    options = {"out": tmp_path, "domains": DOMAINS, "progress": False}
    first = compare(TINY, ["reference", "none"], [0, 1], **options)
    assert first.runs["strategy"].tolist() == ["reference"] * 2 + ["none"] * 2
    assert first.runs.loc[0, "specialization"] == 1.0
    monkeypatch.setattr(sys.modules["moe_interp.testbed.compare"], "train", None)
    pd.testing.assert_frame_equal(compare(TINY, ["reference", "none"], [0, 1], **options).runs, first.runs)
    # refused before anything is trained, also where the first cells are free
    with pytest.raises(ResultError, match=r"none-seed0 .* another configuration: lr 0\.003 there, 0\.1 here"):
        compare(TINY.model_copy(update={"lr": 0.1}), ["global", "none"], [0], **options)
    with pytest.raises(ResultError, match="already holds a run"):
        compare(TINY, ["global", "none"], [0], resume=False, **options)
    (tmp_path / "none-seed1" / "config.json").write_text("{")
    with pytest.raises(ResultError, match=r"config\.json cannot be read"):
        compare(TINY, ["none"], [1], **options)


def test_an_empty_or_unknown_grid_is_refused_before_training():
    with pytest.raises(ConfigError, match="at least one of each"):
        compare(TINY, [], [0])
    with pytest.raises(ConfigError, match="strategy 'magic'"):
        compare(TINY, ["none", "magic"], [0])
    with pytest.raises(ConfigError, match="each once"):
        compare(TINY, ["none"], [0, 0])
    for strategy in ("hash+random", "sigmoid+capacity", "none+none"):
        with pytest.raises(ConfigError, match=f"strategy '{strategy}'".replace("+", r"\+")):
            compare(TINY, ["none", strategy], [0])
    three = TINY.model_copy(update={"domains": ("arithmetic", "facts", "puzzles")})
    with pytest.raises(ConfigError, match="4 experts for 3 domains with top_k=2"):
        compare(three, ["none", "reference"], [0])


def test_a_single_domain_has_use_but_no_specialization():
    alone = compare(TINY, ["none"], [0], domains=DOMAINS[:1], progress=False)
    assert alone.runs["specialization"].isna().all()
    assert 0 < alone.runs["effective_experts"].item() <= 1


def test_a_finished_run_of_a_text_that_has_changed_is_refused(tmp_path: Path) -> None:
    text, out = tmp_path / "text.jsonl", tmp_path / "runs"
    lines = [json.dumps({"text": f"abc {'xy' * i} cba {'z' * (i % 5)}"}) for i in range(60)]
    text.write_text("\n".join(lines))
    config = TINY.model_copy(
        update={"domains": (f"own={text}", "lookups"), "data_scale": 0.01, "steps": 1, "warmup_steps": 0}
    )
    compare(config, ["none"], [0], out=out, progress=False)
    compare(config, ["none"], [0], out=out, progress=False)  # as it was
    text.write_text("\n".join([*lines[:-1], json.dumps({"text": "another last document"})]))
    with pytest.raises(ResultError, match=r"another configuration.*data"):
        compare(config, ["none"], [0], out=out, progress=False)
    text.unlink()  # what cannot be compared is read back
    compare(config, ["none"], [0], out=out, progress=False)
