"""Tokens that a trace does not cover count nowhere: every measure is that of the trace without them."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from moe_interp.testbed.metrics import routing_metrics
from moe_interp.traces import (
    RoutingTrace,
    co_activation,
    domain_differences,
    domain_specialization,
    esft_scores,
    expert_norms,
    expert_paths,
    load,
    router_margin,
    saturation,
    standing_committee,
    transitions,
    vocabulary_specialization,
)
from tests.unit.traces.planted import planted_trace

MEASURES = {
    "load": load,
    "co_activation": co_activation,
    "transitions": transitions,
    "standing_committee": standing_committee,
    "domain_specialization": domain_specialization,
    "vocabulary_specialization": vocabulary_specialization,
    "predicted vocabulary": lambda trace: vocabulary_specialization(trace, "predicted"),
    "esft_scores": esft_scores,
    "routing_metrics": lambda trace: routing_metrics(trace, cross_fit=False).set_index("layer").to_xarray(),
}


# measures over sequences, or of fields that the planted trace lacks
OF_SEQUENCES = {
    "expert_norms": expert_norms,
    "router_margin": router_margin,
    "expert_paths": lambda trace: expert_paths(trace, 2),
    "domain_differences": lambda trace: domain_differences(trace, 99),
}


@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_a_measure_over_sequences_does_not_count_what_is_not_covered(name):
    rng, measure = np.random.default_rng(3), OF_SEQUENCES[name]
    planted = planted_trace()
    shape = planted.expert_indices.shape
    fields = {"expert_norms": rng.random(shape), "router_logits": rng.normal(size=(*shape[:2], 6))}
    whole = RoutingTrace.from_arrays(**planted.arrays() | fields)
    covered = rng.random(whole.n_tokens) < 0.7
    expected = measure(whole.select(covered))
    xr.testing.assert_allclose(measure(without(whole, covered)), expected, rtol=1e-9)
    with pytest.raises(AssertionError):
        xr.testing.assert_allclose(measure(whole), expected, rtol=1e-9)


def without(trace: RoutingTrace, covered) -> RoutingTrace:
    return RoutingTrace.from_arrays(**trace.arrays(), covered=covered)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_does_not_count_what_is_not_covered(name):
    whole, measure = planted_trace(), MEASURES[name]
    covered = np.random.default_rng(1).random(whole.n_tokens) < 0.7
    expected = measure(whole.select(covered))
    xr.testing.assert_allclose(measure(without(whole, covered)), expected, rtol=1e-12)
    with pytest.raises(AssertionError):  # the tokens left out would have counted
        xr.testing.assert_allclose(measure(whole), expected, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in MEASURES if name not in ("transitions",)])
def test_a_token_that_is_covered_at_one_layer_only_counts_there(name):
    whole, measure = planted_trace(), MEASURES[name]
    covered = np.random.default_rng(1).random((whole.n_tokens, 2)) < 0.7
    found = measure(without(whole, covered))
    for column, layer in enumerate(whole.layers):
        expected = measure(whole.select(covered[:, column])).sel(layer=layer)
        for variable in expected.data_vars:
            if "layer" in found[variable].dims:  # `tokens` of a domain is of all layers
                ids = {"token_id": expected["token_id"]} if "token_id" in expected[variable].dims else {}
                xr.testing.assert_allclose(found[variable].sel(layer=layer, **ids), expected[variable], rtol=1e-12)


def test_saturation_compares_tokens_that_both_traces_cover():
    trace, final = planted_trace(0), planted_trace(1)
    final = RoutingTrace.from_arrays(**{**final.arrays(), "token_ids": trace.token_ids})
    one, other = np.random.default_rng(2).random((2, trace.n_tokens)) < 0.8
    expected = saturation(trace.select(one & other), final.select(one & other))
    xr.testing.assert_allclose(saturation(without(trace, one), without(final, other)), expected, rtol=1e-12)


def test_a_layer_that_is_covered_nowhere_has_no_numbers():
    whole = planted_trace()
    covered = np.ones((whole.n_tokens, 2), bool)
    covered[:, 1] = False
    trace = without(whole, covered)
    for name in MEASURES:
        if name not in ("transitions", "routing_metrics"):
            found, last = MEASURES[name](trace), whole.layers[1]
            for variable, values in found.sel(layer=last).data_vars.items():
                if values.dtype.kind == "f" and "layer" in found[variable].dims:
                    assert np.isnan(values).all(), (name, variable)
