"""A contrast and its steering on tiny models: shares by a loop, phases, repeated prompts, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moe_interp as mi
from moe_interp.errors import AttachError, ConfigError, DataError, HookError
from moe_interp.experiments.inputs.repeats import RepeatedContentWarning
from tests import tiny
from tests.integration.interventions.support import Opened, opened

A = [tiny.random_tokens(1, n, seed=20 + i)[0].tolist() for i, n in enumerate((5, 6, 6, 8))]
B = [tiny.random_tokens(1, n, seed=40 + i)[0].tolist() for i, n in enumerate((4, 6, 7))]


def shares_of(model: Opened, tokens: list[int], counted: slice) -> np.ndarray:
    """``[layer, expert]``, one prompt and one token at a time."""
    found = np.zeros((len(model.labels), 8))
    with torch.no_grad():
        cache = model.bridge.run_with_cache(torch.tensor([tokens]), names_filter=model.moe.filter("expert_indices"))[1]
    for row, layer in enumerate(model.labels):
        routes = model.moe.cached(cache, "expert_indices", layer)[0].tolist()[counted]
        for route in routes:
            for expert in route:
                found[row, expert] += expert >= 0
        found[row] /= len(routes)
    return found


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "deepseek_v4"])
def test_selection_is_the_share_of_a_prompts_tokens_by_a_loop(name: str) -> None:
    model = opened(name)
    result = mi.contrast_experts(model.moe, A, B, progress=False)
    expected = np.stack([shares_of(model, tokens, slice(None)) for tokens in [*A, *B]])
    np.testing.assert_allclose(result.data["selection"].values, expected, atol=1e-12)
    assert result.data["n_tokens"].values.tolist() == [len(tokens) for tokens in [*A, *B]]
    table = result.experts()
    np.testing.assert_allclose(table["difference"], (expected[:4].mean(0) - expected[4:].mean(0)).ravel())
    assert result.data["group"].values.tolist() == ["a"] * 4 + ["b"] * 3
    some = mi.contrast_experts(model.moe, A, B, layers=[model.last], progress=False)
    np.testing.assert_array_equal(some.data["selection"].values[:, 0], result.data["selection"].values[:, -1])


def test_generated_tokens_are_those_that_generate_writes() -> None:
    model = opened("olmoe")
    result = mi.contrast_experts(model.moe, A, B, phase="generated", max_new_tokens=5, progress=False)
    for place, tokens in enumerate([*A, *B]):
        with torch.no_grad():
            out = model.bridge.generate(
                torch.tensor([tokens]),
                max_new_tokens=5,
                do_sample=False,
                stop_at_eos=True,
                eos_token_id=2,
                verbose=False,
            )
        whole = out[0].tolist()
        n = result.data["n_tokens"].values[place]
        new = whole[len(tokens) :]
        assert n == (new.index(2) + 1 if 2 in new else 5)
        expected = shares_of(model, whole[: len(tokens) + n], slice(len(tokens), None))
        np.testing.assert_allclose(result.data["selection"].values[place], expected, atol=1e-12)


def test_bos_is_no_token_of_a_prompt() -> None:
    model = opened("olmoe")
    bridge = tiny.build_bridge(model.hf, "olmoe", tokenizer=tiny.tiny_tokenizer())
    moe = mi.attach(bridge)
    texts = [" ".join(f"w{t}" for t in tokens) for tokens in A]
    result = mi.contrast_experts(moe, texts, [f"{text} w9" for text in texts], paired=True, progress=False)
    assert result.data["n_tokens"].values[:4].tolist() == [len(tokens) for tokens in A]
    expected = shares_of(model, [1, *A[0]], slice(1, None))
    np.testing.assert_allclose(result.data["selection"].values[0], expected, atol=1e-12)


def test_repeated_prompts_count_once_and_items_are_read_without_their_answers() -> None:
    model = opened("olmoe")
    plain = mi.contrast_experts(model.moe, A, B, progress=False)
    with pytest.warns(RepeatedContentWarning, match=r"1 prompts .*'a:4' \(as 'a:1'\)"):
        repeated = mi.contrast_experts(model.moe, [*A, A[1]], B, progress=False)
    np.testing.assert_array_equal(repeated.data["selection"], plain.data["selection"])
    assert repeated.data.attrs["merged"] == {"a:1": ["a:4"]}
    items = [{"id": f"i{n}", "domain": "d", "prompt": tokens, "answer": [3, 4]} for n, tokens in enumerate(A)]
    of_items = mi.contrast_experts(model.moe, items, B, progress=False)
    np.testing.assert_array_equal(of_items.data["selection"], plain.data["selection"])
    assert of_items.data["prompt"].values[0] == "a:i0"


def test_what_cannot_be_contrasted_is_refused_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("olmoe")

    def no_pass(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a forward pass ran")

    monkeypatch.setattr(model.bridge.original_model, "forward", no_pass)
    for a, b, options, error, text in (
        (A[:1], B, {}, DataError, r"prompts_a: 1 different prompts. .*two, since prompts are what varies"),
        (A, [], {}, DataError, r"prompts_b: 0 different prompts"),
        (A, [*B, A[0]], {}, DataError, r"prompt '0' of prompts_a, which is '3' of prompts_b"),
        (A, B, {"paired": True}, DataError, r"4 and 3 prompts that are paired"),
        (A[:1], B[:1], {"paired": True}, DataError, r"1 different pairs"),
        ("a text", B, {}, DataError, r"prompts_a: one text. .*Wrap it in a list"),
        (["a text", "another"], B, {}, DataError, r"tokenizer"),
        ([{"id": 1, "prompt": A[0]}, {"id": 1, "prompt": A[1]}], B, {}, DataError, r"id '1' more than once"),
        ([{"answer": A[0]}, A[1]], B, {}, DataError, r"one of prompt, text, tokens and messages"),
        (A, B, {"phase": "both"}, ConfigError, r"phase='both'"),
        (A, B, {"layers": [1, 1]}, ConfigError, r"layers \[1, 1\].*each once"),
        ([[True, 2], A[0]], B, {}, DataError, r"prompt \[True, 2\]"),
        (A, B, {"layers": [9]}, HookError, r"layer 9"),
        (A, B, {"max_new_tokens": 0}, ConfigError, r"max_new_tokens=0"),
        (A, B, {"seed": 1.5}, ConfigError, r"seed=1.5"),
    ):
        with pytest.raises(error, match=text):
            mi.contrast_experts(model.moe, a, b, progress=False, **options)  # type: ignore[arg-type]
    with pytest.raises(AttachError, match=r"an encoder-decoder"):
        mi.contrast_experts(opened("switch_transformers").moe, A, B, progress=False)


# --- steering -------------------------------------------------------------------------------------------------

FOUND = {0: [1, 4], 1: [2]}


def test_losses_and_metrics_are_those_of_the_hooks_one_prompt_at_a_time() -> None:
    model = opened("olmoe")
    moe = model.moe
    held = [{"id": f"s{n}", "tokens": tokens, "domain": "xy"[n % 2]} for n, tokens in enumerate([*A, *B])]
    first = lambda logits: logits[7]  # noqa: E731
    count = lambda completion: sum(completion.tokens)  # noqa: E731
    for how, change in (("suppress", mi.suppress_experts), ("promote", mi.promote_experts)):
        result = mi.steering_effect(
            moe,
            FOUND,
            prompts=A,
            metric=count,
            logits_metric=first,
            held_out=held,
            how=how,  # type: ignore[arg-type]
            random_draws=2,
            max_new_tokens=3,
            progress=False,
        )
        drawn = {int(layer): ids for layer, ids in result.data.attrs["random_experts"][1].items()}
        assert {layer: len(ids) for layer, ids in drawn.items()} == {0: 2, 1: 1}
        assert all(not set(drawn[layer]) & set(FOUND[layer]) for layer in FOUND)
        for variant, experts in (("natural", None), ("steered", FOUND), ("random 1", drawn)):
            hooks = [] if experts is None else change(moe, list(experts), experts, positions="all")
            at = result.data.sel(variant=variant)
            for n, tokens in enumerate([*A, *B]):
                with torch.no_grad():
                    logits = model.bridge.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)
                logp = logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1))
                assert float(at["loss"][n]) == pytest.approx(-float(logp.mean()), abs=2e-5)
                if n < len(A):
                    assert float(at["logits_metric"][n]) == pytest.approx(float(logits[0, -1, 7]), abs=2e-5)
            with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
                out: Tensor = model.bridge.generate(
                    torch.tensor([A[1]]), max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False
                )
            new = out[0].tolist()[len(A[1]) :]
            new = new[: new.index(2)] if 2 in new else new
            assert float(at["metric"][1]) == sum(new)
        table = result.effects()
        assert list(table["domain"]) == ["all", "all", "all", "x", "y"]
        moved = (table["effect"] != 0).any()
        assert moved
        assert 0 < float(result.data["slot_share"].sel(variant="steered")) < 1
        assert mi.load_result  # the result is one of the package's own
        assert "experts in 2 layers" in result.summary()


def test_steering_takes_as_many_as_the_family_can_and_a_contrasts_own() -> None:
    model = opened("olmoe")
    result = mi.contrast_experts(model.moe, A, B, progress=False)
    with pytest.raises(ConfigError, match=r"a contrast in which no expert is used more by set a"):
        mi.steering_effect(model.moe, result, held_out=A, progress=False)
    with pytest.raises(ConfigError, match=r"no experts to steer"):
        result.steer(model.moe)
    for wrong in ({"side": "c"}, {"n": 0}, {"n": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            result.top(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"most=-1"):
        result.found(most=-1)
    with pytest.raises(ConfigError, match=r"alpha is x"):
        result.experts(alpha="x")  # type: ignore[arg-type]
    assert len(result.steer(model.moe, experts=[(0, 1), (1, 2)])) == len(result.steer(model.moe, experts={0: 1, 1: 2}))  # type: ignore[dict-item]
    hooks = result.steer(model.moe, "promote", experts={1: [3, 0, 5]})
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
        cache = model.bridge.run_with_cache(torch.tensor([A[0]]), names_filter=model.moe.filter("expert_indices"))[1]
    assert cache["expert_indices", 1][0].sort(-1).values.tolist() == [[0, 3]] * len(A[0])
    effect = mi.steering_effect(model.moe, [(0, 1), (0, 2), (1, 7)], held_out=A, random_draws=1, progress=False)
    assert effect.data.attrs["experts"] == {"0": [1, 2], "1": [7]}


def test_what_cannot_be_steered_or_measured_is_refused() -> None:
    moe = opened("olmoe").moe
    for options, error, text in (
        ({"experts": {}}, ConfigError, r"experts of layers \[\]"),
        ({"experts": 5}, ConfigError, r"a contrast, \{layer: \[expert\]\} or pairs"),
        ({"experts": {9: [0]}}, HookError, r"layer 9"),
        ({"held_out": None}, ConfigError, r"nothing to measure"),
        ({"prompts": A}, ConfigError, r"prompts without a metric"),
        ({"metric": len}, ConfigError, r"a metric without prompts"),
        ({"how": "steer"}, ConfigError, r"how='steer'"),
        ({"random_draws": 0}, ConfigError, r"random_draws=0"),
        ({"prompts": [], "metric": len}, DataError, r"prompts: none"),
        ({"prompts": A, "metric": "accuracy"}, ConfigError, r"metric='accuracy'.*a function"),
        ({"prompts": A, "logits_metric": lambda z: z}, DataError, r"logits_metric on prompt '0' gave a value of shape"),
        ({"prompts": A, "metric": lambda c: "good"}, DataError, r"metric on prompt '0' gave 'good'. Expected: one fin"),
    ):
        arguments = {"experts": FOUND, "held_out": A, "max_new_tokens": 2, "progress": False, **options}
        with pytest.raises(error, match=text):
            mi.steering_effect(moe, **arguments)  # type: ignore[arg-type]


def test_repeated_prompts_are_measured_once_and_sequences_may_be_an_array_or_read_once() -> None:
    moe = opened("olmoe").moe
    rows = [[3, 4, 5], [7, 8, 9]]
    options: dict[str, Any] = {"random_draws": 1, "progress": False}
    with pytest.warns(UserWarning, match="1 prompts have the content of another"):
        found = mi.steering_effect(moe, FOUND, [A[0], A[0], A[1]], logits_metric=lambda z: z[3], **options)
    assert found.data["prompt"].values.tolist() == ["0", "2"]
    losses = [
        mi.steering_effect(moe, FOUND, held_out=given, **options).data["loss"].values
        for given in (rows, torch.tensor(rows), np.array(rows), iter(rows))
    ]
    for other in losses[1:]:
        np.testing.assert_array_equal(losses[0], other)


def test_a_text_without_a_token_is_refused_in_words() -> None:
    moe = mi.load_demo()[0]  # whose tokenizer has no BOS
    for phase in ("prompt", "generated"):
        with pytest.raises(DataError, match=r"prompts_a, prompt '0' without a token"):
            mi.contrast_experts(moe, ["", "one"], ["two", "three"], phase=phase, progress=False)  # type: ignore[arg-type]
