"""Counterfactual routes of sequences: exact, the same however they are batched, and resumed; and known truths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import moe_interp as mi
from moe_interp.engine.recorded_pass import record_pass
from moe_interp.errors import ConfigError, DataError, HookError, ResultError
from moe_interp.experiments.counterfactual.data import CounterfactualPlan
from moe_interp.experiments.counterfactual.experiment import first_new, matches
from moe_interp.experiments.inputs.items import Item
from moe_interp.experiments.inputs.repeats import RepeatedContentWarning
from moe_interp.experiments.inputs.sequences import SequenceBatch, read_sequences
from moe_interp.hooks.attach import MoEHooks, attach
from moe_interp.results.cells import DamagedCellWarning
from moe_interp.routes import AllSubsets, GumbelTopK, RouteSampler, SlowRoutesWarning, TokenKeys, UniformSubsets
from tests import tiny


@pytest.fixture(scope="module")
def moe() -> MoEHooks:
    return attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer()))


def sequences(lengths: tuple[int, ...] = (9, 5, 7, 12)) -> list[dict[str, Any]]:
    return [
        {"id": f"s{n}", "tokens": tiny.random_tokens(1, length, seed=n)[0].tolist()} for n, length in enumerate(lengths)
    ]


def run(moe: MoEHooks, given: Any, **options: Any) -> mi.CounterfactualResult:
    return mi.counterfactual_routes(moe, given, **{"n_routes": 5, "progress": False, **options})


def assert_equal(one: xr.Dataset, other: xr.Dataset, tolerance: float = 2e-5) -> None:
    """Routes to the last one; scores up to rounding."""
    for name in {*one.variables} | {*other.variables}:
        left, right = one[name].values, other[name].values
        if left.dtype.kind == "f":
            np.testing.assert_allclose(left, right, atol=tolerance, err_msg=str(name))
        else:
            np.testing.assert_array_equal(left, right, err_msg=str(name))


def test_scores_are_those_of_score_routes_and_of_full_forward_passes(moe: MoEHooks) -> None:
    given = sequences()
    data = run(moe, given).data
    assert data.attrs["method"] == {str(layer): "branch" for layer in moe.layers}
    assert data.attrs["null_distance"] < 2e-5
    for sequence in given:
        rows = data.isel(token=data["sequence"].values == sequence["id"])
        tokens = torch.tensor([sequence["tokens"]])
        assert rows["pos"].values.tolist() == list(range(tokens.shape[1] - 1))
        assert rows["target_id"].values.tolist() == sequence["tokens"][1:]
        plain = moe.bridge(tokens).log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
        np.testing.assert_allclose(rows["logp_standard"], plain.detach(), atol=1e-5)
        for layer in moe.layers:
            routes = torch.from_numpy(rows["route"].sel(layer=layer).values.astype(np.int64))[None]
            padded = torch.cat([routes, routes[:, -1:]], dim=1)  # the last token's are not scored
            scores = mi.score_routes(moe, tokens, layer, padded)[0, :-1]
            np.testing.assert_allclose(rows["logp"].sel(layer=layer), scores, atol=2e-5)
    naive = run(moe, given[1:2], method="naive")
    assert naive.data.attrs["method"] == {str(layer): "naive" for layer in moe.layers}
    assert_equal(naive.data, run(moe, given[1:2]).data)


def test_controls_are_what_they_say(moe: MoEHooks) -> None:
    data = run(moe, sequences(), n_routes=12).data
    main, second = data["route"].values, data["second_route"].values
    assert (
        data["logp"].notnull().all() & data["logp_second"].notnull().all() & data["logp_random"].notnull().all()
    ).item()
    # of 28 sets, some come up in both draws, and then score alike
    again = np.argwhere(second >= 0)
    assert 0 < len(again) < second.size
    for token, layer, route in again:
        same = data["logp"].values[token, layer, second[token, layer, route]]
        assert data["logp_second"].values[token, layer, route] == same
    routes = np.sort(main, -1)
    assert all(len(np.unique(r, axis=0)) == 12 for r in routes.reshape(-1, 12, 2))
    assert not (routes == np.sort(data["standard_route"].values, -1)[:, :, None]).all(-1).any()
    policy = moe.bridge(torch.tensor([sequences()[0]["tokens"]])).double().log_softmax(-1)[0, :-1]
    entropy = -(policy.exp() * policy).sum(-1).detach()
    np.testing.assert_allclose(data["entropy"][: len(entropy)], entropy, atol=1e-5)
    # a target drawn from the prediction is as likely as the prediction is sure
    many = run(moe, tiny.random_tokens(60, 20), n_routes=1, layers=[2]).data
    error = float((many["logp_own_standard"] + many["entropy"]).mean())
    assert abs(error) < 4 * float((many["logp_own_standard"] + many["entropy"]).std()) / 1140**0.5
    assert float((many["logp_standard"] + many["entropy"]).mean()) < -0.1  # the realized tokens are random ones


def test_fewer_routes_are_the_first_of_a_run_with_more(moe: MoEHooks) -> None:
    given = tiny.random_tokens(8, 12)
    more = run(moe, given, n_routes=12, layers=[0, 2])
    curve = more.regret_curve()
    for n in (1, 4):
        fewer = run(moe, given, n_routes=n, layers=[0, 2])
        np.testing.assert_array_equal(fewer.data["route"], more.data["route"][:, :, :n])
        table = fewer.controls().set_index("kind")
        here = curve[curve["n"] == n].set_index("kind")
        assert set(here.index) == set(table.index) == {"router", "random", "own_prediction", "fresh_draw", "null"}
        for name in ("regret", "router_regret", "matched"):
            np.testing.assert_allclose(here.loc[table.index, name], table[name], atol=1e-5, err_msg=name)
        kept = ["gap", "regret", "positive_rate", "inclusion_1", "inclusion_5"]
        np.testing.assert_allclose(more.by_layer(n)[kept], fewer.by_layer()[kept], atol=1e-5)


def test_second_and_uniform_routes_are_drawn_by_their_laws(moe: MoEHooks) -> None:
    """Scored here again from the samplers and the streams, by hand."""
    given = tiny.random_tokens(3, 10)
    data = run(moe, given, n_routes=6, layers=[1]).data
    plan = CounterfactualPlan("", "", "", (1,), "", 6, 12, 6, 0, "auto", ())
    read = read_sequences(moe.bridge, given)
    batch = SequenceBatch.build(read, torch.device("cpu"))
    base = record_pass(moe, batch.tokens, [1])
    row, pos = batch.wanted.nonzero().unbind(-1)
    ranking, standard = (
        moe.spec(1).rule.choice_logits(base.router_logits[1])[batch.wanted],
        base.indices[1][batch.wanted],
    )
    draws: list[tuple[str, RouteSampler, int]] = [("main", GumbelTopK(), 6), ("second", GumbelTopK(), 12)]
    draws.append(("random", UniformSubsets(), 6))
    for name, sampler, n in draws:
        keys = TokenKeys(plan.stream(name), 1, batch.keys[row], pos)
        drawn = sampler.sample(ranking, standard, n, keys)
        if name == "second":
            np.testing.assert_allclose(data["second_share"][:, 0], drawn.share_other)
            known = torch.from_numpy(data["route"].values[:, 0].astype(np.int64))
            np.testing.assert_array_equal(data["second_route"][:, 0], matches(drawn.indices, known))
        routes = torch.full((*batch.wanted.shape, n, 2), -1)
        routes[batch.wanted] = drawn.indices
        scores = mi.score_routes(moe, batch.tokens, 1, routes)[batch.wanted]
        stored = {"main": "logp", "second": "logp_second", "random": "logp_random"}[name]
        np.testing.assert_allclose(data[stored][:, 0], scores, atol=2e-5, err_msg=name)


def test_the_drawn_target_has_scores_of_its_own_and_differs_between_sequences(moe: MoEHooks) -> None:
    # one sequence twice, but for its last token: the same predictions, other draws of the next token
    tokens = tiny.random_tokens(1, 40)[0].tolist()
    data = run(moe, [tokens, [*tokens[:-1], (tokens[-1] + 1) % 90 + 5]], n_routes=4, layers=[2]).data
    first, second = data["logp_own_standard"].values[:38], data["logp_own_standard"].values[39:-1]
    np.testing.assert_allclose(data["entropy"].values[:38], data["entropy"].values[39:-1], atol=1e-6)
    assert (np.abs(first - second) > 1e-3).mean() > 0.5
    np.testing.assert_allclose(data["logp_own_null"][:, 0], data["logp_own_standard"], atol=2e-5)
    differs = np.abs(data["logp_own_standard"] - data["logp_standard"]).values > 0.1
    assert differs.sum() > 20
    for of_own, of_realized in (("logp_own", "logp"), ("logp_own_second", "logp_second")):
        # routes of a tiny model change little: its scores of a target lie about those of the standard route
        values = data[of_own].values[differs, 0]
        near = np.abs(values - data["logp_own_standard"].values[differs, None])
        far = np.abs(data[of_realized].values[differs, 0] - data["logp_own_standard"].values[differs, None])
        assert np.nanmedian(near) < np.nanmedian(far) / 2


def test_only_so_many_new_routes_of_the_second_draw_are_scored() -> None:
    known = torch.tensor([[[0, 1], [2, 3]]])
    drawn = torch.tensor([[[4, 5], [3, 2], [0, 4], [1, 5], [1, 0], [2, 5]]])
    kept = first_new(drawn, known, 2)
    assert kept.tolist() == [[[4, 5], [3, 2], [0, 4], [-1, -1], [1, 0], [-1, -1]]]
    assert matches(kept, known).tolist() == [[-1, 1, -1, -1, 0, -1]]


def test_heating_is_kept(moe: MoEHooks) -> None:
    assert bool((run(moe, sequences()).data["heating"] == 1).all())
    cold = run(moe, sequences(), sampler=GumbelTopK(tau=1e-3)).data["heating"]
    assert bool((cold > 1).any())
    assert cold.dims == ("token", "layer")


def test_batching_order_and_names_change_nothing(moe: MoEHooks, monkeypatch: pytest.MonkeyPatch) -> None:
    given = sequences()
    together = run(moe, given).data
    free = "moe_interp.experiments.counterfactual.experiment.tokens_per_pass"
    monkeypatch.setattr(free, lambda moe, width, budget, **kept: width)
    alone = run(moe, given)
    assert len(alone.manifest.config["batches"]) == 4
    assert_equal(alone.data, together)
    turned = run(moe, given[::-1]).data
    assert_equal(turned.sortby("sequence"), together.sortby("sequence"))
    renamed = run(moe, [sequence["tokens"] for sequence in given]).data
    assert renamed["sequence"].values.tolist()[0] == "0"
    assert_equal(renamed.drop_vars("sequence"), together.drop_vars("sequence"))
    assert not np.array_equal(run(moe, given, seed=1).data["route"], together["route"])


def test_masks_choose_the_predicted_tokens(moe: MoEHooks) -> None:
    tokens = tiny.random_tokens(1, 8)[0].tolist()
    whole = run(moe, [tokens]).data
    for chosen in ({"score_from": 5}, {"mask": [0, 0, 0, 0, 0, 1, 1, 1]}, {"mask": np.arange(8) >= 5}):
        part = run(moe, [{"id": "0", "tokens": tokens} | chosen]).data
        assert part["pos"].values.tolist() == [4, 5, 6]
        assert_equal(part, whole.isel(token=slice(4, 7)))
    item = Item("q", "d", tuple(tokens[:5]), tuple(tokens[5:]))
    assert_equal(run(moe, [item]).data.drop_vars("sequence"), whole.isel(token=slice(4, 7)).drop_vars("sequence"))
    text = run(moe, ["w3 w4 w5"]).data
    assert text["token_id"].values.tolist() == [1, 3, 4]  # the tokenizer's <bos> first
    assert text["target_text"].values.tolist() == ["w3", "w4", "w5"]


def test_an_interrupted_run_goes_on_and_keeps_what_was_finished(
    moe: MoEHooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = "moe_interp.experiments.counterfactual.experiment.tokens_per_pass"
    monkeypatch.setattr(free, lambda moe, width, budget, **kept: 14)
    given, store = sequences(), tmp_path / "cells"
    whole = run(moe, given).data

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(moe, given, store=store, progress=stop)
    finished = {file.name: file.stat().st_mtime_ns for file in store.glob("*.npz")}
    assert len(finished) == 4 + 2  # and what two batches have in common
    (store / "0-2.npz").write_bytes(b"cut off")
    with pytest.warns(DamagedCellWarning, match=r"0-2\.npz is computed again"):
        resumed = run(moe, given, store=store)
    assert all((store / name).stat().st_mtime_ns == time for name, time in finished.items() if name != "0-2.npz")
    assert_equal(resumed.data, whole, 0.0)
    with pytest.raises(ResultError, match="n_routes=5 there, 6 here"):
        run(moe, given, store=store, n_routes=6)


def test_a_run_goes_on_with_other_memory_free_but_not_with_other_weights(
    moe: MoEHooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = "moe_interp.experiments.counterfactual.experiment.tokens_per_pass"
    monkeypatch.setattr(free, lambda moe, width, budget, **kept: 14)
    store = tmp_path / "cells"
    first = run(moe, sequences(), store=store).data
    monkeypatch.setattr(free, lambda moe, width, budget, **kept: 1000)
    monkeypatch.setattr("moe_interp.experiments.counterfactual.experiment.record_pass", lambda *args: 1 / 0)
    assert_equal(run(moe, sequences(), store=store).data, first, 0.0)  # nothing is computed again
    with pytest.raises(ResultError, match="memory_budget: other batches"):
        run(moe, sequences(), store=store, memory_budget=2**30)
    tuned = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer()))
    with torch.no_grad():
        tuned.bridge.original_model.model.layers[1].mlp.gate.weight.mul_(1.001)
    with pytest.raises(ResultError, match="weights: "):
        run(tuned, sequences(), store=store)
    half = attach(tiny.build_bridge(tiny.build_hf("olmoe", dtype=torch.bfloat16), "olmoe", tiny.tiny_tokenizer()))
    with pytest.raises(ResultError, match=r"the model's number format: 'float32' there, 'bfloat16' here; .*weights: "):
        run(half, sequences(), store=store)


def test_a_result_survives_its_file(moe: MoEHooks, tmp_path: Path) -> None:
    result = run(moe, sequences())
    loaded = mi.load_result(result.save(tmp_path / "routes.nc"))
    assert isinstance(loaded, mi.CounterfactualResult)
    assert_equal(loaded.data, result.data, 0.0)
    assert loaded.by_confidence().equals(result.by_confidence())
    assert loaded.summary() == result.summary()
    assert loaded.data.attrs["sampler"] == "GumbelTopK(tau=1.0, pool=None)"


def test_few_routes_are_exhausted_and_controls_can_be_left_out(moe: MoEHooks) -> None:
    data = run(moe, sequences(), n_routes=40, sampler=AllSubsets(), controls=False, layers=[-1]).data
    assert data["layer"].values.tolist() == [2]
    assert bool(data["exhausted"].all())
    assert (data["logp"].notnull().sum("route") == 27).all()
    assert "logp_random" not in data
    best = run(moe, sequences(), n_routes=4, sampler=GumbelTopK(pool=3), layers=[2]).data
    assert (best["logp"].notnull().sum("route") == 2).all()  # three sets of two, less the standard one
    assert (best["logp_random"].notnull().sum("random") == 4).all()  # uniform sets know of no pool


def test_random_weights_have_a_gap_that_the_controls_bring_to_zero(moe: MoEHooks) -> None:
    table = run(moe, tiny.random_tokens(80, 16), n_routes=12).controls().set_index("kind")
    assert table.loc["router", "regret_low"] > 0.1
    assert table.loc["router", "gap_low"] > 0.001
    for kind in ("own_prediction", "fresh_draw"):
        for measure in ("gap", "regret"):
            row = table.loc[kind]
            assert row[f"excess_{measure}_low"] < 0 < row[f"excess_{measure}_high"], (kind, measure)
            width = row[f"excess_{measure}_high"] - row[f"excess_{measure}_low"]
            assert width < 0.3 * table.loc["router", measure]  # zero, and not for want of data
    assert table.loc["null", "regret"] < 1e-5


# -- a planted truth -----------------------------------------------------------------------------------------------


def planted_router(moe: MoEHooks, tokens: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[expert, d_model]`` for the last router that send each token to its best two experts, but the ``wrong``
    ones to their worst; the regret of these, in nats, is returned beside.

    Logits are nearly even, so that every pair of experts has even weights and the utility it has with these; with
    fewer tokens than dimensions, such rows exist for any wish.
    """
    pairs = torch.combinations(torch.arange(8), 2)
    routes = pairs.expand(1, tokens.shape[1], -1, -1)
    even = moe.spec(2).rule.weights(torch.zeros(len(pairs), 8), pairs).expand(routes.shape)
    scores = mi.score_routes(moe, tokens, 2, routes, weights=even)[0, :-1]
    wanted = torch.where(wrong, scores.argmin(-1), scores.argmax(-1))
    logits = torch.zeros(len(wanted), 8).scatter_(1, pairs[wanted], 1e-3)
    seen: list[Tensor] = []
    with torch.no_grad():
        moe.bridge.run_with_hooks(tokens, fwd_hooks=[(moe.hook_name("router_in", 2), lambda x, hook: seen.append(x))])
    hidden = seen[0].reshape(-1, seen[0].shape[-1])[:-1].double()
    rows = (torch.linalg.pinv(hidden) @ logits.double()).T
    assert torch.allclose(hidden @ rows.T, logits.double(), atol=1e-8)
    return rows.float(), torch.where(wrong, scores.amax(-1) - scores.amin(-1), 0.0)


def test_regret_is_exactly_where_the_last_router_was_turned_away_from_the_best_experts() -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    tokens = tiny.random_tokens(1, 25)
    wrong = torch.zeros(24, dtype=torch.bool)
    wrong[[2, 3, 8, 13, 21]] = True
    rows, regret = planted_router(moe, tokens, wrong)
    gate = moe.bridge.original_model.model.layers[2].mlp.gate
    with torch.no_grad():
        gate.weight.copy_(rows)
    result = run(moe, tokens, layers=[2], n_routes=27, sampler=AllSubsets())
    found = result.token_table()["regret"].to_numpy()
    assert regret[wrong].min() > 0.05
    np.testing.assert_allclose(found, regret, atol=2e-3)
    assert found[~wrong.numpy()].max() < 1e-3
    assert set(np.flatnonzero(found > 0.01)) == set(np.flatnonzero(wrong))


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no sequence"),
        ("w3 w4", "one text"),
        ([[3, 4], {"id": "0", "tokens": [3, 4]}], "sequence id '0' more than once"),
        ([{"id": "long", "tokens": [3] * 65}, [3, 4]], "sequence 'long': 65 tokens"),
        ([[3, 4], [5]], "sequence '1': no token to score among 1"),
        ([{"id": "a", "tokens": [3, 4, 5], "mask": [1, 0, 0]}], "sequence 'a': no token to score"),
        ([{"id": "a", "tokens": [3, 4, 5], "score_from": 3}], "sequence 'a': no token to score"),
        ([{"id": "a", "tokens": [3, 4, 5], "score_from": -1}], "score_from=-1"),
        ([{"id": "a", "tokens": [3, 4, 5], "mask": [1, 0]}], r"a mask of shape \(2,\)"),
        ([{"id": "a", "tokens": [3, 4, 5], "mask": [0, 2, 0]}], r"values \[0, 2\]"),
        ([{"id": "a"}], r"sequence 'a' with the fields \['id'\]"),
        ([{"id": "a", "text": "w3", "tokens": [3]}], r"fields \['id', 'text', 'tokens'\]"),
        ([{"id": "a", "tokens": [3, 4, 101]}], "sequence 'a': token id 101 in tokens. Expected: ids from 0 to 100"),
        ([[0.5, 1.0]], "sequence '0': tokens .* of type list"),
        ([{"id": "a\0", "tokens": [3, 4]}, {"id": "a", "tokens": [3, 4]}], "id .* with the control character"),
        ([{"id": "\ud800", "tokens": [3, 4]}], "id .* with the half of a surrogate pair"),
        ([{"id": "a", "text": "w3 \udc00"}], r"sequence 'a': text with '\\udc00', half of a surrogate pair"),
    ],
)
def test_sequences_that_cannot_be_scored(moe: MoEHooks, given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(moe, given)


def test_options_that_make_no_sense(moe: MoEHooks, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n_routes=0"):
        run(moe, sequences(), n_routes=0)
    with pytest.raises(ConfigError, match=r"n_routes=2\.5"):
        run(moe, sequences(), n_routes=2.5)
    with pytest.raises(ConfigError, match=r"a sampler, such as GumbelTopK\(\)"):
        run(moe, sequences(), sampler=GumbelTopK)
    with pytest.raises(ConfigError, match=r"seed=.*64 bits"):
        run(moe, sequences(), seed=2**64)
    with pytest.raises(HookError, match="layer 9"):
        run(moe, sequences(), layers=[9])
    for pool in (1, 2):
        with pytest.raises(ConfigError, match=f"pool={pool} of a model that takes 2 experts a token.*more than 2"):
            run(moe, sequences(), sampler=GumbelTopK(pool=pool), store=tmp_path / "store")
    with pytest.raises(ConfigError, match="method='best'"):
        run(moe, sequences(), method="best", store=tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(DataError, match="the model has no tokenizer"):
        run(attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe")), ["w3 w4"])
    dense = attach(tiny.build_bridge(tiny.build_hf("qwen3_moe"), "qwen3_moe"))
    with pytest.raises(HookError, match="layer 0"):
        run(dense, sequences(), layers=[0])
    with pytest.raises(ConfigError, match="encoder-decoder"):
        run(attach(tiny.build_bridge(tiny.build_hf("switch_transformers"), "switch_transformers")), sequences())


def test_log_probabilities_that_are_not_finite_name_sequence_position_and_route() -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    given = sequences()
    hidden = moe.bridge.original_model.get_output_embeddings().weight
    with torch.no_grad():
        hidden[given[2]["tokens"][4]] = float("nan")
    with pytest.raises(DataError, match="of sequence 's3', position 0 under the standard route"):
        run(moe, given)
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe"))
    tokens = [{"id": "one", "tokens": given[0]["tokens"][:3]}]
    used = run(moe, tokens, controls=False).data["standard_route"].sel(layer=1).values
    unused = next(expert for expert in range(8) if expert not in used)
    with torch.no_grad():
        moe.bridge.original_model.model.layers[1].mlp.experts.down_proj[unused] = float("inf")
    wrong = rf"of sequence 'one', position \d under route \d+ \(experts by layer: {{1: \[.*{unused}"
    with pytest.warns(SlowRoutesWarning), pytest.raises(DataError, match=wrong):
        run(moe, tokens, layers=[1], n_routes=20)


def test_sequences_of_the_same_tokens_count_once(moe: MoEHooks) -> None:
    given = sequences()
    again = [*given, {"id": "again", "tokens": given[1]["tokens"]}]
    with pytest.warns(RepeatedContentWarning, match="again"):
        found = run(moe, again, layers=[2])
    assert found.data.attrs["merged"] == {"s1": ["again"]}
    assert_equal(found.data, run(moe, given, layers=[2]).data)
    assert "of 4 sequences (1 more with the same content are not counted)" in found.summary()


def test_stores_and_results_of_another_law_of_the_sampler_are_refused(moe: MoEHooks, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_interp.experiments.counterfactual.data.CELLS_VERSION", 2)
        result = run(moe, sequences((4,)), n_routes=1, layers=[1], controls=False, store=tmp_path / "cells")
    with pytest.raises(ResultError, match="version=2 there, 3 here"):
        run(moe, sequences((4,)), n_routes=1, layers=[1], controls=False, store=tmp_path / "cells")
    old = result.save(tmp_path / "old.nc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mi.CounterfactualResult, "version", mi.CounterfactualResult.version + 1)
        with pytest.raises(ResultError, match="or run the experiment again"):
            mi.load_result(old)
