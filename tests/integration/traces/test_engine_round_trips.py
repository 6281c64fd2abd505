"""Routes written as an engine writes them, read and replayed: the model gives the very logits of the recorded run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_interp.errors import ConfigError, DataError, RouteError
from moe_interp.interventions import replay_routes, routes_from
from moe_interp.traces import RoutingTrace
from tests import tiny
from tests.integration.interventions.support import TOKENS, Opened, opened, plain, run

OTHER = tiny.random_tokens(2, 6, seed=9)
DECODERS = [name for name in tiny.FAMILIES if name not in tiny.ENCODER_DECODERS]
DENSE_FIRST = ("deepseek_v2", "deepseek_v3", "glm4_moe", "qwen3_moe")
# transformers' tuple has other tensors than the routers' logits, or none for some layers
NOT_LOGITS = {
    "gemma4": "probabilities",
    "gemma4_text": "probabilities",
    "laguna": "soft-cap",
    "jetmoe": "9 columns",
    "deepseek_v4": "2 columns",
}


def recorded(model: Opened, tokens: torch.Tensor = OTHER) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Ids ``[sequence, token, MoE layer, slot]`` of a run with routes of its own, and its logits.

    The run is one whose routes the model would not choose: they are those of other tokens, replayed.
    """
    inputs = tiny.model_inputs(model.name, tokens)
    keep = model.moe.filter("expert_indices")
    with torch.no_grad():
        cache = model.bridge.run_with_cache(tokens, names_filter=keep, **inputs)[1]
    ids = torch.stack([model.moe.cached(cache, "expert_indices", layer) for layer in model.labels], dim=2)
    return ids.numpy(), run(model, replay_routes(model.moe, cache))


def all_layers(model: Opened, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """A column for every layer, of zeros where it is dense."""
    whole = np.zeros((*ids.shape[:-2], model.bridge.cfg.n_layers, ids.shape[-1]), ids.dtype)
    whole[..., list(model.labels), :] = ids
    return whole


def npy(array: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_routes_in_the_form_of_vllm_give_the_logits_of_the_run_they_are_from(family: str, tmp_path: Path) -> None:
    if family in tiny.ENCODER_DECODERS:
        pytest.skip("engines record no encoder-decoders")
    model = opened(family)
    ids, expected = recorded(model)
    assert not torch.equal(expected, plain(model))
    trace = RoutingTrace.from_vllm(list(ids.astype(np.int16)), moe=model.moe)
    assert trace.layers == model.labels
    assert trace.expert_weights is None
    assert torch.equal(run(model, replay_routes(model.moe, trace)), expected)


@pytest.mark.parametrize("name", DENSE_FIRST)
def test_columns_of_all_layers_or_of_the_moe_layers_are_told_apart(name: str, tmp_path: Path) -> None:
    model = opened(name)
    ids, expected = recorded(model)
    labels, n_layers = list(model.labels), model.bridge.cfg.n_layers
    assert labels != list(range(len(labels)))
    assert n_layers > len(labels)
    np.save(tmp_path / "moe.npy", ids[0].astype(np.uint8))
    np.save(tmp_path / "all.npy", all_layers(model, ids)[0].astype(np.int32))
    asked = [
        ("moe.npy", labels),
        ("all.npy", "all"),
        ("all.npy", labels),
    ]
    traces = [RoutingTrace.read(tmp_path / file, "vllm", 8, layers) for file, layers in asked]
    traces += [RoutingTrace.read(tmp_path / file, "vllm", moe=model.moe) for file in ("moe.npy", "all.npy")]
    traces += [RoutingTrace.read(tmp_path / "moe.npy", "vllm", moe=model.moe, layers="moe")]
    for trace in traces:
        assert trace.layers == model.labels
        logits = run(model, replay_routes(model.moe, trace), TOKENS[:1])
        assert torch.equal(logits, run(model, replay_routes(model.moe, traces[0]), TOKENS[:1]))
        torch.testing.assert_close(logits, expected[:1])  # of a batch of two
    by_place = RoutingTrace.read(tmp_path / "moe.npy", "vllm", 8, "moe")
    assert by_place.layers == tuple(range(len(labels)))
    for use in (replay_routes, routes_from):
        with pytest.raises(RouteError, match=r'layers="moe"'):
            use(model.moe, by_place)
    replayed = run(model, replay_routes(model.moe, by_place, layers="moe"), TOKENS[:1])
    assert torch.equal(replayed, logits)
    for file in ("moe.npy", "all.npy"):
        with pytest.raises(DataError, match=rf'{file}: . columns without layer numbers.*layers="all".*layers="moe"'):
            RoutingTrace.read(tmp_path / file, "vllm", 8)
    with pytest.raises(DataError, match="zeros for all tokens in the column of layer 0"):
        RoutingTrace.read(tmp_path / "all.npy", "vllm", 8, "moe")
    with pytest.raises(DataError, match=rf"layer {n_layers - 1}|for {len(labels)} columns"):
        RoutingTrace.read(tmp_path / "moe.npy", "vllm", 8, [0, *labels])


@pytest.mark.parametrize("name", DENSE_FIRST)
def test_a_generation_recorded_by_vllm_or_sglang_is_replayed_up_to_the_token_that_was_never_an_input(
    name: str, tmp_path: Path
) -> None:
    """Six tokens, of which the last was sampled: five rows."""
    model = opened(name)
    ids, _ = recorded(model)
    rows, tokens = ids[0][:-1], OTHER[0].tolist()
    # the sixth token takes its own route in both
    first_five = replay_routes(model.moe, trace_of(model, ids[0]), positions=range(5))
    expected = run(model, first_five, TOKENS[:1])
    whole = all_layers(model, rows)
    output = SimpleNamespace(
        prompt_token_ids=tokens[:4], outputs=[SimpleNamespace(token_ids=tokens[4:], routed_experts=whole.astype("i4"))]
    )
    split = SimpleNamespace(
        prompt_token_ids=tokens[:4],
        prompt_routed_experts=rows[:4].astype("i2"),
        outputs=[SimpleNamespace(token_ids=tokens[4:], routed_experts=rows[4:].astype("i2"))],
    )
    served = {
        "usage": {"prompt_tokens": 4, "completion_tokens": 2},
        "choices": [{"routed_experts": npy(whole.astype(np.uint8))}],
    }
    listed = {"prompt_routed_experts": rows[:4].tolist(), "choices": [{"routed_experts": rows[4:].tolist()}]}
    flat = base64.b64encode(whole.astype("<i4").tobytes()).decode()
    response = {"text": "", "meta_info": {"prompt_tokens": 4, "completion_tokens": 2, "routed_experts": flat}}
    chat = {"usage": served["usage"], "choices": [{"sgl_ext": {"routed_experts": flat}}]}
    (tmp_path / "vllm.jsonl").write_text(json.dumps(served) + "\n" + json.dumps(served))
    (tmp_path / "sglang.json").write_text(json.dumps(response))
    (tmp_path / "sglang.txt").write_text(flat)
    moe = model.moe
    traces = [
        RoutingTrace.from_vllm([output], moe=moe),
        RoutingTrace.from_vllm(split, moe=moe),
        RoutingTrace.from_vllm(served, 8, layers="all"),
        RoutingTrace.from_sglang(response, moe=moe),
        RoutingTrace.from_sglang([chat], moe=moe),
        RoutingTrace.read(tmp_path / "sglang.json", "sglang", moe=moe),
        RoutingTrace.read(tmp_path / "sglang.txt", "sglang", moe=moe, token_ids=tokens),
        RoutingTrace.read(
            tmp_path / "sglang.txt",
            "sglang",
            8,
            list(model.labels),
            top_k=rows.shape[2],
            n_columns=whole.shape[1],
            sequence_lengths=[6],
        ),
    ]
    for trace in traces:
        assert trace.covered.all(axis=1).tolist() == [True] * 5 + [False]
        replayed = run(model, replay_routes(model.moe, trace), TOKENS[:1])
        assert torch.equal(replayed, expected)
    assert traces[0].phase.tolist() == ["prefill"] * 4 + ["generation"] * 2  # type: ignore[union-attr]
    assert traces[0].token_ids.tolist() == tokens  # type: ignore[union-attr]
    several = RoutingTrace.read(tmp_path / "vllm.jsonl", "vllm", moe=moe)
    assert several.sequence_lengths.tolist() == [6, 6]
    bare = RoutingTrace.from_vllm(listed, moe=moe)  # nothing says that there is a sixth token
    assert bare.n_tokens == 5
    assert bare.covered.all()
    late = {"start": 2, "data": base64.b64encode(whole[2:].astype("u1").tobytes()).decode(), "dtype": "uint8"}
    late |= {"shape": list(whole[2:].shape)}
    trimmed = RoutingTrace.from_vllm({"usage": served["usage"], "choices": [{"routed_experts": late}]}, moe=moe)
    assert trimmed.covered.all(axis=1).tolist() == [False] * 2 + [True] * 3 + [False]


def trace_of(model: Opened, ids: NDArray[np.int64]) -> RoutingTrace:
    return RoutingTrace.from_arrays(ids, n_experts=8, layers=list(model.labels))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DECODERS)
def test_router_logits_of_transformers_give_the_routes_by_the_familys_rule(name: str) -> None:
    model = opened(name)
    inputs = tiny.model_inputs(name, TOKENS)
    keep = model.moe.filter("expert_indices", "expert_weights", "router_logits")
    with torch.no_grad():
        given = model.hf(input_ids=TOKENS, output_router_logits=True, **inputs).router_logits
        cache = model.bridge.run_with_cache(TOKENS, names_filter=keep, **inputs)[1]
    if name in NOT_LOGITS:
        with pytest.raises(DataError, match=NOT_LOGITS[name]):
            RoutingTrace.from_router_logits(given, moe=model.moe)
        return
    trace = RoutingTrace.from_router_logits(given, moe=model.moe, attention_mask=torch.ones_like(TOKENS))
    assert trace.layers == model.labels
    assert trace.sequence_lengths.tolist() == [6, 6]
    for column, layer in enumerate(model.labels):
        ids, weights = (model.moe.cached(cache, n, layer).reshape(12, -1) for n in ("expert_indices", "expert_weights"))
        assert np.array_equal(trace.expert_indices[:, column], ids)
        assert trace.expert_weights is not None
        np.testing.assert_allclose(trace.expert_weights[:, column], weights, atol=2e-6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = RoutingTrace.from_router_logits(given, moe=model.moe, attention_mask=mask, token_ids=TOKENS[mask.bool()])
    assert padded.sequence_lengths.tolist() == [4, 6]
    assert np.array_equal(padded.expert_indices, trace.expert_indices[mask.bool().reshape(-1)])


def test_the_largest_logits_are_the_wrong_experts_where_a_family_has_a_bias_and_a_rule_must_be_said() -> None:
    model = opened("deepseek_v3")
    with torch.no_grad():
        given = model.hf(input_ids=TOKENS, output_router_logits=True).router_logits
    right = RoutingTrace.from_router_logits(given, moe=model.moe)
    wrong = RoutingTrace.from_router_logits(given, layers=[1, 2], rule="topk_softmax", top_k=right.n_slots)
    assert (np.sort(right.expert_indices) != np.sort(wrong.expert_indices)).any(axis=2).mean() > 0.2
    with pytest.raises(ConfigError, match="pass the model, or say how its family chooses"):
        RoutingTrace.from_router_logits(given, layers=[1, 2])
    with pytest.raises(DataError, match="2 columns without layer numbers"):
        RoutingTrace.from_router_logits(given, rule="softmax", top_k=2)
    own = RoutingTrace.from_router_logits(given, layers=[1, 2], rule=model.moe.spec(1).rule.route)
    assert np.array_equal(own.expert_indices[:, 0], right.expert_indices[:, 0])
    olmoe = opened("olmoe")
    with torch.no_grad():
        given = olmoe.hf(input_ids=TOKENS, output_router_logits=True).router_logits
    rule = "topk_softmax" if olmoe.moe.spec(0).rule.normalize else "softmax"  # type: ignore[attr-defined]
    native = RoutingTrace.from_router_logits(given, moe=olmoe.moe)
    named = RoutingTrace.from_router_logits(given, layers="moe", rule=rule, top_k=native.n_slots)  # type: ignore[arg-type]
    assert np.array_equal(named.expert_indices, native.expert_indices)
    np.testing.assert_allclose(named.expert_weights, native.expert_weights, rtol=1e-5)  # type: ignore[arg-type]
