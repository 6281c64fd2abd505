"""Every measure against a loop over tokens, written from its definition, on routes of every awkward shape."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from moe_interp.errors import DataError
from moe_interp.traces import (
    RoutingCounts,
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
    usage_correlation,
    vocabulary_specialization,
)

SHAPES = {
    "plain": {},
    "empty slots": {"empty": 0.3},
    "native rows": {"native": 0.3},
    "both": {"empty": 0.4, "native": 0.4},
    "one token a sequence": {"lengths": [1] * 12, "empty": 0.2},
    "one sequence": {"lengths": [30]},
    "labels by token": {"labels": "token", "native": 0.2},
    "no labels": {"labels": None},
    "unused experts": {"used": 3, "empty": 0.2},
    "k = 1": {"k": 1, "empty": 0.2},
    "k = E": {"k": 6, "empty": 0.1},
    "one layer": {"n_layers": 1},
    "one expert": {"n_experts": 1, "k": 1, "used": 1, "empty": 0.3},
    "no weights": {"weights": False, "empty": 0.2},
    "a bare layer": {"bare": "native"},
    "a layer of empty slots": {"bare": "empty"},
    "int8": {"dtype": np.int8, "empty": 0.1},
    "int64": {"dtype": np.int64},
}


def awkward(
    seed=0,
    n_layers=4,
    n_experts=6,
    k=3,
    lengths=(7, 1, 12, 5, 1, 9),
    used=None,
    empty=0.0,
    native=0.0,
    labels="sequence",
    weights=True,
    bare=None,
    dtype=np.int32,
):
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    logits = rng.normal(size=(n, n_layers, n_experts)).astype(np.float32)
    if used:
        logits[..., used:] = -9 + 0.1 * logits[..., used:]
        k = min(k, used)
    indices = (-logits).argsort(axis=-1)[..., :k]
    values = rng.random(indices.shape).astype(np.float32)
    indices[rng.random(indices.shape) < empty] = -1
    indices[rng.random(indices.shape[:2]) < native] = -2
    if bare:
        indices[:, 0] = -2 if bare == "native" else -1
    names = ["law", "code", "math", "a domain of one sequence", "code", "law"]
    domain = {
        None: None,
        "sequence": (names * 9)[: len(lengths)],
        "token": rng.choice(["x", "y"], n).tolist(),
    }[labels]
    return RoutingTrace.from_arrays(
        indices.astype(dtype),
        values if weights else None,
        list(lengths),
        n_experts,
        layers=[3 * place + 1 for place in range(n_layers)],
        domain=domain,
        token_ids=rng.integers(0, 5, n),
        predicted_ids=rng.integers(0, 4, n),
        router_logits=logits,
        expert_norms=values * 2,
    )


def shuffled_parts(trace, seed=1):
    """Counts of each sequence by itself, merged in a random order and grouping."""
    rng = np.random.default_rng(seed)
    heaps = [RoutingCounts.of(trace.select(trace.sequence == i)) for i in rng.permutation(trace.sequence[-1] + 1)]
    while len(heaps) > 1:
        a = heaps.pop(int(rng.integers(len(heaps))))
        place = int(rng.integers(len(heaps)))
        heaps[place] = heaps[place].merge(a)
    return heaps[0]


@pytest.fixture(params=SHAPES, scope="module")
def case(request):
    trace = awkward(**SHAPES[request.param])
    return trace, (trace, RoutingCounts.of(trace), shuffled_parts(trace))


def slots(trace, token, place):
    """``[(expert, weight, norm)]`` of a token at a layer, in order of the slots."""
    weights = trace.expert_weights
    return [
        (
            int(e),
            None if weights is None else float(weights[token, place, s]),
            float(trace.expert_norms[token, place, s]),
        )
        for s, e in enumerate(trace.expert_indices[token, place])
        if e >= 0
    ]


def first(trace, token, place):
    found = slots(trace, token, place)
    if not found:
        return None
    return found[0][0] if found[0][1] is None else max(found, key=lambda slot: slot[1])[0]


def native(trace, token, place):
    return bool((trace.expert_indices[token, place] == -2).all())


def div(a, b):
    return a / b if b else math.nan


def nats(counts):
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts if c) if total else 0.0


def tokens_of(trace, domain=None):
    return [t for t in range(trace.n_tokens) if domain is None or trace.domain[t] == domain]


def same(found, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected, **({"rtol": 1e-9, "atol": 1e-12} | tolerance))


def test_load(case):
    trace, sources = case
    for source in sources:
        data = load(source)
        for place in range(len(trace.layers)):
            use = Counter(e for t in tokens_of(trace) for e, *_ in slots(trace, t, place))
            counts = [use[e] for e in range(trace.n_experts)]
            total = sum(counts)
            same(data["share"][place], [div(c, total) for c in counts])
            known = [t for t in tokens_of(trace) if not native(trace, t, place)]
            same(data["dropped_tokens"][place], div(sum(not slots(trace, t, place) for t in known), len(known)))
            same(data["dropped_slots"][place], 1 - div(total, len(known) * trace.n_slots))
            same(data["dead_experts"][place], counts.count(0))
            if total:
                same(data["entropy"][place], nats(counts))
                same(data["effective_experts"][place], math.exp(nats(counts)) / trace.n_experts)
                mean = total / trace.n_experts
                same(data["max_violation"][place], (max(counts) - mean) / mean)
            else:
                assert np.isnan([data[name][place] for name in ("entropy", "effective_experts", "max_violation")]).all()


def test_domain_specialization_and_committee(case):
    trace, sources = case
    if not trace.domains:
        return
    for source in sources:
        data, committee = domain_specialization(source), standing_committee(source)
        for place in range(len(trace.layers)):
            ranks = []
            for d, domain in enumerate(trace.domains):
                known = [t for t in tokens_of(trace, domain) if not native(trace, t, place)]
                use = Counter(e for t in known for e, *_ in slots(trace, t, place))
                same(data["share"][d, place], [div(use[e], len(known)) for e in range(trace.n_experts)])
                if not use:
                    assert np.isnan(committee["rank"][d, place]).all()
                    continue
                rank = [
                    sum(use[o] > use[e] for o in range(trace.n_experts))
                    + (sum(use[o] == use[e] for o in range(trace.n_experts)) + 1) / 2
                    for e in range(trace.n_experts)
                ]
                same(committee["rank"][d, place], rank)
                ranks.append([(r, use[e]) for e, r in enumerate(rank)])
            for e in range(trace.n_experts):
                present = [row[e][0] <= trace.n_slots and row[e][1] > 0 for row in ranks]
                same(committee["presence"][place, e], div(sum(present), len(ranks)))
                same(committee["mean_rank"][place, e], div(sum(row[e][0] for row in ranks), len(ranks)))


def test_esft_scores(case):
    trace, sources = case
    for source in sources:
        data = esft_scores(source)
        for place in range(len(trace.layers)):
            routed = [s for t in tokens_of(trace) if (s := slots(trace, t, place))]
            for e in range(trace.n_experts):
                score = sum(1 / len(s) for s in routed if e in [slot[0] for slot in s])
                same(data["token_score"][place, e], div(score, len(routed)))
                if trace.expert_weights is not None:
                    gate = sum(weight for s in routed for expert, weight, _ in s if expert == e)
                    same(data["gate_score"][place, e], div(gate, len(routed)))
        assert ("gate_score" in data) == (trace.expert_weights is not None)


def test_co_activation(case):
    trace, sources = case
    for source in sources:
        data, ranked = co_activation(source), co_activation(source, "adjacent")
        for place in range(len(trace.layers)):
            together, neighbours, alone = Counter(), Counter(), Counter()
            for t in tokens_of(trace):
                experts = [e for e, *_ in slots(trace, t, place)]
                alone.update(experts)
                together.update((a, b) for a in experts for b in experts)
                for a, b in pairwise(trace.expert_indices[t, place].tolist()):
                    if a >= 0 and b >= 0:
                        neighbours.update([(a, b), (b, a)])
            for i in range(trace.n_experts):
                row = [div(together[i, j], alone[i]) for j in range(trace.n_experts)]
                same(data["co_activation"][place, i], row)
                row = [div(neighbours[i, j], alone[i]) for j in range(trace.n_experts)]
                same(ranked["co_activation"][place, i], row)


def test_transitions(case):
    trace, sources = case
    if len(trace.layers) < 2:
        for source in sources:
            with pytest.raises(DataError, match="at least two layers"):
                transitions(source)
        return
    for source in sources:
        data = transitions(source)
        for place in range(len(trace.layers) - 1):
            pairs = Counter(
                (a, b)
                for t in tokens_of(trace)
                for a, *_ in slots(trace, t, place)
                for b, *_ in slots(trace, t, place + 1)
            )
            total = sum(pairs.values())
            rows, columns = Counter(), Counter()
            for (a, b), n in pairs.items():
                rows[a] += n
                columns[b] += n
            for a in range(trace.n_experts):
                same(data["probability"][place, a], [div(pairs[a, b], rows[a]) for b in range(trace.n_experts)])
            same(data["chance"][place], [div(columns[b], total) for b in range(trace.n_experts)])
            nat = sum(n / total * math.log(n * total / rows[a] / columns[b]) for (a, b), n in pairs.items())
            same(data["information"][place], nat if total else np.nan, atol=1e-9)


@pytest.mark.parametrize("ids", ["input", "next", "predicted"])
def test_vocabulary_specialization(case, ids):
    trace, sources = case
    if ids == "next" and trace.sequence_lengths.max() == 1:
        with pytest.raises(DataError, match="no such ids"):
            vocabulary_specialization(trace, ids, 1)
        return
    for least in (1, 4):
        expected = []
        for place in range(len(trace.layers)):
            by_id = defaultdict(Counter)
            for t in tokens_of(trace):
                number = {"input": trace.token_ids[t], "predicted": trace.predicted_ids[t]}.get(ids)
                if ids == "next":
                    follows = t + 1 < trace.n_tokens and trace.sequence[t + 1] == trace.sequence[t]
                    number = trace.token_ids[t + 1] if follows else None
                if number is not None and (expert := first(trace, t, place)) is not None:
                    by_id[number][expert] += 1
            shares = [max(c.values()) / sum(c.values()) for c in by_id.values() if sum(c.values()) >= least]
            expected.append(div(sum(shares), len(shares)))
        for source in sources:
            if np.isnan(expected).all():
                with pytest.raises(DataError, match=r"at most \d+ occurrences"):
                    vocabulary_specialization(source, ids, least)
            else:
                data = vocabulary_specialization(source, ids, least)
                same(data["specialization"], expected)
                assert (np.isnan(data["chance"].values) == np.isnan(expected)).all()


def test_paths(case):
    trace, sources = case
    if len(trace.layers) < 3:
        return
    for source in sources:
        data = expert_paths(source, top=4)
        for window in range(len(trace.layers) - 2):
            walked = [[first(trace, t, window + step) for step in range(3)] for t in tokens_of(trace)]
            counts = Counter(tuple(path) for path in walked if None not in path)
            most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:4]
            assert data["count"][window].values.tolist()[: len(most)] == [n for _, n in most]
            assert [tuple(path) for path in data["path"][window].values.tolist()[: len(most)]] == [p for p, _ in most]
            assert data["tokens"][window] == sum(counts.values())
            assert data["distinct"][window] == len(counts)


def test_norms_and_margins(case):
    trace, sources = case
    for source in sources:
        data, margins = expert_norms(source), router_margin(source)
        for place in range(len(trace.layers)):
            found = defaultdict(list)
            for t in tokens_of(trace):
                for e, weight, norm in slots(trace, t, place):
                    found[e].append((norm, weight))
            for e in range(trace.n_experts):
                same(data["norm"][place, e], div(sum(n for n, _ in found[e]), len(found[e])))
                if trace.expert_weights is not None:
                    same(data["saliency"][place, e], div(sum(n * w for n, w in found[e]), len(found[e])))
            gaps, least = [], []
            for t in tokens_of(trace):
                inside = [e for e, *_ in slots(trace, t, place)]
                outside = [e for e in range(trace.n_experts) if e not in inside]
                logits = trace.router_logits[t, place].astype(float)
                if inside and outside:
                    gaps.append(min(logits[inside]) - max(logits[outside]))
                if inside and trace.expert_weights is not None:
                    least.append(min(weight for _, weight, _ in slots(trace, t, place)))
            same(margins["margin"][place], div(sum(gaps), len(gaps)))
            same(margins["negative"][place], div(sum(g < 0 for g in gaps), len(gaps)))
            if trace.expert_weights is not None:
                same(margins["smallest_weight"][place], div(sum(least), len(least)))


def test_domain_differences(case):
    trace, sources = case
    lengths = np.bincount(trace.sequence)
    if len(trace.domains) < 2 or len(lengths) < 4 or trace.domains == ("x", "y"):
        return
    for source in sources:
        data = domain_differences(source, 49)
        for place in range(len(trace.layers)):
            table = np.zeros((len(trace.domains), trace.n_experts))
            for d, domain in enumerate(trace.domains):
                known = [t for t in range(trace.n_tokens) if not native(trace, t, place)]
                of, rest = ([t for t in known if (trace.domain[t] == domain) == inside] for inside in (True, False))
                for e in range(trace.n_experts):
                    has = [sum(e in [s[0] for s in slots(trace, t, place)] for t in group) for group in (of, rest)]
                    table[d, e] = has[0]
                    expected = div(has[0], len(of)) - div(has[1], len(rest))
                    same(data["difference"][d, place, e], expected)
            total = table.sum()
            expected = nats(table.sum(0)) + nats(table.sum(1)) - nats(table.ravel()) if total else np.nan
            same(data["information"][place], expected, atol=1e-9)


def test_saturation_and_use_of_two(case):
    trace, _ = case
    arrays = trace.arrays()
    rng = np.random.default_rng(7)
    k = trace.n_slots
    indices = np.argsort(rng.random((trace.n_tokens, len(trace.layers), trace.n_experts)), axis=2)[..., :k]
    indices[rng.random(indices.shape[:2]) < 0.2] = -2
    final = RoutingTrace.from_arrays(**arrays | {"expert_indices": indices, "router_logits": None})
    data = saturation(trace, final)
    for place in range(len(trace.layers)):
        shares = []
        for t in tokens_of(trace):
            now, then = ({e for e, *_ in slots(one, t, place)} for one in (trace, final))
            if then and not native(trace, t, place):
                shares.append(len(now & then) / len(then))
        same(data["saturation"][place], div(sum(shares), len(shares)))
    both = [
        usage_correlation(one, two)
        for one in (trace, RoutingCounts.of(trace))
        for two in (final, shuffled_parts(final))
    ]
    for found in both:
        assert found.identical(both[0])
