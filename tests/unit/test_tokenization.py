"""From texts, messages and ids to ids: BOS exactly once, whatever tokenizer, template and user write."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_interp.errors import DataError
from moe_interp.tokenization import (
    RepeatedBOSWarning,
    TextReader,
    check_messages,
    padded_ids,
)
from tests import tiny

TURNS = "{% for m in messages %}w50 {{ m['content'] }} w51 {% endfor %}{% if add_generation_prompt %}w52 {% endif %}"
PLAIN, WITH_BOS = TURNS, "<bos> " + TURNS
WITH_EOS = "{{ bos_token }}{% for m in messages %} w50 {{ m['content'] }} <eos>{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + TURNS
ASKED = ({"role": "user", "content": "w3 w4"},)
WHOLE = (*ASKED, {"role": "assistant", "content": "w5 w6"})


def bridge_with(**options: Any) -> TransformerBridge:
    return tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tiny.tiny_tokenizer(**options))


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return bridge_with(chat_template=WITH_BOS)


KINDS = {
    "bos, pad, left": {},
    "no pad": {"pad": False},
    "right": {"side": "right"},
    "no bos": {"bos": False},
    "no pad, no bos, right": {"pad": False, "bos": False, "side": "right"},
}


@pytest.mark.parametrize("wants_bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_texts_become_what_the_bridge_makes_of_them(kind: str, wants_bos: bool) -> None:
    bridge = bridge_with(**KINDS[kind])
    bridge.cfg.default_prepend_bos = wants_bos
    reader = TextReader(bridge)
    for text in ("w3", "w3 w4 w5", "  w9\nw8 "):
        assert list(reader.start(text, "x")) == bridge.to_tokens(text, truncate=False)[0].tolist()
    first = {True: 1 if KINDS[kind].get("bos", True) else 2, False: 3}[wants_bos]
    assert reader.start("w3 w4", "x")[0] == first
    reader.warn("text")  # nothing to say: warnings are errors


@pytest.mark.parametrize("wants_bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_bos_stands_once_however_often_it_is_written(kind: str, wants_bos: bool) -> None:
    bridge = bridge_with(**KINDS[kind])
    bridge.cfg.default_prepend_bos = wants_bos
    token, bos = bridge.tokenizer.bos_token, bridge.tokenizer.bos_token_id
    reader = TextReader(bridge)
    for times in (1, 2, 3):
        assert reader.start(f"{token} " * times + "w3 w4", f"text {times}") == (bos, 3, 4)
    assert reader.start(token, "alone") == (bos,)
    with pytest.warns(RepeatedBOSWarning, match=r"^4 texts \(text 1, text 2, text 3, alone\) begin with BOS") as said:
        reader.warn("text")
    assert len(said) == 1


def test_white_space_before_bos_is_no_text() -> None:
    """With a byte-level vocabulary, where a line break is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<bos>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<bos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<bos>", name_or_path="tiny", add_bos_token=True
    )
    reader = TextReader(tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", tokenizer))
    plain = reader.start("a b", "x")
    assert plain == (0, *tokenizer("a b", add_special_tokens=False)["input_ids"])
    assert reader.start("\n <bos>a b", "x") == plain
    assert len(reader.start("\n a b", "x")) == len(plain) + 2
    assert len(reader.begins_with_bos) == 1


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizers_that_leave_bos_to_others(tmp_path: Path, add_bos: bool) -> None:
    """Saved with add_bos_token=False, TransformerLens loads it anew with True; both read the same."""
    tiny.tiny_tokenizer(chat_template=WITH_BOS).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=add_bos)
    bridge = tiny.build_bridge(tiny.build_hf("olmoe"), "olmoe", loaded)
    reader = TextReader(bridge)
    assert reader.start("w3 w4", "x") == (1, 3, 4) == tuple(bridge.to_tokens("w3 w4")[0].tolist())
    assert reader.start("<bos> w3 w4", "x") == (1, 3, 4)
    assert reader.messages(ASKED, "x", True) == (1, 50, 3, 4, 51, 52)


def test_bos_that_transformer_lens_writes_into_the_text() -> None:
    """A tokenizer with BOS that does not add it, as of gpt_oss."""
    bridge = bridge_with(bos=False)
    bridge.tokenizer.add_special_tokens({"bos_token": "<bos>"})
    assert not bridge.cfg.tokenizer_prepends_bos
    reader = TextReader(bridge)
    assert reader.start("w3 w4", "x") == (1, 3, 4) == tuple(bridge.to_tokens("w3 w4")[0].tolist())
    assert bridge.to_tokens("<bos> w3")[0].tolist() == [1, 1, 3]
    assert reader.start("<bos> w3", "x") == (1, 3)
    bridge.tokenizer.chat_template = PLAIN
    assert reader.messages(ASKED, "x", True) == (1, 50, 3, 4, 51, 52)
    bridge.cfg.default_prepend_bos = False  # then the template alone decides
    assert TextReader(bridge).messages(ASKED, "x", True) == (50, 3, 4, 51, 52)


def test_several_tokens_in_front_are_not_doubled_either() -> None:
    """GLM's tokenizers put two tokens in front, and so do its chat templates."""
    bridge = bridge_with(chat_template="w90 <bos> " + TURNS)
    backend: Any = bridge.tokenizer.backend_tokenizer
    processor = type(backend.post_processor)(single="w90 <bos> $A", special_tokens=[("w90", 90), ("<bos>", 1)])
    backend.post_processor = processor
    reader = TextReader(bridge)
    assert reader.start("w3", "x") == (90, 1, 3)
    assert reader.start("w90 <bos> w3", "x") == (90, 1, 3)
    assert reader.start("w90 w3", "x") == (90, 1, 90, 3)
    assert reader.messages(ASKED, "x", True) == (90, 1, 50, 3, 4, 51, 52)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", [PLAIN, WITH_BOS, "<bos> " + WITH_BOS], ids=["no bos", "bos", "two bos"])
def test_messages_begin_with_bos_once(template: str, side: str) -> None:
    bridge = bridge_with(chat_template=template, side=side)
    reader = TextReader(bridge)
    assert reader.messages(ASKED, "x", True) == (1, 50, 3, 4, 51, 52)
    assert reader.messages(WHOLE, "x", False) == (1, 50, 3, 4, 51, 50, 5, 6, 51)
    reader.warn("item")  # a template that writes BOS is no one's mistake
    if template == WITH_BOS:
        options = {"tokenize": True, "return_dict": False}
        native = bridge.tokenizer.apply_chat_template(list(WHOLE), **options)
        assert reader.messages(WHOLE, "x", False) == tuple(native)


def test_messages_without_a_bos_are_what_the_template_writes() -> None:
    assert TextReader(bridge_with(bos=False, chat_template=PLAIN)).messages(ASKED, "x", True) == (50, 3, 4, 51, 52)


def test_what_a_template_or_a_text_ends_with_is_kept() -> None:
    bridge = bridge_with(chat_template=WITH_EOS)
    assert bridge.cfg.tokenizer_appends_eos  # TransformerLens takes <eos>, which stands for unknown words, for added
    reader = TextReader(bridge)
    assert reader.messages(WHOLE, "x", False) == (1, 50, 3, 4, 2, 50, 5, 6, 2)
    assert reader.start("w3 <eos>", "x") == (1, 3, 2)
    assert reader.rest("w5 <eos>", "x") == (5, 2)


def test_an_eos_that_the_tokenizer_adds_is_left_out() -> None:
    bridge = bridge_with()
    backend: Any = bridge.tokenizer.backend_tokenizer
    special = [("<bos>", 1), ("<eos>", 2)]
    backend.post_processor = type(backend.post_processor)(single="<bos> $A <eos>", special_tokens=special)
    reader = TextReader(bridge)
    assert bridge.tokenizer("w3")["input_ids"] == [1, 3, 2]
    assert reader.start("w3", "x") == (1, 3) == tuple(bridge.to_tokens("w3")[0].tolist())
    assert reader.start("w3 <eos>", "x") == (1, 3, 2)
    assert reader.rest("w3", "x") == (3,)


def test_what_cannot_be_rendered_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"^item 'a': messages, but the tokenizer has no chat template"):
        TextReader(bridge_with()).messages(ASKED, "item 'a'", True)
    strict = TextReader(bridge_with(chat_template=STRICT))
    assert strict.messages(ASKED, "x", False) == (1, 50, 3, 4, 51)
    with pytest.raises(DataError, match=r"^item 'a': messages that the chat template refuses \(roles must alternate\)"):
        strict.messages(({"role": "system", "content": "w3"}, *ASKED), "item 'a'", True)
    bridge = bridge_with()
    bridge.tokenizer = None
    for give in (TextReader(bridge).start, TextReader(bridge).rest):
        with pytest.raises(DataError, match=r"^item 'a': text as text, but the model has no tokenizer"):
            give("w3", "item 'a'", "text")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hello", "messages of type str"),
        ([], "messages none"),
        ({"role": "user", "content": "w3"}, "messages of type dict"),
        ([{"role": "user", "content": "w3"}, "w4"], "message 1 is w4"),
        ([{"content": "w3"}], "message 0 is"),
        ([{"role": "user"}], "message 0 is"),
        ([{"from": "human", "value": "w3"}], "message 0 is"),
    ],
)
def test_what_is_no_conversation(given: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"^line 4: {said}.*a list of messages such as"):
        check_messages(given, "line 4")


@pytest.mark.parametrize("ids", [[3, 4], (3, 4), np.array([3, 4], np.uint8), torch.tensor([3, 4])], ids=repr)
def test_ids_are_taken_as_they_are(bridge: TransformerBridge, ids: Any) -> None:
    reader = TextReader(bridge)
    assert reader.start(ids, "x") == (3, 4) == reader.rest(ids, "x")
    assert all(type(i) is int for i in reader.start(ids, "x"))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], r"\[\] of type list"),
        ([[3, 4]], r"\[\[3, 4\]\] of type list"),
        ([[3], [4, 5]], ".* of type list"),
        ([3, 4.5], ".* of type list"),
        ([True, False], ".* of type list"),
        ([3, "w4"], ".* of type list"),
        ([3, 2**70], ".* of type list"),
        (3, "3 of type int"),
        (None, "None of type NoneType"),
        (b"w3", "b'w3' of type bytes"),
        ({"w3": 1}, ".* of type dict"),
    ],
    ids=repr,
)
def test_what_is_no_list_of_ids(bridge: TransformerBridge, ids: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"^line 7: prompt {said}\. Expected: a text, or a list of token ids"):
        TextReader(bridge).start(ids, "line 7", "prompt")


@pytest.mark.parametrize("strange", [-1, 101, 2**40])
def test_ids_that_the_vocabulary_lacks(bridge: TransformerBridge, strange: int) -> None:
    said = rf"^line 7: token id {strange} in prompt\. Expected: ids from 0 to 100"
    with pytest.raises(DataError, match=said):
        TextReader(bridge).start([3, strange], "line 7", "prompt")


def test_ids_with_two_bos_are_kept_and_named(bridge: TransformerBridge) -> None:
    reader = TextReader(bridge)
    assert reader.start([1, 1, 3], "a") == (1, 1, 3)
    assert reader.start([1, 3, 1, 1], "b") == (1, 3, 1, 1)
    with pytest.warns(RepeatedBOSWarning, match=r"^1 sequence \(a\) begins with two BOS \(id 1\)"):
        reader.warn("sequence")
    bridge = bridge_with()
    bridge.tokenizer, bridge.original_model.config.bos_token_id = None, 1
    reader = TextReader(bridge)
    reader.start([1, 1, 3], "a")
    assert reader.begins_with_two == ["a"]


def test_many_are_named_by_the_first_five(bridge: TransformerBridge) -> None:
    reader = TextReader(bridge)
    for number in range(7):
        reader.start("<bos> w3", f"item '{number}'")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reader.warn("item")
    assert len(said) == 1
    assert str(said[0].message).startswith("7 items (item '0', item '1', item '2', item '3', item '4' and 2 more)")


def test_an_answer_begins_with_no_bos(bridge: TransformerBridge) -> None:
    reader = TextReader(bridge)
    assert reader.rest("w5 <eos> w6", "x") == (5, 2, 6)
    with pytest.raises(DataError, match=r"^x: answer that begins with the special token <bos>, id 1"):
        reader.rest("<bos> w5", "x")
    assert TextReader(bridge_with(bos=False)).rest("<eos> w5", "x") == (2, 5)


def test_half_a_character_is_refused(bridge: TransformerBridge) -> None:
    for give in (TextReader(bridge).start, TextReader(bridge).rest):
        with pytest.raises(DataError, match=r"^x: prompt with '\\ud800', half of a surrogate pair"):
            give("w3 \ud800", "x", "prompt")


def test_padding_on_either_side() -> None:
    ids, mask = padded_ids([(5,), (6, 7)], at_end=True)
    assert (ids.tolist(), mask.tolist()) == ([[5, 0], [6, 7]], [[1, 0], [1, 1]])
    ids, mask = padded_ids([(5,), (6, 7)], at_end=False)
    assert (ids.tolist(), mask.tolist()) == ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
