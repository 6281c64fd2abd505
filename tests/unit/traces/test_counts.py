"""Counts of a corpus: parts add up to the whole, exactly; files; refusals."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from moe_interp.errors import ConfigError, DataError, ResultError
from moe_interp.traces import RoutingCounts, RoutingTrace
from moe_interp.traces.tallies.fixed_point import as_float, fixed_point_sums
from moe_interp.traces.tallies.part import co_occurrences
from tests.unit.traces.planted import planted_trace, routes


def contents(counts):
    arrays = {name: counts.array(name) for name in [*counts._arrays, *counts._rows]}
    for name in counts._sparse:
        arrays[f"{name} codes"], arrays[f"{name} counts"] = counts.sparse(name)
    return arrays


def assert_same(one, other, rows=True):
    first, second = contents(one), contents(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        if rows or not name.startswith("row_"):
            np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert (one.domains, one.n_sequences, one.fields) == (other.domains, other.n_sequences, other.fields)


def parts_of(trace, *cuts):
    edges = [0, *cuts, len(trace.sequence_lengths)]
    return [trace.select((trace.sequence >= a) & (trace.sequence < b)) for a, b in pairwise(edges)]


def test_parts_add_up_to_the_whole_in_every_order_and_grouping():
    trace = planted_trace(n_layers=4)
    whole = RoutingCounts.of(trace)
    parts = parts_of(trace, 1, 2, 3)
    streamed = RoutingCounts(trace.layers, 6)
    for part in parts:
        streamed.update(part)
    assert_same(streamed, whole)
    halves = [RoutingCounts(trace.layers, 6) for _ in range(2)]
    for half, some in zip(halves, (parts[:2], parts[2:])):
        for part in some:
            half.update(part)
    assert_same(halves[0].merge(halves[1]), whole)
    backwards = RoutingCounts(trace.layers, 6)
    for part in reversed(parts):
        backwards.update(part)
    assert_same(backwards, whole, rows=False)
    assert streamed.merge(RoutingCounts(trace.layers, 6)) is streamed


def test_parts_of_other_widths_and_domains_add_up():
    trace = planted_trace()
    parts = parts_of(trace, 1)
    narrow = RoutingTrace.from_arrays(parts[0].expert_indices[..., :2], None, [30], 6, trace.layers, ["law"])
    wide = RoutingTrace.from_arrays(parts[1].expert_indices, None, [30] * 3, 6, trace.layers, parts[1].domain)
    counts = RoutingCounts.of(narrow).merge(RoutingCounts.of(wide))
    assert counts.domains == ("code", "law", "math")
    assert_same(counts, RoutingCounts.of(RoutingTrace.concatenate([narrow, wide])))


def test_use_agrees_with_loops():
    trace = planted_trace()
    counts = RoutingCounts.of(trace)
    for place in range(2):
        expected = Counter()
        for domain, route in zip(trace.domain, routes(trace, place)):
            expected.update((domain, len(route), expert) for expert in route)
        served = counts.array("served")[:, place]
        found = {(counts.domains[d], int(w), int(e)): int(served[d, w, e]) for d, w, e in np.argwhere(served)}
        assert found == expected
    np.testing.assert_array_equal(counts.slots, trace.counts(trace.domain_codes, 3))
    np.testing.assert_array_equal(counts.array("row_slots"), trace.counts(trace.sequence, 4))
    assert counts.n_tokens == 120
    np.testing.assert_array_equal(counts.tokens.sum(axis=0), [120, 120])


def test_a_sequence_of_several_domains_is_a_row_for_each():
    trace = RoutingTrace.from_arrays([[[0]], [[1]], [[0]]], None, [2, 1], 2, domain=["b", "a", "a"])
    counts = RoutingCounts.of(trace)
    assert counts.array("row_sequence").tolist() == [0, 0, 1]
    assert counts.array("row_domain").tolist() == [0, 1, 0]
    assert counts.array("row_slots")[:, 0].tolist() == [[0, 1], [1, 0], [1, 0]]


def test_fixed_point_sums_are_exact_and_of_no_order():
    rng = np.random.default_rng(0)
    values = (rng.random(500) * 10.0 ** rng.integers(-6, 8, 500)).astype(np.float32).astype(np.float64)
    values[::7] *= -1
    codes = rng.integers(0, 3, 500)
    found = fixed_point_sums(codes, values, 3, "values")
    order = rng.permutation(500)
    np.testing.assert_array_equal(found, fixed_point_sums(codes[order], values[order], 3, "values"))
    for code in range(3):
        exact = sum(Fraction(round(Fraction(float(v)) * 2**52), 2**52) for v in values[codes == code])
        assert as_float(found)[code] == pytest.approx(float(exact), rel=1e-15)
        assert abs(Fraction(int(found[code, 0]), 2**20) + Fraction(int(found[code, 1]), 2**52) - exact) == 0
    with pytest.raises(DataError, match=r"weights of 1e\+10"):
        fixed_point_sums(codes[:1], np.array([1e10]), 3, "weights")


def test_wide_routes_are_counted_as_narrow_ones():
    rng = np.random.default_rng(1)
    one, other = (rng.random((5000, 24)).argsort(axis=1)[:, :18] for _ in range(2))
    one[rng.random(one.shape) < 0.2] = -1
    expected = np.zeros((2, 24, 24), dtype=int)
    for a, b in zip(one, other):
        np.add.at(expected[0], np.ix_(a[a >= 0], b), 1)
        np.add.at(expected[1], np.ix_(a[a >= 0], a[a >= 0]), 1)
    np.testing.assert_array_equal(co_occurrences(one, other, 24), expected[0])
    np.testing.assert_array_equal(co_occurrences(one, one, 24), expected[1])


def test_counts_are_saved_and_loaded(tmp_path):
    counts = RoutingCounts.of(planted_trace(n_layers=4))
    path = counts.save(tmp_path / "counts.npz")
    assert_same(RoutingCounts.load(path), counts)
    assert_same(
        RoutingCounts.load(path).update(planted_trace(1, n_layers=4)), counts.update(planted_trace(1, n_layers=4))
    )
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ResultError, match="routing counts"):
        RoutingCounts.load(path)
    with pytest.raises(ResultError, match="routing counts"):
        RoutingCounts.load(planted_trace().save(tmp_path / "trace.npz"))


def test_counts_of_others():
    counts = RoutingCounts.from_counts(
        [[[2, 1, 1]], [[0, 3, 3]]], [2, 3], 2, [7], ["b", "a"], [[[2, 0, 0]], [[0, 3, 0]]]
    )
    assert counts.domains == ("a", "b")
    assert counts.slots.tolist() == [[[0, 3, 3]], [[2, 1, 1]]]
    assert counts.tokens.tolist() == [[3], [2]]
    assert counts.array("top1").tolist() == [[[0, 3, 0]], [[2, 0, 0]]]
    assert RoutingCounts.from_counts([[2, 1, 1]], 2, 2).domains == ()
    for slots, tokens, text in [
        ([[3, 1]], 2, "at most n_tokens for an expert"),
        ([[2, 2, 1]], 2, "n_tokens \\* n_slots for a layer"),
        ([[0.5, 1]], 2, "counts \\[domain, layer, expert\\]"),
        ([[[1, 1]], [[1, 1]]], 2, "a name of its own"),
    ]:
        with pytest.raises(DataError, match=text):
            RoutingCounts.from_counts(slots, tokens, 2)
    with pytest.raises(DataError, match="without row_slots"):
        counts.array("row_slots")


def test_counts_refuse_other_models_and_fields():
    trace = planted_trace()
    counts = RoutingCounts.of(trace)
    with pytest.raises(DataError, match="the same layers, experts, tables"):
        counts.update(planted_trace(n_experts=7))
    with pytest.raises(DataError, match="some have expert_weights and some have not"):
        counts.update(RoutingTrace.from_arrays(**trace.arrays() | {"expert_weights": None}))
    with pytest.raises(ConfigError, match="table 'weighs'"):
        RoutingCounts([0], 4, ["weighs"])
    with pytest.raises(ConfigError, match="shorter paths"):
        RoutingCounts(range(30), 256, path_length=8)
    assert_same(counts, RoutingCounts.of(trace))
