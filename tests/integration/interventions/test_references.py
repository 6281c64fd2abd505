"""Means and resampled outputs from tokens of reference: given, recorded, or the prompt's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import attach
from moe_interp.interventions import ablate_experts, force_experts
from moe_interp.tokenization import RepeatedBOSWarning
from moe_interp.traces import RoutingTrace
from tests import tiny
from tests.integration.interventions.support import LEFT, TOKENS, Opened, opened, plain, run, see

REFERENCE = tiny.random_tokens(4, 30, seed=11)
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}
ROUTED = ("expert_indices", "expert_out")


def reference_cache(model: Opened, tokens: Tensor = REFERENCE, **options: Any) -> Any:
    with torch.no_grad():
        keep = model.moe.filter(*ROUTED, layers=[model.last])
        return model.bridge.run_with_cache(tokens, names_filter=keep, **options)[1]


def means(model: Opened, cache: Any, real: Tensor | None = None) -> dict[int, Tensor]:
    """By a loop over tokens, in float64."""
    indices, outputs = (model.moe.cached(cache, name, model.last) for name in ROUTED)
    found: dict[int, list[Tensor]] = {}
    for place in np.ndindex(*indices.shape):
        if real is None or real[place[:2]]:
            found.setdefault(int(indices[place]), []).append(outputs[place].double())
    return {expert: torch.stack(each).mean(0) for expert, each in found.items()}


def steps_of(model: Opened, hooks: Any, name: str = "expert_out", **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Routes and outputs of each step of a generation."""
    seen: dict[str, list[Tensor]] = {"expert_indices": [], name: []}

    def recorder(name: str) -> Any:
        return model.moe.hook_name(name, model.last), lambda value, hook: seen[name].append(value.clone())

    with torch.no_grad(), model.bridge.hooks(fwd_hooks=[*hooks, recorder("expert_indices"), recorder(name)]):
        model.bridge.original_model.generate(TOKENS, **GREEDY | options)
    return list(zip(seen["expert_indices"], seen[name]))


@pytest.mark.parametrize("name", ["olmoe", "llama4", "gpt_oss", "jetmoe", "nemotron_h"])
def test_generated_tokens_get_the_mean_or_a_token_of_the_reference(name: str) -> None:
    model = opened(name)
    cache = reference_cache(model)
    expected = means(model, cache)
    pool = model.moe.cached(cache, "expert_out", model.last).flatten(0, 2)
    for given in (REFERENCE, cache):
        for mode in ("mean", "resample"):
            hooks = ablate_experts(
                model.moe, model.last, sorted(expected), mode=mode, positions="new", reference=given, seed=3
            )
            for step, (indices, outputs) in enumerate(steps_of(model, hooks)):
                for place in np.ndindex(*indices.shape):
                    if step and mode == "mean":
                        torch.testing.assert_close(
                            outputs[place].double(), expected[int(indices[place])], atol=1e-6, rtol=1e-5
                        )
                    if step and mode == "resample":
                        assert (outputs[place] == pool).all(-1).any()


def test_a_prompts_own_tokens_serve_what_is_generated_from_it() -> None:
    model = opened("olmoe")
    own = means(model, reference_cache(model, TOKENS))
    gone = sorted(own)
    for options in ({}, {"prefill_chunk_size": 2}, {"use_cache": False}):
        hooks = ablate_experts(model.moe, model.last, gone, mode="mean", positions="new", reference="prompt")
        for step, (indices, outputs) in enumerate(steps_of(model, hooks, **options)):
            new = range(6, indices.shape[1]) if "use_cache" in options else range(indices.shape[1])
            is_prompt = indices.shape[1] == 2 or (step == 0 and not new)
            if step < (3 if "prefill_chunk_size" in options else 1) or is_prompt:
                continue
            for row, at, slot in ((r, p, s) for r in range(2) for p in new for s in range(2)):
                value = outputs[row, at, slot].double()
                torch.testing.assert_close(value, own[int(indices[row, at, slot])], atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"in a prompt that runs in several passes.*Pass reference="):
        steps_of(model, ablate_experts(model.moe, model.last, gone, mode="mean"), prefill_chunk_size=3)


def test_where_nothing_is_known_of_other_tokens_it_is_refused() -> None:
    model = opened("olmoe")
    for mode in ("mean", "resample"):
        everyone = ablate_experts(model.moe, 1, range(8), mode=mode, positions="new")
        with pytest.raises(
            ConfigError, match=rf"mode='{mode}' for expert \d at layer 1 in a generated token.*reference="
        ):
            steps_of(model, everyone)
        alone = ablate_experts(model.moe, 1, range(8), mode=mode)
        with pytest.raises(ConfigError, match=r"in a pass without another token that uses it. Expected: other tokens"):
            run(model, alone, TOKENS[:1, :1])
        mixed = [*force_experts(model.moe, 1, 3), *force_experts(model.moe, 1, 5, positions=[2])]
        with pytest.raises(ConfigError, match=r"for expert 5 at layer 1 in a pass without another token"):
            run(model, [*mixed, *ablate_experts(model.moe, 1, [3, 5], mode=mode)], TOKENS[:1])
        run(model, [*mixed, *ablate_experts(model.moe, 1, 3, mode=mode)], TOKENS[:1])
        unused = ablate_experts(model.moe, 1, 6, mode=mode, reference=reference_forced(model, 3))
        with pytest.raises(ConfigError, match=r"a reference without a token that uses expert 6 at layer 1"):
            run(model, [*force_experts(model.moe, 1, 6), *unused])
        nothing = ablate_experts(model.moe, 1, range(8), mode=mode, positions="new", reference="prompt")
        forced = [*force_experts(model.moe, 1, 3), *force_experts(model.moe, 1, 5, positions="new")]
        with pytest.raises(ConfigError, match=r"for expert 5 .*generated from a prompt of which none uses it"):
            steps_of(model, [*forced, *nothing])
    assert torch.equal(plain(model), plain(model))


def reference_forced(model: Opened, expert: int) -> dict[str, Tensor]:
    seen = see(model, force_experts(model.moe, 1, expert), 1, *ROUTED)[1]
    return {model.moe.hook_name(name, 1): value for name, value in seen.items()}


def test_padding_of_a_reference_is_left_out() -> None:
    model = opened("olmoe")
    cache = reference_cache(model, attention_mask=None)
    mask = torch.ones_like(REFERENCE)
    mask[0, :9] = mask[2, -5:] = 0
    expected = means(model, cache, mask)
    hooks = ablate_experts(model.moe, model.last, range(8), mode="mean", reference=cache, reference_mask=mask)
    seen = see(model, hooks, model.last, *ROUTED)[1]
    for place in np.ndindex(*seen["expert_indices"].shape):
        got = seen["expert_out"][place].double()
        torch.testing.assert_close(got, expected[int(seen["expert_indices"][place])], atol=1e-6, rtol=1e-5)
    padded = ablate_experts(model.moe, model.last, range(8), mode="mean", reference=TOKENS, reference_mask=LEFT)
    by_cache = ablate_experts(
        model.moe,
        model.last,
        range(8),
        mode="mean",
        reference=reference_cache(model, TOKENS, attention_mask=LEFT),
        reference_mask=LEFT,
    )
    few = TOKENS[:, 3:]
    outcomes = []
    for hooks in (padded, by_cache):
        try:
            outcomes.append(run(model, hooks, few))
        except ConfigError as error:  # a token may use an expert that the few tokens of reference do not
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1] if isinstance(outcomes[0], str) else torch.equal(*outcomes)


def test_texts_are_a_reference() -> None:
    bridge = tiny.build_bridge(opened("olmoe").hf, "olmoe", tiny.tiny_tokenizer())
    texts = ["w3 w4 w5 w6 w7 w8 w9 w10", "w11 w12 w13"]
    with attach(bridge) as moe, torch.no_grad():
        pools = []
        for text in texts:
            cache = bridge.run_with_cache(text, names_filter=moe.filter(*ROUTED))[1]
            pools.append(cache["expert_out", 1][cache["expert_indices", 1] == 2])
        hooks = [*force_experts(moe, 1, 2), *ablate_experts(moe, 1, 2, mode="mean", reference=texts)]
        cache = {}
        record = (moe.hook_name("expert_out", 1), lambda value, hook: cache.update(out=value))
        bridge.run_with_hooks(TOKENS, fwd_hooks=[*hooks, record])
    torch.testing.assert_close(cache["out"][1, 3, 0], torch.cat(pools).mean(0), atol=1e-6, rtol=1e-5)


def test_a_text_of_reference_begins_with_bos_once() -> None:
    moe = attach(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer()))
    tokens, seen = tiny.random_tokens(2, 9), []
    embed = moe.bridge.original_model.get_input_embeddings()
    handle = embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    forced = force_experts(moe, 1, 2)
    with moe.bridge.hooks(fwd_hooks=forced):
        typed = ablate_experts(moe, 1, 2, mode="mean", reference="w3 w4 w5")
        with pytest.warns(RepeatedBOSWarning, match=r"text 0 of the reference.*with BOS"):
            rendered = ablate_experts(moe, 1, 2, mode="mean", reference="<bos> w3 w4 w5")
    handle.remove()
    assert seen == [[[1, 3, 4, 5]], [[1, 3, 4, 5]]]
    one, other = (moe.bridge.run_with_hooks(tokens, fwd_hooks=[*forced, *hooks]) for hooks in (typed, rendered))
    assert torch.equal(one, other)


def test_references_that_do_not_serve_are_refused() -> None:
    model = opened("olmoe")
    trace = RoutingTrace.from_arrays(np.zeros((4, 1, 1), dtype=int), n_experts=8)
    routes = {model.moe.hook_name("expert_indices", 1): torch.zeros(1, 2, 2)}
    flat = {model.moe.hook_name(name, 1): torch.zeros(4, 2) for name in ROUTED}
    for given, options, text in (
        (trace, {}, r"reference=RoutingTrace. Expected: token ids .*holds no outputs"),
        (torch.zeros(2, 3), {}, r"reference=Tensor of shape \(2, 3\)"),
        (routes, {}, r"a reference without blocks.1.hook_expert_out.*names_filter"),
        (flat, {}, r"a reference of shapes \(4, 2\) and \(4, 2\)"),
        (TOKENS, {"reference_mask": LEFT[:1]}, r"a reference_mask of shape \(1, 6\) for a reference of \(2, 6\)"),
        (TOKENS, {"mode": "zero"}, r"a reference for mode='zero'"),
        (None, {"reference_mask": LEFT}, r"a reference_mask without one"),
    ):
        with pytest.raises(ConfigError, match=text):
            ablate_experts(model.moe, 1, 3, **{"mode": "mean", "reference": given, **options})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_are_taken_in_float32_at_least(dtype: torch.dtype) -> None:
    """Sums over tokens overflow in float16, and lose all but a few bits in bfloat16."""
    model = opened("qwen3_moe", dtype)
    tokens, name = tiny.random_tokens(24, 60, seed=5), model.moe.hook_name("expert_out", model.last)
    seen: dict[str, Tensor] = {}
    shift = (name, lambda value, hook: value + 250)
    before = (name, lambda value, hook: seen.__setitem__("before", value.clone()))
    after = (name, lambda value, hook: seen.__setitem__("after", value.clone()))
    force = force_experts(model.moe, model.last, 3)
    hooks = [*force, shift, before, *ablate_experts(model.moe, model.last, 3, mode="mean"), after]
    logits = run(model, hooks, tokens)
    expected = seen["before"].double().flatten(0, 2).mean(0).to(dtype)
    assert len(seen["before"].flatten(0, 2)) * 250 > torch.finfo(torch.float16).max
    # one step of the format, where the float32 mean lies between two
    torch.testing.assert_close(seen["after"][5, 7, 0], expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert logits.isfinite().all()


def test_a_float64_model_keeps_its_precision() -> None:
    model = opened("olmoe", torch.float64)
    with model.precision():
        seen: dict[str, Tensor] = {}
        name = model.moe.hook_name("expert_out", 1)
        before = (name, lambda value, hook: seen.__setitem__("before", value.clone()))
        after = (name, lambda value, hook: seen.__setitem__("after", value.clone()))
        force = force_experts(model.moe, 1, 3)
        run(model, [*force, before, *ablate_experts(model.moe, 1, 3, mode="mean"), after])
    expected = seen["before"].flatten(0, 2).mean(0)
    assert (seen["after"] - expected).abs().max() < 1e-14
