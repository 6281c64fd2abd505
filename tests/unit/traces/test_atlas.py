"""The atlas: its sources, what it cannot test, its words, and what it says of real models' routing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli.application import cli
from moe_interp.errors import ConfigError, DataError
from tests.unit.traces.planted import planted_trace
from tests.unit.traces.test_measures import LABELS, rich_trace

ROUTING = Path(__file__).parents[3] / "../shared/data/routing"


@pytest.fixture(scope="module")
def trace():
    return rich_trace(n_sequences=24, length=10, labels=LABELS * 2)


@pytest.fixture(scope="module")
def atlas(trace):
    return mi.atlas(trace, n_permutations=1999, against=trace)


def test_everything_that_was_recorded_is_measured(atlas):
    assert atlas.not_testable == {}
    expected = {
        *("share", "entropy_low", "domain_share", "domain_difference", "vocabulary_input", "vocabulary_next"),
        *("vocabulary_predicted", "co_activation", "rank_adjacent", "transition_information", "path", "mean_rank"),
        *("token_score", "gate_score", "saliency", "margin", "saturation", "usage_correlation", "risk_difference"),
    }
    assert expected <= set(map(str, atlas.data.data_vars))
    np.testing.assert_allclose(atlas.data["saturation"], 1)


def test_the_summary_begins_with_the_corpus_and_its_findings(atlas):
    lines = atlas.summary().splitlines()
    assert lines[0] == "Routing of 240 tokens in 24 sequences, 2 domains: 4 layers of 6 experts, top-3."
    assert "cells (domain x layer x expert) differ from the other domains" in lines[1]
    assert "the largest: layer 3 expert 0 serves" in lines[1]
    assert "100% of its routes are shared" in atlas.summary()


def test_every_source_gives_the_same_numbers(trace, atlas, tmp_path):
    file = trace.save(tmp_path / "trace.npz")
    counts = mi.RoutingCounts.of(trace).save(tmp_path / "counts.npz")
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(3):
        inside = (trace.sequence >= 8 * number) & (trace.sequence < 8 * number + 8)
        trace.select(inside).save(folder / f"part-{number:05d}.npz")
    by_domain = {name: trace.select(trace.domain == name) for name in ("code", "law")}
    left_out = [name for name in atlas.data.data_vars if "saturation" in str(name) or "usage" in str(name)]
    expected = atlas.data.drop_vars([*left_out, "compared_domain"])
    for source in (trace, file, str(counts), folder, mi.RoutingCounts.of(trace)):
        found = mi.atlas(source, n_permutations=1999)
        xr.testing.assert_equal(found.data, expected)
    # other order of sequences: the same counts, other draws
    found = mi.atlas({name: part.with_domain("x") for name, part in by_domain.items()}, n_permutations=1999)
    for name in ("share", "domain_share", "co_activation", "path_count", "gate_score", "vocabulary_input"):
        np.testing.assert_array_equal(found.data[name], expected[name])


def test_what_cannot_be_tested_is_named_and_the_rest_computed():
    bare = mi.RoutingTrace.from_arrays([[[0, 1]], [[1, 2]]], n_experts=3)
    result = mi.atlas(bare)
    assert set(result.not_testable) == {
        *("domain specialization", "domain differences", "input vocabulary", "next vocabulary", "paths"),
        *("predicted vocabulary", "transitions", "standing committee", "output norms", "router margin"),
    }
    assert "Not testable: domain specialization (" in result.summary()
    assert result.busiest()["expert"].tolist() == [1]
    with pytest.raises(DataError, match=r"without domain differences \(A corpus without domain labels; needs at least"):
        result.specialists()
    one = mi.atlas(bare.with_domain("x"))
    assert "single domain 'x'" in one.not_testable["domain differences"]
    assert "domain_share" in one.data
    pair = mi.RoutingTrace.from_arrays([[[0, 1]], [[1, 2]]], None, [1, 1], 3, domain=["x", "y"])
    assert "several sequences of each domain" in mi.atlas(pair).not_testable["domain differences"]


def test_a_comparison_that_cannot_be_made_is_named(trace):
    other = mi.RoutingTrace.from_arrays(**trace.arrays() | {"layers": [4, 5, 6, 7]})
    result = mi.atlas(trace, against=other, n_permutations=99)
    assert "layers [3, 7] of only one" in result.not_testable["saturation"]
    assert "layers [3, 7] of only one" in result.not_testable["correlation of use"]
    ids = mi.RoutingTrace.from_arrays(**trace.arrays() | {"token_ids": trace.token_ids + 1})
    result = mi.atlas(trace, against=ids, n_permutations=99)
    assert "another tokenizer" in result.not_testable["saturation"]
    assert "usage_correlation" in result.data
    counts = mi.RoutingCounts.of(trace)
    assert "token by token" in mi.atlas(counts, against=counts, n_permutations=99).not_testable["saturation"]


def test_tables(atlas):
    assert atlas.busiest(2).shape[0] == 2 * 4 * 2
    assert atlas.pairs(2).shape[0] == 8
    assert (atlas.pairs()["lift"] > 0).all()
    assert atlas.by_layer()["layer"].tolist() == [3, 4, 5, 6]
    assert atlas.paths()["path"].str.count(">").eq(2).all()
    table = atlas.specialists()
    assert table["difference"].abs().is_monotonic_decreasing
    assert (table["found"] == (table["q"] <= 0.05)).all()


def test_figures_draw_the_numbers(atlas):
    drawn = atlas.plot("load").axes[0].patches
    layers = atlas.data["max_violation"].to_series().sort_index().index.tolist()
    expected = np.sort(atlas.data["share"].sel(layer=layers[0]).values)[::-1]
    np.testing.assert_allclose([bar.get_height() for bar in drawn], expected)
    mesh = atlas.plot("domains").axes[0].collections[0].get_array()
    np.testing.assert_allclose(np.asarray(mesh).reshape(4, 6), atlas.data["domain_difference"][0])
    line = atlas.plot("layers").axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), atlas.data["effective_experts"])


def test_sources_that_are_none():
    with pytest.raises(ConfigError, match="routing of type int"):
        mi.atlas(3)
    with pytest.raises(DataError, match="no domains"):
        mi.atlas({})
    with pytest.raises(DataError, match="counts without labels"):
        mi.atlas({"a": mi.RoutingCounts.of(planted_trace())})


def test_the_command_prints_the_findings_and_writes_the_page(trace, tmp_path):
    law, code = (trace.select(trace.domain == name).save(tmp_path / f"{name}.npz") for name in ("law", "code"))
    run = CliRunner().invoke(
        cli, ["atlas", f"statutes={law}", str(code), "--permutations", "99", "--out", str(tmp_path / "out")]
    )
    assert run.exit_code == 0, run.output
    assert "Routing of 240 tokens in 24 sequences, 2 domains" in run.output
    result = mi.load_result(tmp_path / "out" / "atlas.nc")
    assert result.data["domain"].values.tolist() == ["code", "statutes"]
    assert (tmp_path / "out" / "index.html").is_file()
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        *("domains", "layers", "load", "co_activation", "transitions"),
    }


def olmoe(model, kind="topk"):
    if not ROUTING.exists():
        pytest.skip("the optional data folder is not beside the checkout")
    lines = (ROUTING / "olmoe_domain_counts.jsonl").read_text(encoding="utf-8").splitlines()
    return [e for e in map(json.loads, lines) if e["model"] == f"allenai/OLMoE-1B-7B-0924{model}" and e["kind"] == kind]


def counts_of(entries):
    return mi.RoutingCounts.from_counts(
        [entry["counts"] for entry in entries],
        [entry["n_tokens"] for entry in entries],
        8,
        entries[0]["layers"],
        [entry["domain"] for entry in entries],
    )


@pytest.mark.shared_data
def test_olmoe_layer_7_has_the_published_busiest_experts():
    table = mi.atlas(counts_of(olmoe(""))).busiest()
    found = {
        row["domain"]: (row["expert"], round(row["share"], 3)) for row in table.to_dict("records") if row["layer"] == 7
    }
    assert found == {
        "arxiv": (17, 0.785),
        "book": (28, 0.507),
        "c4": (1, 0.332),
        "github": (17, 0.77),
        "tulu": (17, 0.556),
        "wikipedia": (27, 0.848),
    }


@pytest.mark.shared_data
def test_olmoe_tuned_by_preferences_uses_the_experts_it_used_before():
    result = mi.atlas(counts_of(olmoe("-SFT")), against=counts_of(olmoe("-Instruct")))
    assert result.data["usage_correlation"].values == pytest.approx(0.997, abs=0.002)


@pytest.mark.shared_data
def test_gpt_oss_uses_experts_by_domain():
    if not ROUTING.exists():
        pytest.skip("the optional data folder is not beside the checkout")
    stored = np.load(ROUTING / "gptoss20b_mmlu_token_traces.npz")
    lines = (ROUTING / "gptoss20b_mmlu_token_traces.jsonl").read_text(encoding="utf-8").splitlines()
    answers = sorted(map(json.loads, lines), key=lambda answer: answer["trace_offset"])
    trace = mi.RoutingTrace.from_arrays(
        stored["expert_ids"],
        stored["expert_probs"].astype(np.float32),
        [answer["n_routed"] for answer in answers],
        32,
        domain=[answer["domain"] for answer in answers],
    )
    result = mi.atlas(trace, n_permutations=999)
    assert dict(result.data.sizes) | {"domain": 4, "layer": 24, "expert": 32} == dict(result.data.sizes)
    assert (result.data["domain_information_p"] <= 0.05).all()
    top = result.specialists().iloc[0]
    of_domain, used = trace.domain == top["domain"], (trace.expert_indices == top["expert"]).any(axis=2)
    shares = [used[mask, top["layer"]].mean() for mask in (of_domain, ~of_domain)]
    assert top["difference"] == pytest.approx(shares[0] - shares[1])
