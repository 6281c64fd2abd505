"""Texts of tokens by themselves: whole characters as they are, parts of one by their bytes."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_interp.experiments.inputs.token_texts import token_texts


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE of single bytes, and of a space with the first two bytes of a euro sign."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "Ġâ", "Ġâ\u0124"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("Ġ", "â"), ("Ġâ", "\u0124")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_parts_of_a_character_show_their_bytes() -> None:
    tokenizer = byte_level()
    text = "a €é\ufffd\n"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, set(ids))
    assert "".join(texts[i] for i in ids) == "a <E2><82><AC><C3><A9><EF><BF><BD>\n"
    assert texts[ids[1]] == " <E2><82>"
    assert token_texts(tokenizer, [ids[0]]) == {ids[0]: "a"}


def test_byte_fallback_bytes_and_what_is_neither() -> None:
    pieces = {1: "<0xE2>", 2: "\ufffd", 3: b"\xe2\x82x", 4: "\u2581", 5: "x"}

    class Sentences:
        def decode(self, ids: list[int]) -> str:
            return "x" if ids == [5] else "\ufffd"

        def convert_ids_to_tokens(self, token_id: int) -> object:
            return pieces.get(token_id)

    texts = token_texts(Sentences(), range(1, 7))
    assert texts == {1: "<E2>", 2: "\ufffd", 3: "<E2><82>x", 4: "\ufffd", 5: "x", 6: "\ufffd"}
    assert token_texts(None, [7]) == {7: "<7>"}


def test_control_characters_are_shown_by_their_values() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a\0\x1b[2J\tb\n\x7f\x85")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts[i] for i in ids) == "a<00><1B>[2J\tb\n<7F><C2><85>"
