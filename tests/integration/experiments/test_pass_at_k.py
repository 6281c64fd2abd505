"""Sampling completions through the bridge: against transformers' generate, over batch sizes, with hooks, resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chisquare
from torch.overrides import TorchFunctionMode

import moe_interp as mi
from moe_interp.engine.decoding.cached_decoder import CachedDecoder
from moe_interp.errors import AttachError, ConfigError, DataError, ResultError
from moe_interp.experiments.inputs.repeats import RepeatedContentWarning
from moe_interp.experiments.pass_at_k.completions import Completion, read_completions
from moe_interp.experiments.pass_at_k.problems import check_problems
from moe_interp.experiments.pass_at_k.sampling_run import CheckerRaisedWarning
from tests.tiny import ENCODER_DECODERS, build_bridge, build_hf, random_tokens, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
Drawn = dict[tuple[str, int], tuple[int, ...]]


def by_ids(tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Problems of ids, with the row's number as their id."""
    return [{"id": str(i), "prompt": row, "answer": "1"} for i, row in enumerate(tokens.tolist())]


def drawn(moe: mi.MoEHooks, problems: list[Any], path: Path, **options: Any) -> Drawn:
    """The ids of all completions, by problem and sample."""
    options = {"n_samples": 1, "ks": (1,), "is_correct": never, "progress": False, "store": path} | options
    mi.evaluate_pass_at_k(moe, problems, **options)
    return {(c.problem, c.sample): c.ids for c in read_completions(path)}


def never(completion: str, problem: Any) -> bool:
    return False


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[mi.MoEHooks, list[dict[str, Any]]]]:
    moe, items = mi.load_demo()
    problems = [
        {"id": item.id, "prompt": item.fields["question"], "answer": item.fields["final_answer"]}
        for item in items["arithmetic"]
    ]
    with moe:
        yield moe, problems


@pytest.fixture(scope="module")
def tiny() -> Iterator[mi.MoEHooks]:
    bridge = build_bridge(build_hf("olmoe"), "olmoe", tiny_tokenizer())
    with mi.attach(bridge) as moe:
        yield moe


# --- against transformers -------------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_transformers_generate(family: str, tmp_path: Path) -> None:
    hf = build_hf(family)
    tokens = random_tokens(3, 6)
    with mi.attach(build_bridge(hf, family)) as moe:
        if family in ENCODER_DECODERS:
            with pytest.raises(AttachError, match="decoder-only"):
                drawn(moe, by_ids(tokens), tmp_path / "c.jsonl")
            return
        found = drawn(moe, by_ids(tokens), tmp_path / "c.jsonl", temperature=0, max_new_tokens=6)
    mask = torch.ones_like(tokens)
    wanted = hf.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=6, pad_token_id=0)[:, 6:]
    for row, ids in enumerate(wanted.tolist()):
        own = found[str(row), 0]
        assert own == tuple(ids[: len(own)])
        assert len(own) == 6 or own[-1] in (hf.generation_config.eos_token_id, 2)


def test_greedy_completions_of_the_demo_model(demo: tuple[mi.MoEHooks, list[Any]], tmp_path: Path) -> None:
    moe, problems = demo
    found = drawn(moe, problems[:3], tmp_path / "c.jsonl", temperature=0, max_new_tokens=20)
    model: Any = moe.bridge.original_model
    for problem in problems[:3]:
        ids = moe.bridge.to_tokens(problem["prompt"])
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
        assert found[problem["id"], 0] == tuple(whole[0, ids.shape[1] :].tolist())


def test_first_tokens_have_the_models_law(tiny: mi.MoEHooks) -> None:
    tokens, n = random_tokens(1, 5), 6000
    with torch.no_grad():
        p = (tiny.bridge(tokens)[0, -1].double() / 1.5).softmax(-1)
    kept = p.sort(descending=True)
    inside = kept.indices[: int((kept.values.cumsum(0) < 0.9).sum()) + 1]
    law = torch.zeros_like(p)
    law[inside] = p[inside] / p[inside].sum()
    seen: list[int] = []
    mi.evaluate_pass_at_k(
        tiny,
        by_ids(tokens),
        n_samples=n,
        ks=(1,),
        temperature=1.5,
        top_p=0.9,
        max_new_tokens=1,
        is_correct=lambda text, problem: seen.append(int(text[1:]) if text else 2) is None,
        batch_size=2000,
        progress=False,
    )
    # special tokens have no text; they count together with token 2
    expected = law.numpy() * n
    expected[2], expected[:2] = expected[:3].sum(), 0
    counts = np.bincount(seen, minlength=len(expected))
    assert not counts[expected == 0].any()
    few = expected < 10
    observed = np.append(counts[~few], counts[few].sum())
    wanted = np.append(expected[~few], expected[few].sum())
    assert chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


# --- batches --------------------------------------------------------------------------------------------------


# of widths that 32 divides, in their tiny forms too, and without a gate of a single number
EXACT = ("olmoe", "mixtral", "flex_olmo", "gpt_oss", "granite_moe", "phimoe")


TWO_KEYS = torch.arange(2)
ROUNDED = ("deepseek_v2", "qwen3_next", "nemotron_h", "llama4")


@pytest.mark.parametrize("family", [*EXACT, *ROUNDED])
def test_a_rows_logits_are_the_same_bits_in_every_batch(family: str) -> None:
    prompts, forced = random_tokens(5, 7), random_tokens(40, 4, seed=3)
    with mi.attach(build_bridge(build_hf(family), family)) as moe:
        decoder = CachedDecoder(moe)

        def logits(n_prompts: int, n_rows: int) -> torch.Tensor:
            with decoder.running():
                read = decoder.prompts(prompts[:n_prompts], torch.arange(n_prompts))
                rows = decoder.rows(read, torch.arange(n_rows) % n_prompts, torch.arange(n_rows))
                found = [rows.logits]
                for step in range(4):
                    rows.step(forced[:n_rows, step])
                    found.append(rows.logits)
            return torch.stack(found, dim=1)

        whole = logits(5, 40)
        for n_prompts, n_rows in ((1, 1), (2, 2), (5, 7), (5, 17)):
            found = logits(n_prompts, n_rows)
            same = n_rows if n_prompts == 5 else 1  # rows of the same prompts
            torch.testing.assert_close(found[:same], whole[:same], rtol=0, atol=1e-4)
            if family in EXACT:
                assert torch.equal(found[:same], whole[:same])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "jamba", "nemotron_h", "jetmoe", "llama4", "deepseek_v3"])
def test_short_passes_have_no_product_of_fewer_than_sixteen_rows(family: str) -> None:
    found: list[int] = []

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.linear:
                found.append(args[0].shape[:-1].numel())
            return func(*args, **(kwargs or {}))

    with mi.attach(build_bridge(build_hf(family), family)) as moe:
        decoder = CachedDecoder(moe)
        with decoder.running(), Products():
            rows = decoder.rows(decoder.prompts(random_tokens(1, 5), torch.arange(1)), torch.zeros(2).long(), TWO_KEYS)
            rows.step(torch.tensor([5, 6]))
    assert len(found) > 10
    assert min(n for n in found if n) >= 16  # an expert without a row has a product of none


def test_passes_without_hooks_are_those_with_hooks_that_change_nothing(tiny: mi.MoEHooks) -> None:
    tokens, seen = random_tokens(1, 6), list[str]()

    def look(value: torch.Tensor, hook: Any) -> None:
        seen.append(hook.name)

    def logits(hooks: Any) -> torch.Tensor:
        decoder = CachedDecoder(tiny, hooks)
        with decoder.running():
            rows = decoder.rows(decoder.prompts(tokens, torch.arange(1)), torch.zeros(2).long(), TWO_KEYS)
            rows.step(torch.tensor([5, 6]))
        return rows.logits

    plain = logits([])
    assert not seen
    names = ["blocks.0.attn.hook_pattern", "blocks.1.hook_out", tiny.hook_name("router_logits", 0)]
    for name in names:
        assert torch.equal(logits([(name, look)]), plain)
        assert seen == [name] * 2
        seen.clear()
    # a hook of torch's own on a component
    component: Any = tiny.bridge.blocks[0].attn
    with component.register_forward_hook(lambda module, args, output: seen.append("torch")):
        assert torch.equal(logits([]), plain)
    assert seen == ["torch"] * 2


def test_between_two_passes_and_after_an_error_the_components_are_in_place(tiny: mi.MoEHooks) -> None:
    def state() -> list[tuple[str, int, Any]]:
        return [(n, id(m), m.__dict__.get("forward")) for n, m in tiny.bridge.original_model.named_modules()]

    tokens, before, decoder = random_tokens(1, 6), state(), CachedDecoder(tiny)
    names = {name for name in tiny.bridge.run_with_cache(tokens)[1] if "attn.hook" in name}
    with decoder.running():
        read = decoder.prompts(tokens, torch.arange(1))
        assert names <= {*tiny.bridge.run_with_cache(tokens)[1]}
        rows = decoder.rows(read, torch.zeros(2).long(), TWO_KEYS)
        # a hook that comes in between is honoured
        seen: list[int] = []
        with tiny.bridge.hooks([("blocks.0.attn.hook_out", lambda value, hook: seen.append(len(value)))]):
            rows.step(torch.tensor([5, 6]))
        assert seen == [2]
    assert state() == before
    with pytest.raises(IndexError), decoder.running():
        rows.step(torch.tensor([5, 10**6]))
    assert state() == before


def test_completions_do_not_depend_on_the_batch(demo: tuple[mi.MoEHooks, list[Any]], tmp_path: Path) -> None:
    moe, problems = demo
    chosen = [p for p in problems if len(moe.bridge.to_tokens(p["prompt"])[0]) == 28][:3] + problems[:1]
    options = {"n_samples": 4, "temperature": 1.2, "top_p": 0.98, "max_new_tokens": 10}
    found = [drawn(moe, chosen, tmp_path / f"{size}", batch_size=size, **options) for size in (1, 7, 64)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) > 10
    # nor on the other problems, their order, or how many samples are drawn
    some = drawn(moe, chosen[2:0:-1], tmp_path / "some", **{**options, "n_samples": 2})
    assert some.items() <= found[0].items()
    other = drawn(moe, chosen[:1], tmp_path / "other", seed=1, **options)
    assert not other.items() <= found[0].items()


def test_interventions_that_draw_do_not_depend_on_the_batch(tiny: mi.MoEHooks, tmp_path: Path) -> None:
    problems = by_ids(random_tokens(4, 6))
    hooks = mi.random_routing(tiny, positions="all")
    options = {"n_samples": 5, "temperature": 1.0, "max_new_tokens": 6, "hooks": hooks}
    found = [drawn(tiny, problems, tmp_path / f"{size}", batch_size=size, **options) for size in (1, 7, 64)]
    assert found[0] == found[1] == found[2]
    plain = drawn(tiny, problems, tmp_path / "plain", n_samples=5, temperature=1.0, max_new_tokens=6)
    assert plain != found[0]


@pytest.mark.parametrize("positions", [None, "new", "all"])
def test_hooks_act_as_under_generate(tiny: mi.MoEHooks, tmp_path: Path, positions: Any) -> None:
    tokens = random_tokens(2, 6, seed=5)
    hooks = mi.force_experts(tiny, 0, 3, positions=positions)
    found = drawn(tiny, by_ids(tokens), tmp_path / "c", temperature=0, max_new_tokens=8, hooks=hooks)
    free = drawn(tiny, by_ids(tokens), tmp_path / "free", temperature=0, max_new_tokens=8)
    assert found != free
    with torch.no_grad(), tiny.bridge.hooks(fwd_hooks=hooks):
        wanted = tiny.bridge.generate(tokens, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
    for row, ids in enumerate(wanted[:, 6:].tolist()):
        own = found[str(row), 0]
        assert own == tuple(ids[: len(own)])


# --- ends -----------------------------------------------------------------------------------------------------


def completions(moe: mi.MoEHooks, problems: list[Any], path: Path, **options: Any) -> list[Completion]:
    drawn(moe, problems, path, **options)
    return read_completions(path)


def test_completions_end_with_eos_a_stop_text_or_their_length(tiny: mi.MoEHooks, tmp_path: Path) -> None:
    problems, options = by_ids(random_tokens(1, 6)), {"n_samples": 60, "temperature": 3.0, "top_p": 1.0}
    free = completions(tiny, problems, tmp_path / "a", max_new_tokens=12, **options)
    assert {one.finish for one in free} == {"eos", "length"}
    for one in free:
        assert (one.ids[-1] == 2) == (one.finish == "eos")
        assert len(one.ids) == 12 or one.finish == "eos"
        assert "<eos>" not in one.text
    stop = ["w33", "w5 w", "w40"]
    stopped = completions(tiny, problems, tmp_path / "b", max_new_tokens=12, stop=stop, **options)
    assert {one.finish for one in stopped} == {"eos", "length", "stop"}
    for one, whole in zip(sorted(stopped, key=lambda c: c.sample), sorted(free, key=lambda c: c.sample)):
        assert whole.ids[: len(one.ids)] == one.ids
        places = [place for text in stop if (place := whole.text.find(text)) >= 0]
        assert (one.finish == "stop") == bool(places)
        assert one.text == (whole.text[: min(places)] if places else whole.text)


def test_samples_that_have_ended_leave_the_batch(tiny: mi.MoEHooks, tmp_path: Path) -> None:
    rows: list[int] = []
    name = tiny.hook_name("router_in", 0)
    options = {"n_samples": 30, "temperature": 3.0, "top_p": 1.0, "max_new_tokens": 12}
    found = completions(
        tiny,
        by_ids(random_tokens(1, 6)),
        tmp_path / "c",
        hooks=[(name, lambda value, hook: rows.append(len(value)))],
        **options,
    )
    lengths = np.array([len(one.ids) for one in found])
    assert rows == [1] + [int((lengths > step).sum()) for step in range(1, 12)]


# --- prompts --------------------------------------------------------------------------------------------------


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    bridge = build_bridge(build_hf("olmoe"), "olmoe", tiny_tokenizer(chat_template=TEMPLATE))
    chat = [{"id": "m", "messages": [{"role": "user", "content": "w3 w4"}], "answer": 1}]
    text = [{"id": "m", "prompt": "w3 w4 w9", "answer": 1}]
    with mi.attach(bridge) as moe:
        options: dict[str, Any] = {"n_samples": 3, "temperature": 1.0, "max_new_tokens": 5}
        assert drawn(moe, chat, tmp_path / "a", **options) == drawn(moe, text, tmp_path / "b", **options)


def test_what_cannot_be_sampled_is_refused_before(tiny: mi.MoEHooks, tmp_path: Path) -> None:
    good = {"id": "g", "prompt": "w3", "answer": "1"}
    chat = {"id": "m", "messages": [{"role": "user", "content": "w3"}], "answer": "1"}
    long = {"id": "l", "prompt": [3] * 10_000, "answer": "1"}
    for problems, options, error, message in (
        ([{"id": "x", "prompt": "w3"}], {}, DataError, "problem 1: no answer among its fields id, prompt"),
        ([good, {"id": "x", "answer": "3"}], {}, DataError, "problem 2: no prompt"),
        ([good, good], {}, DataError, "'g' more than once"),
        ([good, {**good, "id": "x", "answer": " \n"}], {"is_correct": never}, DataError, "problem 2: no answer"),
        ([{**good, "answer": float("nan")}], {"is_correct": never}, DataError, "problem 1: no answer"),
        ([{**good, "answer": np.float32("nan")}], {"is_correct": never}, DataError, "problem 1: no answer"),
        ([{**good, "answer": pd.NA}], {"is_correct": never}, DataError, "problem 1: no answer"),
        ([], {}, DataError, "no problems"),
        (None, {}, DataError, "problems of type NoneType"),
        ([good], {"stop": 5}, ConfigError, "stop=5"),
        ([good], {"ks": None}, ConfigError, "ks=None"),
        ([good, {**good, "id": "x", "answer": "one"}], {}, DataError, "problem 'x': answer 'one' without a number"),
        ([good, chat], {}, DataError, "problem 'm': messages, but the tokenizer has no chat template"),
        ([good, long], {}, DataError, "problem 'l'.*context"),
        ([good], {"ks": (1, 3)}, ConfigError, "k=3 with n_samples=2"),
        ([good], {"ks": ()}, ConfigError, "ks without a number"),
        ([good], {"ks": (0,)}, ConfigError, "k=0"),
        ([good], {"n_samples": 0}, ConfigError, "n_samples=0"),
        ([good], {"n_samples": 2.0}, ConfigError, "n_samples=2.0"),
        ([good], {"temperature": -1}, ConfigError, "temperature=-1"),
        ([good], {"temperature": float("nan")}, ConfigError, "temperature=nan"),
        ([good], {"top_p": 0}, ConfigError, "top_p=0"),
        ([good], {"top_p": 1.1}, ConfigError, "top_p=1.1"),
        ([good], {"stop": [""]}, ConfigError, "stop="),
        ([good], {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
        ([good], {"max_new_tokens": 10_000}, DataError, "max_new_tokens=10000.*context"),
        ([good], {"batch_size": 0}, ConfigError, "batch_size=0"),
        ([good], {"is_correct": "maths"}, ConfigError, "is_correct='maths'"),
        ([good], {"memory_budget": 10}, ConfigError, "memory budget"),
    ):
        options = {"n_samples": 2, "ks": (1,), "max_new_tokens": 2, "store": tmp_path / "c"} | options
        with pytest.raises(error, match=message):
            mi.evaluate_pass_at_k(tiny, problems, **options)
    assert not list(tmp_path.iterdir())


def test_problems_of_one_content_count_once(tiny: mi.MoEHooks, tmp_path: Path) -> None:
    problems = [{"id": name, "prompt": "w3 w4", "answer": answer} for name, answer in (("a", 1), ("b", 1), ("c", 2))]
    with pytest.warns(RepeatedContentWarning, match=r"1 problems have .*'b' \(as 'a'\)"):
        found = mi.evaluate_pass_at_k(tiny, problems, 2, (1,), max_new_tokens=2, progress=False)
    assert found.data["problem"].values.tolist() == ["a", "c"]
    assert found.data.attrs["merged"] == {"a": ["b"]}


# --- resumed --------------------------------------------------------------------------------------------------


def test_a_run_goes_on_exactly_where_it_ended(tiny: mi.MoEHooks, tmp_path: Path) -> None:
    problems = by_ids(random_tokens(3, 6))
    options: dict[str, Any] = {"ks": (1,), "temperature": 1.0, "max_new_tokens": 6, "progress": False}
    whole = mi.evaluate_pass_at_k(tiny, problems, 6, is_correct=is_long, store=tmp_path / "whole", **options)
    few = mi.evaluate_pass_at_k(tiny, problems, 2, is_correct=is_long, store=tmp_path / "parts", **options)
    assert few.data["n"].values.tolist() == [2, 2, 2]
    content = (tmp_path / "parts").read_bytes()
    (tmp_path / "parts").write_bytes(content[:-20])
    again = mi.evaluate_pass_at_k(tiny, problems, 6, is_correct=is_long, store=tmp_path / "parts", **options)
    assert again.data.identical(whole.data)
    lines = [sorted((tmp_path / name).read_text().splitlines()) for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    before = (tmp_path / "parts").read_bytes()
    mi.evaluate_pass_at_k(tiny, problems, 3, is_correct=is_long, store=tmp_path / "parts", **options)
    assert (tmp_path / "parts").read_bytes() == before  # fewer samples are the first of them
    for changed, message in (
        ({"temperature": 0.5}, "temperature=1.0 there, 0.5 here"),
        ({"seed": 3}, "seed=0 there, 3 here"),
        ({"stop": "w3"}, "stop"),
        ({"is_correct": never}, "is_correct"),
        ({"hooks": mi.force_experts(tiny, 0, 1)}, "the model's hooks"),
    ):
        asked = options | {"is_correct": is_long} | changed
        with pytest.raises(ResultError, match=f"completions of another run.*{message}"):
            mi.evaluate_pass_at_k(tiny, problems, 6, store=tmp_path / "parts", **asked)
    with pytest.raises(ResultError, match="problems"):
        mi.evaluate_pass_at_k(tiny, problems[:2], 6, is_correct=is_long, store=tmp_path / "parts", **options)
    assert (tmp_path / "parts").read_bytes() == before


def is_long(completion: str, problem: Any) -> bool:
    return len(completion) > 15


def test_nothing_that_was_sampled_is_lost_by_an_interruption(tiny: mi.MoEHooks, tmp_path: Path) -> None:
    problems, path = by_ids(random_tokens(2, 6)), tmp_path / "c"
    options: dict[str, Any] = {"ks": (1,), "temperature": 1.0, "max_new_tokens": 4, "progress": False, "store": path}
    calls: list[str] = []

    def check(completion: str, problem: Any) -> bool:
        calls.append(completion)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return len(completion) > 11

    with pytest.raises(KeyboardInterrupt):
        mi.evaluate_pass_at_k(tiny, problems, 6, is_correct=check, **options)
    kept = read_completions(path)
    assert [one.text for one in kept] == calls
    assert kept[-1].correct is None
    found = mi.evaluate_pass_at_k(tiny, problems, 6, is_correct=check, **options)
    assert len(calls) == 13  # the interrupted one is checked again, nothing is drawn again
    assert found.data["n_errors"].values.sum() == 0
    wanted = [[len(c.text) > 11 for c in read_completions(path) if c.problem == str(p)] for p in range(2)]
    assert found.data["c"].values.tolist() == [sum(row) for row in wanted]


def test_a_checker_that_raises_loses_nothing_and_is_named(tiny: mi.MoEHooks, tmp_path: Path) -> None:
    problems, path = by_ids(random_tokens(2, 6)), tmp_path / "c"
    is_broken = True

    def check(completion: str, problem: Any) -> Any:
        if is_broken and problem.id == "1":
            raise ValueError("no such formula\nmore")
        return True

    options: dict[str, Any] = {"ks": (1, 3), "max_new_tokens": 3, "progress": False, "store": path}
    with pytest.warns(CheckerRaisedWarning, match=r"3 completions, of problem '1' \(ValueError: no such formula\)"):
        found = mi.evaluate_pass_at_k(tiny, problems, 3, is_correct=check, **options)
    assert found.data["c"].values.tolist() == [3, 0]
    assert found.data["n_errors"].values.tolist() == [0, 3]
    assert "The checker raised on 3 completions of 1 problems" in found.summary()
    assert {one.error for one in read_completions(path)} == {None, "ValueError: no such formula"}
    is_broken = False
    again = mi.evaluate_pass_at_k(tiny, problems, 3, is_correct=check, **options)
    assert again.data["c"].values.tolist() == [3, 3]
    short: dict[str, Any] = {"n_samples": 1, "ks": (1,), "max_new_tokens": 2, "progress": False}
    for returned, said in (
        (None, "None of type NoneType"),
        (torch.tensor(torch.nan), r"tensor\(nan\) of type Tensor"),
        (Unspeakable(), r"\(it cannot be shown\) of type Unspeakable"),
    ):
        with pytest.warns(CheckerRaisedWarning, match=f"it returned {said}, not True or False"):
            mi.evaluate_pass_at_k(tiny, problems, is_correct=lambda t, p, returned=returned: returned, **short)
    for truth in (np.True_, np.array(True), torch.tensor([True])):
        found = mi.evaluate_pass_at_k(tiny, problems, is_correct=lambda t, p, truth=truth: truth, **short)
        assert found.data["c"].values.tolist() == [1, 1]

    def fails(completion: str, problem: Any) -> bool:
        raise Unspeakable

    with pytest.warns(
        CheckerRaisedWarning, match=r"of problem '0', problem '1' \(Unspeakable: \(it cannot be shown\)\)"
    ):
        mi.evaluate_pass_at_k(tiny, problems, is_correct=fails, **short)


class Unspeakable(Exception):
    """What cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


def test_logits_that_are_not_finite_name_the_problem_and_leave_the_model_as_it_was(tiny: mi.MoEHooks) -> None:
    config: Any = tiny.bridge.original_model.config
    before = config._experts_implementation
    problems = by_ids(random_tokens(2, 6))

    def spoil(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.full_like(value, torch.nan)

    hooks = [("unembed.hook_in", spoil)]
    with pytest.raises(DataError, match="problem '0', sample 0: logits that are not finite"):
        mi.evaluate_pass_at_k(tiny, problems, 1, (1,), hooks=hooks, max_new_tokens=2, progress=False)
    assert config._experts_implementation == before
    assert not tiny.bridge.hook_dict["unembed.hook_in"].has_hooks()
    assert all("forward" not in vars(m) for m in tiny.bridge.original_model.modules() if type(m).__name__ == "Linear")


# --- files ----------------------------------------------------------------------------------------------------


def test_problems_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "aime.jsonl"
    lines = [{"problem": "a?", "answer": 204, "year": 2024}, {"problem": "b?", "answer": "7", "id": "x", "domain": "d"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = mi.load_problems(path, prompt_field="problem")
    assert [(p.id, p.domain, p.prompt, p.answer) for p in found] == [("1", "all", "a?", "204"), ("x", "d", "b?", "7")]
    assert found[0].fields == {"year": 2024}
    assert found[1].place == "problem 'x' (aime.jsonl, line 2)"
    assert len(mi.load_problems(path, prompt_field="problem", first=1)) == 1
    numbers = [np.int64(65), np.float32(0.5), torch.tensor(3), 7.0]
    assert [p.answer for p in check_problems([{"prompt": "a?", "answer": n} for n in numbers])] == [
        "65",
        "0.5",
        "3",
        "7.0",
    ]
    again = tmp_path / "hmmt.jsonl"
    again.write_text(path.read_text().splitlines()[0])
    assert [p.id for p in mi.load_problems(path, again, prompt_field="problem")] == ["1", "x", "hmmt-1"]
    with pytest.raises(DataError, match=r"aime.jsonl, line 1: no prompt among its fields problem, answer, year"):
        mi.load_problems(path)
    path.write_text('{"prompt": "a?"}')
    with pytest.raises(DataError, match=r"line 1: no answer"):
        mi.load_problems(path)


def test_problems_are_read_from_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "test.jsonl").write_text('{"question": "a?", "answer": 3}\n{"question": "b?", "answer": 4}\n')
    found = mi.load_problems(f"hub:{tmp_path}", prompt_field="question")
    assert [(p.id, p.prompt, p.answer) for p in found] == [("1", "a?", "3"), ("2", "b?", "4")]
    with pytest.raises(DataError, match="split 'none', which cannot be read"):
        mi.load_problems(f"hub:{tmp_path}:none", prompt_field="question")
