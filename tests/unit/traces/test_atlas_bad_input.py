"""What the atlas and its measures refuse, and routes of which little can be said: in words, without a warning."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

import moe_interp as mi
from moe_interp.cli.application import cli
from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.plots import FIGURES
from moe_interp.traces import (
    RoutingCounts,
    RoutingTrace,
    esft_experts,
    esft_scores,
    expert_paths,
    load,
    standing_committee,
    transitions,
    vocabulary_specialization,
)
from moe_interp.traces.atlas.build import from_paths
from tests.unit.traces.test_measures_by_loops import awkward


@pytest.fixture(scope="module")
def trace():
    return awkward()


@pytest.mark.parametrize("shape", ["native rows", "one expert", "a bare layer", "a layer of empty slots", "one token"])
def test_sparse_routes_are_told_and_drawn_without_missing_numbers(shape):
    shapes = {
        "native rows": {"native": 0.3},
        "one expert": {"n_experts": 1, "k": 1, "empty": 0.3},
        "a bare layer": {"bare": "native"},
        "a layer of empty slots": {"bare": "empty"},
        "one token": {"lengths": [1], "n_layers": 1, "n_experts": 1, "k": 1, "labels": None},
    }
    trace = awkward(**shapes[shape])
    result = mi.atlas(trace, against=trace, n_permutations=9)
    assert "nan" not in result.summary().replace("domain", "")
    for name in FIGURES["atlas"]:
        if name != "transitions" or len(trace.layers) > 1:
            try:
                assert result.plot(name).axes
            except DataError:
                assert (name, trace.domain) == ("domains", None)


@pytest.mark.parametrize("arguments", [{"native": 1.1}, {"empty": 1.1}])
def test_routes_of_no_expert_are_refused(arguments):
    with pytest.raises(DataError, match="which use no expert at all"):
        mi.atlas(awkward(**arguments))


@pytest.mark.parametrize("measure", [load, transitions, expert_paths, standing_committee, vocabulary_specialization])
@pytest.mark.parametrize("source", [None, 3, "x", np.zeros((2, 2, 2), int)])
def test_what_is_no_routing_is_refused(measure, source):
    with pytest.raises(DataError, match="routing of type"):
        measure(source)


def test_counts_of_nothing_are_refused():
    empty = RoutingCounts(range(4), 6)
    for measure in (load, transitions, expert_paths):
        with pytest.raises(DataError, match="which count nothing yet"):
            measure(empty)
    for source in (empty, {"law": empty}):
        with pytest.raises(DataError, match=r"no expert at all|without labels, of at least one token"):
            mi.atlas(source)


def test_options_out_of_range_are_refused(trace):
    result = mi.atlas(trace, n_permutations=9)
    for wrong in (0, "x", 1.5, True):
        for ask in (result.busiest, result.pairs, lambda n: vocabulary_specialization(trace, min_count=n)):
            with pytest.raises(ConfigError):
                ask(wrong)
    for call in (
        lambda: esft_experts(esft_scores(trace)["token_score"], "x"),
        lambda: standing_committee(trace, presence="x"),
        lambda: standing_committee(trace, top="x"),
        lambda: result.specialists("x"),
        lambda: mi.atlas(trace, tables=3),
        lambda: mi.atlas(trace, tables="paths"),
        lambda: RoutingCounts(4, 6),
    ):
        with pytest.raises(ConfigError):
            call()


def test_ragged_lists_are_refused():
    for ragged in ([[[0, 1]], [[0]]], [[[0, 1], [1, 2]], [[0, 1]]]):
        with pytest.raises(DataError, match=r"rows of one length\. Fill short routes up with -1"):
            RoutingTrace.from_arrays(ragged, n_experts=3)
    with pytest.raises(DataError, match="rows of one length"):
        RoutingTrace.from_arrays([[[0, 1]]], [[[0.5], [0.5, 0.1]]], n_experts=3)


@pytest.mark.parametrize(
    "arguments",
    [
        ([[1, 2], [3]], 3, 1),
        ([[1, 2]], [3, 4], 1),
        ([[1, 2]], 3.7, 1),
        ([[1, 2]], "x", 1),
        ([[1, 2]], 3, 1, None, None, [1, 2, 3]),
        ([[[1, 2]], [[3, 4]]], 7, 1, None, ["", "b"]),
    ],
)
def test_published_counts_that_do_not_fit_are_refused(arguments):
    with pytest.raises(DataError):
        RoutingCounts.from_counts(*arguments)


def test_ids_too_large_to_be_counted_are_refused_and_others_kept(trace):
    huge = RoutingTrace.from_arrays(**trace.arrays() | {"token_ids": np.arange(trace.n_tokens) * 2**56})
    with pytest.raises(DataError, match="ids that can be counted by layer and expert"):
        vocabulary_specialization(huge)
    hashed = np.arange(trace.n_tokens) % 3 * 2**50 - 2**49
    found = vocabulary_specialization(RoutingTrace.from_arrays(**trace.arrays() | {"token_ids": hashed}))
    assert set(found["token_id"].values.tolist()) == set(hashed.tolist())


def test_an_expert_without_use_is_in_no_committee_and_no_selection():
    trace = RoutingTrace.from_arrays([[[0, 1, -1, -1]]] * 4, None, [2, 2], 6, domain=["a", "b"])
    # the four without use share rank 4.5; with four slots the first five are asked for
    assert standing_committee(trace, top=5)["member"].values.tolist() == [[True, True, False, False, False, False]]
    assert esft_experts(esft_scores(awkward(bare="native"))["token_score"], 0.2)[1] == []


def test_labels_inside_files_are_kept_unless_a_name_is_given(trace, tmp_path):
    labelled = trace.save(tmp_path / "labelled.npz")
    (tmp_path / "other").mkdir()
    also = trace.save(tmp_path / "other" / "labelled.npz")
    bare = awkward(labels=None).save(tmp_path / "bare.npz")
    counts = RoutingCounts.of(trace).save(tmp_path / "counts.npz")

    def domains(*paths):
        return from_paths(map(str, paths), n_permutations=9).data["domain"].values.tolist()

    own = list(trace.domains)
    assert domains(labelled, bare) == sorted([*own, "bare"])
    assert domains(labelled, also, counts) == own
    assert domains(f"law={bare}", f"mine={labelled}") == ["law", "mine"]
    twin = awkward(labels=None).save(tmp_path / "other" / "bare.npz")
    run = CliRunner().invoke(cli, ["atlas", str(bare), str(twin), "--permutations", "9"])
    assert run.exit_code == 1
    assert "two paths of the name 'bare'" in str(run.exception)


def test_paths_of_the_same_tokens_are_compared_token_by_token(trace, tmp_path):
    one, parts = trace.save(tmp_path / "one.npz"), tmp_path / "parts"
    parts.mkdir()
    for number in range(3):
        inside = trace.sequence // 2 == number
        trace.select(inside).save(parts / f"{number}.npz")
    run = CliRunner().invoke(cli, ["atlas", str(one), "--against", str(parts), "--permutations", "9"])
    assert run.exit_code == 0, run.output
    assert "100% of its routes are shared" in run.output
    by_path = mi.atlas(trace, against=str(parts), n_permutations=9).data
    np.testing.assert_allclose(by_path["saturation"], 1)
    in_memory = mi.atlas(trace, against=trace, n_permutations=9).data
    np.testing.assert_array_equal(by_path["saturation_low"], in_memory["saturation_low"])
    counts = mi.atlas(str(one), against=RoutingCounts.of(trace), n_permutations=9)
    assert "counts alone" in counts.not_testable["saturation"]
    other = mi.RoutingTrace.from_arrays(**trace.arrays() | {"token_ids": trace.token_ids + 1})
    assert "token ids differ" in mi.atlas(str(one), against=other, n_permutations=9).not_testable["saturation"]


def test_a_path_that_does_not_exist_is_named():
    with pytest.raises(ResultError, match="'/no/such/file', which does not exist"):
        mi.atlas("/no/such/file")
