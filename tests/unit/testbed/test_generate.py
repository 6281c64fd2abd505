"""Completions: transformers' own greedy ones, whatever the batch; samples by the model's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_interp.testbed.domains.domain import Domain
from moe_interp.testbed.generate import complete
from moe_interp.testbed.model import ModelConfig, build_model, train_tokenizer

TEXT = Domain("t", ("the answer is 1234 for the cat", "the cat is not here"), ("a cat",))
PROMPTS = ["the cat", "a", "the answer is 12 for"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_experts": 4, "top_k": 2, "d_expert": 16, "max_length": 64}
    model = build_model(ModelConfig(**sizes), len(tokenizer)).double().eval()
    model.set_experts_implementation("eager")  # grouped matrix products refuse float64
    with torch.no_grad():
        model.lm_head.weight.mul_(60)  # far apart logits: greedy choices are no ties
    return model


def test_greedy_completions_are_those_of_transformers_one_prompt_at_a_time(model, tokenizer):
    found = complete(model, tokenizer, PROMPTS, max_new_tokens=12)
    for prompt, texts in zip(PROMPTS, found):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert texts == [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=12, batch=1) == found


def test_samples_follow_the_distribution_and_the_seed(model, tokenizer):
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False).input_ids]])
    with torch.no_grad():
        probs = (model(ids).logits[0, -1] / 8).softmax(-1)
    options = {"n_samples": 2000, "max_new_tokens": 1, "temperature": 8.0}
    texts = complete(model, tokenizer, ["the cat"], **options, seed=3)[0]
    assert texts == complete(model, tokenizer, ["the cat"], **options, seed=3)[0]
    assert texts != complete(model, tokenizer, ["the cat"], **options, seed=4)[0]
    # bytes that are no character decode alike: probabilities are added up by text
    written = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(probs))]
    for text in {"", written[int(probs.argmax())]}:
        p = sum(float(q) for q, other in zip(probs, written) if other == text)
        assert np.mean([t == text for t in texts]) == pytest.approx(p, abs=4.5 * (p * (1 - p) / 2000) ** 0.5 + 1e-3)


def test_a_prompt_that_begins_with_bos_is_completed_as_one_without(model, tokenizer):
    plain, rendered = complete(model, tokenizer, ["ab", "<bos>ab"], max_new_tokens=6)
    assert plain == rendered
