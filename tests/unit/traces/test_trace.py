"""A trace keeps its routes through files, selection and concatenation, and refuses what is not a route."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.results.seals import sealed
from moe_interp.traces import RoutingTrace
from moe_interp.traces.files import footer_bytes

FIELDS = ("expert_indices", "expert_weights", "sequence", "token_ids", "predicted_ids", "domain", "phase")
FIELDS += ("router_logits", "router_inputs", "expert_norms")
OPTIONAL = ("expert_weights", "domain", "token_ids", "predicted_ids", "phase", *FIELDS[-3:])


def random_indices(rng, n_tokens=7, n_layers=2, n_slots=3, n_experts=5):
    indices = rng.random((n_tokens, n_layers, n_experts)).argsort(axis=-1)[..., :n_slots]
    indices[rng.random(indices.shape) < 0.1] = -1
    return indices


def labelled(seed=0, **changes):
    rng = np.random.default_rng(seed)
    arguments = {
        "expert_indices": random_indices(rng),
        "expert_weights": rng.random((7, 2, 3)),
        "sequence_lengths": [3, 4],
        "n_experts": 5,
        "layers": [1, 4],
        "domain": ["math", "Recht und §"],
        "token_ids": rng.integers(0, 99, 7),
        "predicted_ids": rng.integers(0, 99, 7),
        "phase": ["prefill"] * 5 + ["generation"] * 2,
        "router_logits": rng.normal(size=(7, 2, 5)),
        "router_inputs": rng.normal(size=(7, 2, 4)),
        "expert_norms": rng.random((7, 2, 3)),
    }
    return RoutingTrace.from_arrays(**arguments | changes)


def assert_same(one, other):
    assert (one.n_experts, one.layers) == (other.n_experts, other.layers)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        if getattr(one, name) is not None:
            assert getattr(one, name).dtype.kind == getattr(other, name).dtype.kind


def test_sequences_positions_and_labels_follow_from_the_lengths():
    trace = labelled()
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert trace.sequence_lengths.tolist() == [3, 4]
    assert trace.domains == ("Recht und §", "math")
    assert trace.domain_codes.tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert RoutingTrace.from_arrays(trace.expert_indices, n_experts=5).sequence_lengths.tolist() == [7]
    assert trace.with_domain("all").domains == ("all",)
    assert trace.with_domain(list("abcdefg")).domain_codes.tolist() == list(range(7))


@pytest.mark.parametrize("format", ["npz", "parquet"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_saved_trace_comes_back(tmp_path, format, bare):
    trace = labelled(**dict.fromkeys(OPTIONAL)) if bare else labelled(covered=np.arange(7) != 3)
    path = trace.save(tmp_path / f"trace.{format}")
    assert_same(RoutingTrace.read(path), trace)
    other = trace.save(tmp_path / "trace.bin", format=format)
    assert_same(RoutingTrace.read(other, format=format), trace)


@pytest.mark.parametrize("format", ["npz", "parquet"])
def test_vectors_are_stored_in_half_only_if_asked(tmp_path, format):
    trace = labelled(covered=np.arange(7) != 3)
    short = RoutingTrace.read(trace.save(tmp_path / f"trace.{format}", half=True))
    for name in ("router_logits", "router_inputs"):
        assert getattr(short, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(short, name), getattr(trace, name).astype(np.float16))
    large = labelled(router_inputs=np.full((7, 2, 4), 7e4))
    with pytest.raises(DataError, match=r"router_inputs of up to 70000. Expected: numbers up to 65504"):
        large.save(tmp_path / "large", format, half=True)
    large.save(tmp_path / "large", format)


def test_a_row_that_is_not_covered_has_no_route_and_no_numbers():
    covered = np.ones((7, 2), bool)
    covered[3], covered[5, 1] = False, False
    trace = labelled(covered=covered)
    np.testing.assert_array_equal(trace.covered, covered)
    assert (trace.expert_indices[~covered] == -2).all()
    assert (trace.expert_indices[covered] >= -1).all()
    assert np.isnan(trace.router_logits[~covered]).all()
    assert np.isnan(trace.router_inputs[~covered]).all()
    assert not trace.expert_norms[~covered].any()
    assert not trace.expert_weights[~covered].any()
    assert "3 routes not covered" in repr(trace)
    again = RoutingTrace.from_arrays(**trace.arrays())
    assert_same(again, trace)
    narrow = RoutingTrace.from_arrays([[[-2], [-2]], [[1], [0]]], n_experts=5, layers=[1, 4])
    joined = RoutingTrace.concatenate([narrow, trace])
    assert joined.expert_indices[:2].tolist() == [[[-2] * 3] * 2, [[1, -1, -1], [0, -1, -1]]]
    assert_same(joined.select(joined.sequence > 0), labelled(covered=covered, **dict.fromkeys(OPTIONAL)))


def test_tensors_make_the_same_trace_as_arrays():
    trace = labelled()
    weights = torch.tensor(trace.expert_weights, dtype=torch.bfloat16, requires_grad=True)
    other = RoutingTrace.from_arrays(torch.tensor(trace.expert_indices), weights, torch.tensor([3, 4]), n_experts=5)
    np.testing.assert_array_equal(other.expert_indices, trace.expert_indices)
    np.testing.assert_allclose(other.expert_weights, trace.expert_weights, rtol=2**-8)


def test_the_weight_of_an_empty_slot_is_zero():
    trace = RoutingTrace.from_arrays([[[0, -1]]], [[[0.5, np.nan]]], n_experts=2)
    assert trace.expert_weights.tolist() == [[[0.5, 0.0]]]


def test_counts_skip_empty_slots_and_agree_with_a_loop():
    trace = labelled()
    expected = np.zeros((2, 2, 5), dtype=int)
    for token, layer, slot in np.ndindex(trace.expert_indices.shape):
        if (expert := trace.expert_indices[token, layer, slot]) >= 0:
            expected[trace.domain_codes[token], layer, expert] += 1
    np.testing.assert_array_equal(trace.counts(trace.domain_codes, 2), expected)
    np.testing.assert_array_equal(trace.counts(), expected.sum(0, keepdims=True))
    assert (trace.expert_indices < 0).any()


def test_selection_and_concatenation_are_inverse():
    trace = labelled()
    parts = [trace.select(trace.sequence == number) for number in (0, 1)]
    assert parts[1].sequence_lengths.tolist() == [4]
    assert parts[1].domains == ("Recht und §",)
    assert_same(RoutingTrace.concatenate(parts), trace)


def test_concatenation_fills_narrow_routes_and_drops_fields_that_some_lack():
    one = RoutingTrace.from_arrays([[[3]]], [[[1.0]]], n_experts=5, domain="a")
    two = RoutingTrace.from_arrays([[[0, 1]]], [[[0.5, 0.25]]], n_experts=5)
    joined = RoutingTrace.concatenate([one, two])
    assert joined.expert_indices.tolist() == [[[3, -1]], [[0, 1]]]
    assert joined.expert_weights.tolist() == [[[1.0, 0.0]], [[0.5, 0.25]]]
    assert joined.domain is None
    with pytest.raises(DataError, match="all with the same layers and number of experts"):
        RoutingTrace.concatenate([one, RoutingTrace.from_arrays([[[3]]], n_experts=6)])
    with pytest.raises(DataError, match="at least one trace"):
        RoutingTrace.concatenate([])


def with_entry(token, layer, slot, value):
    indices = np.tile(np.arange(3), (7, 2, 1))
    indices[token, layer, slot] = value
    return indices


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"expert_indices": with_entry(2, 1, 0, 5)},
            "Expert 5 at token 2, layer 4, slot 0. Expected: an index from 0 to 4",
        ),
        ({"expert_indices": with_entry(6, 0, 2, -2)}, "Expert -2 at token 6, layer 1, slot 2"),
        ({"expert_indices": with_entry(3, 1, 2, 0)}, "Expert 0 twice at token 3, layer 4"),
        ({"expert_indices": np.zeros((7, 3), int)}, "expert_indices of shape (7, 3)"),
        ({"expert_indices": np.zeros((7, 2, 3))}, "type float64. Expected: integers [token, layer, slot]"),
        ({"expert_indices": np.zeros((0, 2, 3), int)}, "Record at least one token"),
        ({"expert_weights": np.ones((7, 2, 2))}, "expert_weights of shape (7, 2, 2)"),
        (
            {"expert_weights": np.where(with_entry(4, 1, 2, 9) == 9, np.inf, 1.0)},
            "Weight inf at token 4, layer 4, expert",
        ),
        ({"sequence_lengths": [3, 3]}, "sum 6. Expected: positive integers [sequence] that add up to the 7 tokens"),
        ({"sequence_lengths": [7, 0]}, "positive integers"),
        ({"n_experts": None}, "n_experts=None. Expected: the number of experts"),
        ({"layers": [1, 1]}, "layers=[1, 1] for a trace with 2 layers. Expected: 2 different"),
        ({"domain": ["a", "b", "c"]}, "domain of shape (3,). Expected: one label, 2 labels (one per sequence) or 7"),
        ({"token_ids": [1, 2]}, "token_ids of shape (2,)"),
        ({"expert_indices": with_entry(0, 0, 0, 2**32)}, "Expert 4294967296 at token 0, column 0, slot 0"),
        ({"expert_indices": with_entry(5, 0, 1, -3)}, "Expert -3 at token 5, layer 1, slot 1"),
        ({"phase": "decode"}, "phase of shape () with ['decode']. Expected: prefill or generation"),
        ({"phase": ["prefill"] * 2}, "phase of shape (2,)"),
        ({"router_logits": np.zeros((7, 2, 4))}, "router_logits of shape (7, 2, 4)"),
        ({"router_inputs": np.zeros((7, 2, 0))}, "numbers of shape (7, 2, d_model)"),
        (
            {"router_inputs": np.where(np.arange(7) == 4, np.nan, 0)[:, None, None] * np.ones((7, 2, 3))},
            "router_inputs with a non-finite number at token 4, layer 1",
        ),
        ({"expert_norms": np.full((7, 2, 3), -1.0)}, "Norm -1.0 at token 0, layer 1, expert 0"),
        ({"covered": np.ones(7)}, "covered of shape (7,) and type float64"),
        ({"covered": np.ones((2, 7), bool)}, "a boolean mask [token] or [token, layer], (7,) or (7, 2)"),
    ],
)
def test_an_invalid_trace_is_refused_by_name(changes, message):
    full = {"expert_indices": np.tile(np.arange(3), (7, 2, 1))}
    with pytest.raises(DataError) as caught:
        labelled(**full | changes)
    assert message in str(caught.value)


def test_a_selection_must_be_a_mask_of_some_tokens():
    for tokens in (np.zeros(7, bool), np.arange(7), np.ones(6, bool)):
        with pytest.raises(DataError, match=r"a boolean mask of shape \(7,\)"):
            labelled().select(tokens)


def test_labels_are_needed_where_they_are_asked_for():
    with pytest.raises(DataError, match="A trace without domain labels"):
        _ = labelled(domain=None).domain_codes


@pytest.mark.parametrize("format", ["npz", "parquet"])
def test_a_damaged_trace_file_or_one_of_another_version_is_refused(tmp_path, format, monkeypatch):
    path = tmp_path / f"trace.{format}"
    with pytest.raises(ResultError, match="does not exist"):
        RoutingTrace.read(path)
    with monkeypatch.context() as patch:
        patch.setattr("moe_interp.traces.files.VERSION", 3)
        labelled().save(path)
    with pytest.raises(ResultError, match=r"has trace format version 3\. Expected: version 2"):
        RoutingTrace.read(path)
    content = labelled().save(path).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"routes"):
        path.write_bytes(damaged)
        with pytest.raises(ResultError, match="cannot be read as a trace"):
            RoutingTrace.read(path)


def test_an_npz_of_other_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", expert_ids=np.zeros((2, 2, 2)))
    with pytest.raises(ResultError, match=r"use RoutingTrace\.from_arrays"):
        RoutingTrace.read(tmp_path / "other.npz")


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ResultError, match=r"Trace format 'csv' .* one of npz, parquet"):
        labelled().save(tmp_path / "trace.csv")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        labelled().save(tmp_path / "trace.parquet")


def test_an_interrupted_save_keeps_the_earlier_trace(tmp_path, monkeypatch):
    path = labelled(0).save(tmp_path / "trace.npz")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        labelled(1).save(path)
    assert_same(RoutingTrace.read(path), labelled(0))
    assert os.listdir(tmp_path) == ["trace.npz"]


@pytest.mark.parametrize("odd", ["a\0", "a\nb", "\x1b[2J", "a\ud800", "", None, 1.5, True])
def test_labels_that_no_file_holds_are_refused(odd):
    indices = np.zeros((2, 1, 1), int)
    for domain in (odd if odd is not None else [odd] * 2, ["fine", odd]):
        with pytest.raises(DataError, match="domain "):
            RoutingTrace.from_arrays(indices, n_experts=2, domain=domain)
    trace = RoutingTrace.from_arrays(indices, n_experts=2, domain=np.array([3, 12]))
    assert trace.domains == ("12", "3")
    with pytest.raises(DataError, match="domain "):
        trace.with_domain(odd if odd is not None else [odd] * 2)


def test_a_parquet_file_whose_rows_were_moved_is_refused(tmp_path):
    """Rows are read by their place: a filtered, sorted or joined table would give routes to other layers and tokens."""
    from pyarrow import parquet

    path = labelled().save(tmp_path / "trace.parquet")
    table = parquet.read_table(path)

    def rewrite(rows, seal=True):
        parquet.write_table(table.take(rows), path)
        content = path.read_bytes()
        if seal:  # a right checksum: the rows themselves must be looked at
            path.write_bytes(sealed(content, len(content) - footer_bytes(content)))

    order = np.arange(len(table))
    by_layer = np.lexsort((order, table["layer"].to_numpy()))
    for rows in (by_layer, order[::-1], order[1:], np.delete(order, 3), np.roll(order, len(labelled().layers))):
        rewrite(rows)
        with pytest.raises(ResultError, match=r"cannot be read as a trace") as refused:
            RoutingTrace.read(path)
        assert "checksum" not in str(refused.value)
    rewrite(order)
    assert np.array_equal(RoutingTrace.read(path).expert_indices, labelled().expert_indices)
    rewrite(order, seal=False)
    with pytest.raises(ResultError, match=r"no checksum"):  # another writer, even of the same rows
        RoutingTrace.read(path)
