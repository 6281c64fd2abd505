"""Captured routing against the cached hooks: over families, batches, padding, phases; nothing is left on the model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe_interp as mi
from moe_interp.engine.memory import HalvedBatchWarning
from moe_interp.errors import ConfigError, DataError, HookError
from moe_interp.experiments.capture.passes import RoutingPasses
from moe_interp.experiments.inputs.items import Item
from moe_interp.traces import RoutingCounts
from tests.tiny import (
    ENCODER_DECODERS,
    build_bridge,
    build_hf,
    float64_casts,
    random_tokens,
    set_experts_implementation,
    tiny_tokenizer,
)
from tests.waits import counted_waits

READ_AT = {
    "expert_indices": "expert_indices",
    "expert_weights": "expert_weights",
    "router_logits": "router_logits",
    "router_inputs": "router_in",
}
IN_DEPTH = ("deepseek_v2", "deepseek_v3", "qwen2_moe")  # dense first layers; correction bias; shared experts
# their own cached decoding is not a full pass: a sparse attention that chooses by length, a coarser recurrence
DECODES_OTHERWISE = ("glm_moe_dsa", "nemotron_h")
RAGGED = (9, 5, 9, 7, 5)


def cached(moe: mi.MoEHooks, tokens: Tensor, layers: Sequence[Any] | None = None, **more: Any) -> dict[str, Any]:
    """What the cached hooks hold of a batch, ``[token, layer, ...]`` of each field."""
    with torch.no_grad():
        _, cache = moe.bridge.run_with_cache(tokens, names_filter=moe.filter(*READ_AT.values()), **more)
    found = {}
    for field, name in READ_AT.items():
        value = torch.stack([moe.cached(cache, name, layer) for layer in layers or moe.layers], dim=2)
        found[field] = value.flatten(0, 1).float().numpy() if value.is_floating_point() else value.flatten(0, 1).numpy()
    return found


def assert_equal(trace: mi.RoutingTrace, expected: dict[str, Any]) -> None:
    for field, values in expected.items():
        np.testing.assert_array_equal(getattr(trace, field), values, err_msg=field)


def attached(name: str, **options: Any) -> mi.MoEHooks:
    return mi.attach(build_bridge(build_hf(name, **options), name, tiny_tokenizer()))


@pytest.fixture(scope="module", params=IN_DEPTH)
def moe(request: pytest.FixtureRequest) -> Iterator[mi.MoEHooks]:
    with attached(request.param) as hooks:
        yield hooks


@pytest.fixture(scope="module")
def olmoe() -> Iterator[mi.MoEHooks]:
    with attached("olmoe") as hooks:
        yield hooks


@pytest.fixture
def ragged() -> list[list[int]]:
    tokens = random_tokens(len(RAGGED), max(RAGGED), seed=3)
    return [row[:n] for row, n in zip(tokens.tolist(), RAGGED, strict=True)]


capture: Any = functools.partial(mi.capture_routing, progress=False)


def one_sequence(trace: mi.RoutingTrace, number: int) -> mi.RoutingTrace:
    return trace.select(trace.sequence == number)


def test_every_family_is_recorded_as_its_hooks_show_it_and_generation_as_the_same_text(family: str) -> None:
    is_two = family in ENCODER_DECODERS
    tokens = random_tokens(2, 8)
    with attached(family) as moe:
        layers = [layer for layer in moe.layers if not is_two or layer[0] == "encoder"]  # type: ignore[index]
        more = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if is_two else {}
        trace = capture(moe, tokens, logits=True, inputs=True)
        assert_equal(trace, cached(moe, tokens, layers, **more))
        assert trace.sequence_lengths.tolist() == [8, 8]
        assert set(trace.phase) == {"prefill"}
        assert trace.token_ids.tolist() == tokens.flatten().tolist()
        together, alone = (capture(moe, tokens[:, :7], batch_size=n, batch_invariant=True) for n in (2, 1))
        np.testing.assert_array_equal(together.expert_indices, alone.expert_indices)
        if family != "jamba":  # its state space is not served
            np.testing.assert_array_equal(together.expert_weights, alone.expert_weights)
        if is_two:
            assert trace.predicted_ids is None
            return
        with torch.no_grad():
            assert trace.predicted_ids.tolist() == moe.bridge(tokens).argmax(dim=-1).flatten().tolist()
        grown = capture(moe, tokens, generate=2)
        texts = [grown.token_ids[grown.sequence == i].tolist() for i in range(2)]
        assert grown.phase.tolist() == [p for t in texts for p in ["prefill"] * 8 + ["generation"] * (len(t) - 8)]
        whole = capture(moe, texts)
        if family not in DECODES_OTHERWISE:
            np.testing.assert_array_equal(grown.expert_indices, whole.expert_indices)
            np.testing.assert_allclose(grown.expert_weights, whole.expert_weights, atol=3e-6)
            assert grown.predicted_ids.tolist() == whole.predicted_ids.tolist()
        # greedy: each generated token is what was predicted before it
        for i, text in enumerate(texts):
            assert grown.predicted_ids[grown.sequence == i][7:-1].tolist() == text[8:]


def test_in_float64_generation_is_the_same_text_to_rounding() -> None:
    """Rounding shrinks there by the square; a fault would not."""
    with attached("qwen2_moe", dtype=torch.float64) as moe, float64_casts():
        set_experts_implementation(moe.bridge, "eager")
        grown = capture(moe, random_tokens(2, 6), generate=3)
        whole = capture(moe, [grown.token_ids[grown.sequence == i].tolist() for i in range(2)])
    np.testing.assert_array_equal(grown.expert_indices, whole.expert_indices)
    np.testing.assert_allclose(grown.expert_weights, whole.expert_weights, atol=1e-7)  # stored in float32


def test_each_batch_that_is_run_is_that_of_the_cached_hooks(moe: mi.MoEHooks, ragged: list[list[int]]) -> None:
    one_by_one = capture(moe, ragged, batch_size=1, logits=True, inputs=True)
    for number, ids in enumerate(ragged):
        assert_equal(one_sequence(one_by_one, number), cached(moe, torch.tensor([ids])))
    together = capture(moe, ragged, logits=True, inputs=True)
    for length in set(RAGGED):
        alike = [i for i, n in enumerate(RAGGED) if n == length]
        rows = together.select(np.isin(together.sequence, alike))
        assert_equal(rows, cached(moe, torch.tensor([ragged[i] for i in alike])))


def test_batch_invariant_passes_give_the_same_bits_for_every_batch(moe: mi.MoEHooks, ragged: list[list[int]]) -> None:
    singles = []
    with mi.batch_invariant(moe):
        singles = [cached(moe, torch.tensor([ids])) for ids in ragged]
    for size in (1, 3, None):
        trace = capture(moe, ragged, batch_size=size, batch_invariant=True, logits=True, inputs=True)
        for number, expected in enumerate(singles):
            assert_equal(one_sequence(trace, number), expected)


def test_generation_in_batch_invariant_passes_does_not_depend_on_the_batch(olmoe: mi.MoEHooks) -> None:
    rows = random_tokens(3, 6, seed=5).tolist()
    together = capture(olmoe, rows, generate=4, batch_invariant=True, temperature=np.float32(0.0))
    for number, row in enumerate(rows):
        alone = capture(olmoe, [{"id": str(number), "tokens": row}], generate=4, batch_invariant=True)
        for field in ("expert_indices", "expert_weights", "token_ids", "predicted_ids"):
            np.testing.assert_array_equal(getattr(one_sequence(together, number), field), getattr(alone, field))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(moe: mi.MoEHooks, ragged: list[list[int]], side: str) -> None:
    width = max(RAGGED)
    tokens, mask = torch.full((len(ragged), width), 7), torch.zeros(len(ragged), width, dtype=torch.long)
    for row, ids in enumerate(ragged):
        place = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        tokens[row, place], mask[row, place] = torch.tensor(ids), 1
    padded = capture(moe, tokens, attention_mask=mask)
    plain = capture(moe, ragged)
    assert padded.sequence_lengths.tolist() == list(RAGGED)
    assert padded.token_ids.tolist() == [token for row in ragged for token in row]
    np.testing.assert_array_equal(padded.expert_indices, plain.expert_indices)
    np.testing.assert_allclose(padded.expert_weights, plain.expert_weights, atol=3e-6)
    # the very batch that the cached hooks had, rows of padding alone left out of it
    is_whole = mask.bool().all(dim=1)
    expected = cached(moe, tokens[~is_whole], attention_mask=mask[~is_whole])
    real = mask[~is_whole].bool().flatten().numpy()
    rows = padded.select(np.isin(padded.sequence, (~is_whole).nonzero()[:, 0].numpy()))
    for field in ("expert_indices", "expert_weights"):
        np.testing.assert_array_equal(getattr(rows, field), expected[field][real])


def test_rows_of_other_lengths_are_gone_on_from_without_their_padding(
    moe: mi.MoEHooks, ragged: list[list[int]]
) -> None:
    width = max(RAGGED)
    tokens, mask = torch.full((len(ragged), width), 7), torch.zeros(len(ragged), width, dtype=torch.long)
    for row, ids in enumerate(ragged):
        place = slice(width - len(ids), width) if row % 2 else slice(0, len(ids))
        tokens[row, place], mask[row, place] = torch.tensor(ids), 1
    padded, plain = (
        capture(moe, given, generate=2, batch_size=2, **more)
        for given, more in ((tokens, {"attention_mask": mask}), (ragged, {}))
    )
    for field in ("sequence", "token_ids", "phase", "expert_indices", "expert_weights"):
        np.testing.assert_array_equal(getattr(padded, field), getattr(plain, field), err_msg=field)


def test_sequences_of_like_length_run_together_where_it_is_asked_for(
    olmoe: mi.MoEHooks, ragged: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    native = RoutingPasses._prefilled

    def noted(self: RoutingPasses, some: list[Any]) -> Any:
        passes.append(len(some))
        return native(self, some)

    monkeypatch.setattr(RoutingPasses, "_prefilled", noted)
    plain, padded = capture(olmoe, ragged), capture(olmoe, ragged, pad=True)
    assert passes == [2, 1, 2, 5]
    np.testing.assert_array_equal(plain.expert_indices, padded.expert_indices)
    np.testing.assert_allclose(plain.expert_weights, padded.expert_weights, atol=3e-6)


def test_norms_are_those_of_the_unweighted_expert_outputs(moe: mi.MoEHooks) -> None:
    tokens = random_tokens(2, 6)
    trace = capture(moe, tokens, norms=True)
    with torch.no_grad():
        _, cache = moe.bridge.run_with_cache(tokens, names_filter=moe.filter("expert_out"))
    outputs = torch.stack([moe.cached(cache, "expert_out", layer) for layer in moe.layers], dim=2).flatten(0, 1)
    np.testing.assert_allclose(trace.expert_norms, outputs.double().square().sum(-1).sqrt().numpy(), rtol=1e-6)
    assert (trace.expert_norms > 0).all()


def test_replaying_a_capture_gives_the_very_logits(moe: mi.MoEHooks) -> None:
    tokens = random_tokens(3, 8)
    with torch.no_grad():
        plain = moe.bridge(tokens)
        hooks: Any = mi.replay_routes(moe, capture(moe, tokens))
        replayed = moe.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert float((replayed - plain).abs().max()) == 0.0


def test_both_stacks_of_an_encoder_decoder_are_recorded_one_at_a_time() -> None:
    with attached("switch_transformers") as moe:
        start = 0
        pairs = [{"prompt": [5, 6, 7, 8], "answer": [9, 10, 11]}, {"prompt": [8, 7, 6, 5], "answer": [12, 13, 14]}]
        trace = capture(moe, pairs, stack="decoder", logits=True, inputs=True)
        prompts = torch.tensor([pair["prompt"] for pair in pairs])
        answers = torch.tensor([[start, *pair["answer"]] for pair in pairs])
        layers = [layer for layer in moe.layers if layer[0] == "decoder"]  # type: ignore[index]
        assert_equal(trace, cached(moe, prompts, layers, decoder_input_ids=answers))
        assert trace.token_ids.tolist() == answers.flatten().tolist()
        assert trace.layers == tuple(layer[1] for layer in layers)  # type: ignore[index]
        with torch.no_grad():
            logits = moe.bridge(prompts, decoder_input_ids=answers)
        assert trace.predicted_ids.tolist() == logits.argmax(dim=-1).flatten().tolist()
        with pytest.raises(ConfigError, match="layers of one stack"):
            capture(moe, pairs, layers=moe.layers)
        with pytest.raises(ConfigError, match="generate=2 with an encoder-decoder"):
            capture(moe, pairs, generate=2)


def test_counts_equal_those_of_the_whole_trace(moe: mi.MoEHooks, ragged: list[list[int]]) -> None:
    options: dict[str, Any] = {"domain": ["a", "b", "a", "b", "b"], "norms": True, "logits": True}
    options["part_bytes"] = 1500  # three parts, so that there is something to add up
    counts = capture(moe, ragged, accumulate=True, **options)
    whole = RoutingCounts.of(capture(moe, ragged, **options))
    assert counts.n_sequences == whole.n_sequences == 5
    for name in [*whole._arrays, *whole._rows]:
        np.testing.assert_array_equal(counts.array(name), whole.array(name), err_msg=name)
    for name in whole._sparse:
        for mine, theirs in zip(counts.sparse(name), whole.sparse(name), strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
    few = capture(moe, ragged, accumulate=["norms", "margin"])
    assert few.tables == ("norms", "margin")
    assert few.fields is not None
    assert {"expert_norms", "router_logits"} <= few.fields


def test_interventions_are_recorded_as_they_leave_the_routes(olmoe: mi.MoEHooks) -> None:
    layer = olmoe.layers[0]
    hooks = mi.force_experts(olmoe, layer, 3, positions="all")
    trace = capture(olmoe, random_tokens(2, 6), hooks=hooks, generate=2)
    used = trace.expert_indices[:, 0]
    assert set(used.flatten().tolist()) <= {3, -1}
    assert (np.isclose(trace.expert_weights[:, 0].max(axis=1), 1.0)).all()


def test_texts_messages_items_and_lists_by_domain(olmoe: mi.MoEHooks) -> None:
    given = [
        {"id": "a", "text": "w5 w6", "domain": "x"},
        {"id": "b", "prompt": "w7", "answer": "w8 w9", "domain": "y"},
        {"id": "c", "prompt": "w10 w11", "domain": "x"},
        {"id": "d", "tokens": [1, 20, 21], "domain": "x"},
    ]
    trace = capture(olmoe, given)
    assert trace.token_ids.tolist() == [1, 5, 6, 1, 7, 8, 9, 1, 10, 11, 1, 20, 21]
    assert trace.domain.tolist() == ["x"] * 3 + ["y"] * 4 + ["x"] * 6
    assert capture(olmoe, iter(["w5 w6", "w7"])).token_ids.tolist() == [1, 5, 6, 1, 7]
    by_domain = capture(olmoe, {"x": ["w5 w6", "w7"], "y": [[1, 8]]})
    assert by_domain.domain.tolist() == ["x"] * 5 + ["y"] * 2
    items = {"z": [Item("i", "x", "w5", "w6")]}
    assert capture(olmoe, items).domain.tolist() == ["z"] * 3
    # of a prompt that is gone on from, the answer is not read
    grown = capture(olmoe, [given[1]], generate=1)
    assert grown.token_ids.tolist()[:2] == [1, 7]
    assert grown.phase.tolist() == ["prefill"] * 2 + ["generation"]


def test_the_model_is_left_as_it_was_also_after_an_interruption(olmoe: mi.MoEHooks, ragged: list[list[int]]) -> None:
    model: Any = olmoe.bridge.original_model
    olmoe.bridge.train()
    next(model.modules()).training = False
    modes = [module.training for module in olmoe.bridge.modules()]
    state, implementation = torch.get_rng_state(), model.config._experts_implementation

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    for options in ({}, {"generate": 2}, {"batch_invariant": True}):
        with pytest.raises(KeyboardInterrupt):
            mi.capture_routing(olmoe, ragged, progress=interrupt, **options)  # type: ignore[arg-type]
        assert not any(point.has_hooks() for point in olmoe.bridge.hook_dict.values())
        assert [module.training for module in olmoe.bridge.modules()] == modes
        assert model.config._experts_implementation == implementation
    assert torch.equal(torch.get_rng_state(), state)
    olmoe.bridge.eval()


def test_what_does_not_fit_into_memory_is_run_in_halves(olmoe: mi.MoEHooks, monkeypatch: pytest.MonkeyPatch) -> None:
    native, sizes = RoutingPasses._prefilled, []

    def small(self: RoutingPasses, some: list[Any]) -> Any:
        sizes.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError("too much")
        return native(self, some)

    tokens = random_tokens(5, 6)
    whole = capture(olmoe, tokens)
    monkeypatch.setattr(RoutingPasses, "_prefilled", small)
    with pytest.warns(HalvedBatchWarning):
        halved = capture(olmoe, tokens)
    assert sizes == [5, 3, 2, 2, 1]
    np.testing.assert_array_equal(whole.expert_indices, halved.expert_indices)


def test_the_host_waits_once_a_field_and_pass_whatever_the_number_of_layers() -> None:
    """On a GPU each wait stops the pass; of twice the layers there are as many."""
    found = []
    with attached("qwen3_moe") as moe:
        for layers in (moe.layers[:1], moe.layers):
            capture(moe, random_tokens(2, 6), layers=layers, logits=True, inputs=True)
            with counted_waits() as waits:
                capture(moe, random_tokens(2, 6), layers=layers, logits=True, inputs=True)
            found.append([wait for wait in waits if "/experiments/capture/" in wait or "/hooks/" in wait])
    assert len(found[0]) == len(found[1])
    assert not [wait for waits in found for wait in waits if "/hooks/" in wait]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("w5 w6", {}, "one text. Expected: a list of texts"),
        ([], {}, "no sequence"),
        ([5, 6, 7], {}, r"ids \[5, 6, 7, ...\], one sequence"),
        ([[5, 6], "w5 <bos>"], {"generate": -1}, "generate=-1. Expected: a whole number of at least 0"),
        (["w5"] * 2, {"layers": []}, "nothing to record"),
        (["w5"], {"stack": "encoder"}, "stack='encoder'. Expected: no stack"),
        (["w5"], {"domain": ["a", "b"]}, "2 labels for 1 of sequences"),
        ([{"id": "a", "text": "w5"}, {"id": "a", "text": "w6"}], {}, "'a' more than once"),
        ([{"text": "w5", "domain": "x"}, "w6"], {}, "sequence '1' without a domain, and sequence '0' with one"),
        ([[5] * 5000], {}, "sequence '0': 5000 tokens. Expected: at most the model's context"),
        ([[5] * 60], {"generate": 5000}, "at most the model's context"),
        ([[5, 500]], {}, "token id 500"),
        ([[5, 6]], {"accumulate": "norms"}, "accumulate='norms'. Expected: True, or names of tables"),
        ([[5, 6]], {"accumulate": ["use"]}, "table 'use'"),
        ([[5, 6]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[5, 6]], {"top_p": 0.0}, "top_p=0.0"),
        ([[5, 6]], {"pad": True, "generate": 2}, "pad=True with generate"),
        ([[5, 6]], {"batch_invariant": True, "norms": True}, "batch_invariant=True with norms"),
        ([[5, 6]], {"format": "csv"}, "format='csv'"),
        ([[5, 6]], {"memory_budget": 100}, "a memory budget"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(olmoe: mi.MoEHooks, given: Any, options: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        capture(olmoe, given, **options)


def test_a_field_whose_hook_is_missing_is_refused_by_name() -> None:
    with (
        mi.attach(build_bridge(build_hf("olmoe"), "olmoe"), expert_outputs=False) as moe,
        pytest.raises(HookError, match="expert_norms of a model without its hook"),
    ):
        capture(moe, [[5, 6]], norms=True)


def test_other_number_formats_are_refused_batch_invariant_passes() -> None:
    with attached("olmoe", dtype=torch.bfloat16) as moe:
        trace = capture(moe, [[5, 6, 7]], logits=True, inputs=True)
        assert_equal(trace, cached(moe, torch.tensor([[5, 6, 7]])))
        with pytest.raises(ConfigError, match=r"batch-invariant passes in bfloat16 on cpu\. Expected: float32"):
            capture(moe, [[5, 6, 7]], batch_invariant=True)
