"""Models and tokenizers of the testbed: fixed by their seed, standard on disk, at home in a bridge."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_interp.errors import ConfigError
from moe_interp.hooks.attach import attach
from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.model import (
    ModelConfig,
    bridge_model,
    build_model,
    model_tensors,
    save_checkpoint,
    train_tokenizer,
)

SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 16, "max_length": 64}
TEXT = Domain("t", ("the answer is 1234 for the cat", "the cat is not here"), ("a cat",))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=280)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3"])
def test_a_saved_model_is_the_same_in_transformers_and_in_a_bridge(tmp_path, monkeypatch, tokenizer, family):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = ModelConfig(family=family, **SIZES, n_shared_experts=int(family == "deepseek_v3"))
    model = build_model(config, len(tokenizer), seed=1).eval()
    again, other = (build_model(config, len(tokenizer), seed=seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))

    tokens = torch.tensor([[1, *tokenizer("the cat is 12", add_special_tokens=False).input_ids]])
    with torch.no_grad():
        expected = model(tokens).logits
        # a bridge changes the model in place: it is saved from inside one, as after training
        bridge = bridge_model(model, tokenizer)
        save_checkpoint(bridge.original_model, tokenizer, tmp_path, torch.float32)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        booted = TransformerBridge.boot_transformers(str(tmp_path))
        for one in (booted, bridge):  # by default TransformerLens prepends it for two of the three families
            assert torch.equal(one.to_tokens("the cat is 12", prepend_bos=True).cpu(), tokens)
        for found in (loaded(tokens).logits, booted(tokens), bridge(tokens)):
            torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    with attach(booted) as moe:
        assert moe.layers == (0, 1)
        assert (moe.spec(0).n_experts, moe.spec(0).top_k, moe.spec(0).d_expert) == (4, 2, 16)
    names = model_tensors(bridge.original_model)
    assert all(torch.equal(names[name], tensor) for name, tensor in loaded.named_parameters())


def test_half_precision_is_what_is_saved(tmp_path, tokenizer):
    model = build_model(ModelConfig(**SIZES), len(tokenizer))
    save_checkpoint(model, tokenizer, tmp_path, torch.float16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_tokenizer_splits_digits_and_adds_nothing(tmp_path, tokenizer):
    text = "the answer is 1234\n    for é ∀"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert [tokenizer.decode([i]) for i in tokenizer("1234").input_ids] == list("1234")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ids
    assert train_tokenizer([TEXT], vocab_size=280).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ConfigError, match="vocab_size=200"):
        train_tokenizer([TEXT], vocab_size=200)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"top_k": 5}, "top_k=5 of 4 experts"),
        ({"d_model": 30}, "d_model=30"),
        ({"n_layers": 0}, "positive sizes"),
        ({"n_shared_experts": 1}, "1 shared experts on olmoe"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**SIZES, **changes})
