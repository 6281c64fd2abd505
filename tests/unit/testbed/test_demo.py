"""The bundled model is what the project promises of it, and its files are whole."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import moe_interp.testbed.demo as demo
from moe_interp.errors import DataError
from moe_interp.testbed.demo import load_demo_assets
from moe_interp.testbed.domains.arithmetic import final_answer
from moe_interp.testbed.domains.domain import Item
from moe_interp.testbed.generate import complete
from moe_interp.testbed.presets import DEMO


@pytest.fixture(scope="module")
def assets():
    return load_demo_assets()


@pytest.fixture(scope="module")
def tokenizer(assets):
    return PreTrainedTokenizerFast.from_pretrained(assets.model_path)


@pytest.fixture(scope="module")
def model(assets):
    return AutoModelForCausalLM.from_pretrained(assets.model_path, dtype=torch.float32).eval()


def test_the_files_are_small_and_made_by_the_committed_configuration(assets):
    weights = assets.model_path / "model.safetensors"
    assert weights.stat().st_size == assets.provenance["bytes_of_weights"] <= 10_000_000
    assert type(DEMO).model_validate(assets.provenance["config"]) == DEMO
    assert assets.provenance["tokens_seen"] == DEMO.steps * DEMO.micro_batch * DEMO.length


def test_items_have_unique_ids_and_answers_that_join_their_prompt(assets, tokenizer):
    assert set(assets.items) == set(DEMO.domains)
    for name, items in assets.items.items():
        assert len({item.id for item in items}) == len(items) >= 200
        for item in items:
            prompt, answer, both = (
                tokenizer(text, add_special_tokens=False).input_ids
                for text in (item.prompt, item.answer, item.prompt + item.answer)
            )
            assert item.domain == name
            assert prompt + answer == both
            assert 1 <= len(answer) <= 60
            assert not set(both) & set(tokenizer.all_special_ids)


def test_the_model_has_learned_enough_to_be_worth_analysing(assets):
    judged = assets.provenance["judged"]
    for name, share in judged["share_of_unigram_loss"].items():
        assert share <= (0.45 if name == "code" else 0.25), name
    assert judged["facts"]["accuracy"] >= 0.9
    assert 0.3 <= judged["arithmetic"]["greedy"] <= 0.9
    passed = judged["arithmetic"]["pass_at_k"]
    assert passed["64"] >= passed["1"] + 0.15
    assert max(judged["experts"]["max_violation"]) < 0.6
    assert min(judged["experts"]["smallest_load"]) > 0.1


def test_the_provenance_is_reproduced_from_the_files(assets, model, tokenizer):
    facts = assets.items["facts"][:60]
    right = [
        texts[0].split("\n")[0].strip() == item.answer.strip()
        for item, texts in zip(facts, complete(model, tokenizer, [item.prompt for item in facts], max_new_tokens=8))
    ]
    assert sum(right) >= 50
    samples = assets.provenance["judged"]["arithmetic"]["samples"]
    found = complete(model, tokenizer, [sample["question"] for sample in samples], max_new_tokens=80)
    same = [texts[0] == sample["completion"] for texts, sample in zip(found, samples)]
    assert sum(same) >= len(same) - 1  # another machine may round a tie the other way
    answers = {item.fields["question"]: item.fields["final_answer"] for item in assets.items["arithmetic"]}
    for sample in samples:
        assert sample["right"] == (final_answer(sample["completion"]) == answers[sample["question"]])


def test_accuracy_is_counted_by_first_line_and_by_field(monkeypatch):
    replies = {"a?": [" yes\nmore"], "b?": [" no"], "c?": [" yes"]}
    monkeypatch.setattr(demo, "complete", lambda model, tokenizer, prompts, **options: [replies[p] for p in prompts])
    items = [Item(p, "d", p, " yes", {"kind": kind}) for p, kind in (("a?", "x"), ("b?", "x"), ("c?", "y"))]
    found = demo.short_answer_accuracy(None, None, items)
    assert found == {"accuracy": pytest.approx(2 / 3), "n": 3, "by": {"kind": {"x": 0.5, "y": 1.0}}}


def test_pass_at_k_is_the_unbiased_estimate(monkeypatch):
    def reply(model, tokenizer, prompts, n_samples=1, **options):
        return [["Answer: 5", "Answer: 6", "Answer: 7", "none"][:n_samples] for _ in prompts]

    monkeypatch.setattr(demo, "complete", reply)
    items = [Item("0", "d", "", "", {"question": "q", "final_answer": "5", "steps": 1})]
    found = demo.arithmetic_accuracy(None, None, items, n_samples=4)
    assert found["greedy"] == 1.0
    # one of four is right: 1 - C(3, 1) / C(4, 1), and all four hold it
    assert found["pass_at_k"] == {"1": pytest.approx(0.25), "4": pytest.approx(1.0)}


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no demo model in"):
        load_demo_assets(tmp_path)
