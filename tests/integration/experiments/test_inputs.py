"""What the model is given of texts and conversations, whichever tokenizer it has and whichever call reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import moe_interp as mi
from moe_interp.errors import DataError
from moe_interp.tokenization import RepeatedBOSWarning, TextReader
from tests import tiny

TEMPLATE = (
    "<bos> {% for m in messages %}w50 {{ m['content'] }} w51 {% endfor %}{% if add_generation_prompt %}w52 {% endif %}"
)
QUESTION = {"role": "user", "content": "w3 w4"}
RENDERED = "<bos> w50 w3 w4 w51 w52"
OPENED = (1, 50, 3, 4, 51, 52)
QUIET: dict[str, Any] = {"layers": [1], "progress": False}


def attached(name: str = "mixtral", **options: Any) -> mi.MoEHooks:
    return mi.attach(
        tiny.build_bridge(tiny.build_hf(name), name, tiny.tiny_tokenizer(chat_template=TEMPLATE, **options))
    )


@contextmanager
def rows_given(moe: mi.MoEHooks) -> Iterator[list[tuple[int, ...]]]:
    """The rows of ids that the model embeds; the first is a whole sequence, later ones may be parts of it."""
    rows: list[tuple[int, ...]] = []

    def record(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        rows.extend(map(tuple, args[0].tolist()))

    handle = moe.bridge.original_model.get_input_embeddings().register_forward_pre_hook(record)
    try:
        yield rows
    finally:
        handle.remove()


def isolate(moe: mi.MoEHooks, prompt: dict[str, Any]) -> Any:
    item = {"id": "0", "domain": "a", "answer": "w60 w61"} | prompt
    return mi.isolate_experts(moe, [item], experts=[0], **QUIET).data["delta"].values


def counterfactual(moe: mi.MoEHooks, prompt: dict[str, Any]) -> Any:
    given = {"id": "0", "answer": "w60 w61"} | prompt
    return mi.counterfactual_routes(moe, [given], n_routes=2, controls=False, **QUIET).data["logp"].values


CALLS: dict[str, Callable[[mi.MoEHooks, dict[str, Any]], Any]] = {
    "isolate_experts": isolate,
    "counterfactual_routes": counterfactual,
}


@pytest.mark.parametrize("call", CALLS)
def test_the_model_sees_bos_once_in_texts_messages_and_ids(call: str) -> None:
    moe = attached()
    expected = CALLS[call](moe, {"prompt": list(OPENED)})
    with rows_given(moe) as rows:
        got = CALLS[call](moe, {"messages": [QUESTION]})
    np.testing.assert_array_equal(got, expected)
    assert rows[0][: len(OPENED)] == OPENED
    with pytest.warns(RepeatedBOSWarning, match="begins with BOS") as said, rows_given(moe) as rows:
        got = CALLS[call](moe, {"prompt": RENDERED})
    (one,) = [one for one in said if one.category is RepeatedBOSWarning]
    assert one.filename == __file__
    np.testing.assert_array_equal(got, expected)
    assert rows[0][: len(OPENED)] == OPENED
    with pytest.warns(RepeatedBOSWarning, match="begins with two BOS"), rows_given(moe) as rows:
        CALLS[call](moe, {"prompt": [1, *OPENED]})
    assert rows[0][:3] == (1, 1, 50)


def test_an_answer_at_the_end_of_the_messages_is_scored_as_one_beside_them() -> None:
    moe = attached()
    whole = [QUESTION, {"role": "assistant", "content": "w60 w61"}]
    item: dict[str, Any] = {"id": "0", "domain": "a", "messages": whole}
    delta = mi.isolate_experts(moe, [item], experts=[0], **QUIET).data["delta"].values
    np.testing.assert_array_equal(delta, isolate(moe, {"messages": [QUESTION]}))


def test_scores_of_routes_and_verify_read_a_text_with_bos_as_one_without() -> None:
    moe = attached()
    routes = torch.tensor([0, 1]).expand(1, 5, 1, 2)
    expected = mi.score_routes(moe, torch.tensor([[1, 3, 4, 5, 6]]), 1, routes)
    plain = mi.score_routes(moe, "w3 w4 w5 w6", 1, routes)
    torch.testing.assert_close(plain, expected, equal_nan=True, atol=0, rtol=0)
    with pytest.warns(RepeatedBOSWarning, match=r"^1 text \(text 0\) begins with BOS"):
        given = mi.score_routes(moe, "<bos> w3 w4 w5 w6", 1, routes)
    torch.testing.assert_close(given, expected, equal_nan=True, atol=0, rtol=0)
    two = torch.tensor([[0, 1, 1, 3, 4], [1, 3, 4, 5, 6], [0, 0, 1, 1, 4]])
    mask = (two != 0).long()
    with pytest.warns(RepeatedBOSWarning, match=r"^2 sequences \(row 0, row 2\) begin with two BOS"):
        mi.score_routes(moe, two, 1, routes.expand(3, -1, -1, -1), attention_mask=mask)
    with pytest.warns(RepeatedBOSWarning, match=r"text\) begins with BOS"), rows_given(moe) as rows:
        assert moe.verify("<bos> w3 w4 w5 w6", layers=[1]).ok
    assert rows[0] == (1, 3, 4, 5, 6)
    with pytest.raises(DataError, match="the text: 71 tokens"):
        moe.verify("w3 " * 70)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_unequal_lengths_are_padded_after_bos_is_set(side: str) -> None:
    moe = attached(side=side, pad=False)
    routes = torch.tensor([0, 1]).expand(2, 4, 1, 2)
    with pytest.warns(RepeatedBOSWarning):
        scores = mi.score_routes(moe, ["<bos> w3 w4 w5", "w6 w7"], 1, routes)
    alone = mi.score_routes(moe, torch.tensor([[1, 6, 7]]), 1, routes[:1, :3])
    place = slice(1, 3) if side == "left" else slice(0, 2)
    torch.testing.assert_close(scores[1:, place], alone[:, :2])
    assert int(scores[1].isnan().sum()) == 2


def test_every_family_reads_plain_texts_as_its_bridge_and_bos_once(family: str) -> None:
    bridge = tiny.build_bridge(tiny.build_hf(family), family, tiny.tiny_tokenizer(chat_template=TEMPLATE))
    reader = TextReader(bridge)
    plain = bridge.to_tokens("w3 w4", truncate=False)[0].tolist()
    assert list(reader.start("w3 w4", "x")) == plain
    assert reader.start("<bos> <bos> w3 w4", "x") == (1, 3, 4)
    assert reader.messages((QUESTION,), "x", is_prompt=True) == OPENED
    with pytest.warns(RepeatedBOSWarning):
        reader.warn("text")


def test_plain_texts_and_messages_say_nothing() -> None:
    moe = attached()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        counterfactual(moe, {"messages": [QUESTION]})
        isolate(moe, {"prompt": "w3 w4"})
    assert not [one for one in said if issubclass(one.category, RepeatedBOSWarning)]


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[2J", "a\ud800"])
def test_a_model_whose_name_no_file_holds_is_refused_before_it_runs(name: str) -> None:
    moe = attached()
    moe.bridge.cfg.model_name = name
    for call in CALLS.values():
        with rows_given(moe) as rows, pytest.raises(DataError, match=r"the model.s name, bridge\.cfg\.model_name"):
            call(moe, {"prompt": "w3 w4"})
        assert not rows
